"""The error tree. Every error a user can cause is one of these, says on one line what was
expected, what was found and the remedy, and carries the exit code of the command line.

    RandsurgeryError
    ├── UsageError          2   an option, pattern, name or number that cannot be used
    ├── FileFormatError     3   a file that cannot be read: truncated, corrupt, foreign, unsafe
    ├── IncompatibleError   4   parts that do not fit: base, architecture, shape, classes
    ├── DataError           5   a dataset that is missing, unknown or unreadable
    ├── OutputError         6   disk or permission
    └── DivergedError       7   the loss became NaN or infinite

Beside these the program ends with 0 (done), 1 (a comparison found differences), 70
(a bug of ours) and 130 (interrupted).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RandsurgeryError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UsageError(RandsurgeryError):
    """An option, pattern, name or number that cannot be used."""

    exit_code = 2


class FileFormatError(RandsurgeryError):
    """A file that cannot be read: truncated, corrupt, foreign or unsafe."""

    exit_code = 3


class IncompatibleError(RandsurgeryError):
    """Parts that do not belong together: base, architecture, shape, classes."""

    exit_code = 4


class DataError(RandsurgeryError):
    """A dataset that is missing, unknown or unreadable."""

    exit_code = 5


class OutputError(RandsurgeryError):
    """The disk is full, a folder is missing or may not be written."""

    exit_code = 6


class DivergedError(RandsurgeryError):
    """Training stopped because the loss is NaN or infinite."""

    exit_code = 7


class RandsurgeryWarning(UserWarning):
    """What a caller of the library ought to know and the command line tells in a note."""


def near(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """``"; near: a, b"`` for the candidates closest to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(candidates), n=limit, cutoff=0.6)
    return f"; near: {', '.join(found)}" if found else ""


def reason(error: BaseException, limit: int = 200) -> str:
    """The first line of another library's error, cut to ``limit`` characters."""
    text = str(error).strip()
    return text.splitlines()[0][:limit] if text else repr(error)
