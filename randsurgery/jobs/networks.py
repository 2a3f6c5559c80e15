"""A network to be used as it is: a file of this format, or dense weights of an architecture."""

from __future__ import annotations

import os
from dataclasses import replace

import timm

from randsurgery.errors import FileFormatError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.jobs.hub import PREFIX
from randsurgery.jobs.inputs import DataOptions, look_for, without_idle_size
from randsurgery.jobs.sources import SourceSpec, open_file, open_source, resolve_source


def open_network(
    spec: SourceSpec, options: DataOptions | None = None, notes: list[str] | None = None
) -> Checkpoint:
    """The network of a file; or with ``checkpoint`` or ``pretrained``, of a folder or a Hub address
    of dense weights, that of an architecture as the weights have it.

    ``options``: image size and channels that were asked for, to which dense weights are adapted;
    their own if none were. A folder's preprocessing is recorded. ``notes`` gets what the user is to
    know of how dense weights were read. Raises RandsurgeryError.
    """
    options = options or DataOptions()
    if not (spec.checkpoint or spec.pretrained or spec.name.startswith(PREFIX) or spec.is_folder):
        if not os.path.exists(spec.name) and timm.is_model(spec.name):
            raise FileFormatError(
                f"{spec.name}: no such file; for weights of that architecture pass --checkpoint or "
                f"--pretrained, and random ones `randsurgery init {spec.name}` writes"
            )
        return open_file(spec, spare_bases=True)
    spec = resolve_source(spec)
    if spec.is_file:
        return open_file(spec, spare_bases=True)
    asked = {"img_size": options.img_size, "in_chans": options.in_chans}
    given = {key: value for key, value in asked.items() if value is not None}
    spec = without_idle_size(replace(spec, args={**given, **spec.args}))
    found = open_source(spec, notes)
    if not spec.look or found.recipe.model is None:
        return found
    channels = found.recipe.model.args.get("in_chans", 3)
    assert isinstance(channels, int)
    seen = look_for(spec, "folder", replace(options, in_chans=channels))
    return replace(found, recipe=found.recipe.model_copy(update={"input": seen}))
