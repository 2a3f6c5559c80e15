"""Measurements of randsurgery against the naive way to do the same.

Each module is run by hand from a checkout and prints one JSON object on stdout; what it is doing
goes to stderr::

    python -m benchmarks.popup_step     a training step: popup, dense, sorting, kthvalue
    python -m benchmarks.rebuild        file -> ready module: time, memory, file size
    python -m benchmarks.generator      random numbers against torch's
    python -m benchmarks.masks          masks against their entropy: bytes and time
    python -m benchmarks.startup        the command line's ``--help``
    python -m benchmarks.inspection     reports on files: weights, storage
    python -m benchmarks.census         every architecture of timm has a recipe (minutes)

All take ``--help``. Contenders are measured in turn (A B C A B C ...) in one process, so that a
machine that slows down slows all of them; figures are medians, and ``ratios`` are what to compare
between machines. Run them on an idle machine. Neither the package nor its tests import them.
"""
