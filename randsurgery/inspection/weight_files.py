"""Any file of weights as tensors that are read a stretch at a time: what each is, which of its
elements were learned, and the distribution that it started from.

Nothing but headers is read until a tensor's values are asked for.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_never

from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from randsurgery.format.container import Container
from randsurgery.format.derivation import Derivation, derivation
from randsurgery.format.fields import SHARED
from randsurgery.format.rebuild import Payloads, read_mask, sliced
from randsurgery.format.recipe import (
    BaseSource,
    ConstantSource,
    Entry,
    HadamardSource,
    MaskOverlay,
    Member,
    RandomSource,
    Recipe,
    ReplaceOverlay,
    ScaleOverlay,
    ScatterOverlay,
    SignsSource,
    SliceOverlay,
    Source,
    StoredSource,
)
from randsurgery.format.shards import is_index, open_shards
from randsurgery.format.tensors import DTYPES, RawTensor
from randsurgery.inspection.headers import naming
from randsurgery.inspection.moments import Fetch

Labels = npt.NDArray[np.uint8]
Part = Literal["learned", "fixed", "masked"]
PARTS: tuple[Part, ...] = ("fixed", "learned", "masked")
"""Learned: values that a member brings. Fixed: drawn, or another checkpoint's. Masked: set to zero.
An element's label is its part's place here."""
FIXED, LEARNED, MASKED = range(3)


@dataclass(frozen=True)
class Initial:
    """The distribution a tensor was drawn from, as a number of its moments: of one element, and
    ``norm`` of a filter (the root of its expected square). ``kind``: sign, normal, uniform,
    constant, signs or hadamard; ``scale``: its magnitude, deviation or half-width."""

    kind: str
    scale: float
    mean: float
    mean_abs: float
    variance: float
    norm: float | None

    @property
    def std(self) -> float:
        """The deviation."""
        return math.sqrt(self.variance)


@dataclass(frozen=True)
class TensorSource:
    """One tensor, its values still in the file. ``whole``: the one part that all its elements are
    in; None if there are several, which ``labels`` tells apart, or if nothing is known of parts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    open: Callable[[], Fetch]
    initial: Initial | None = None
    whole: Part | None = None
    labels: Callable[[], Labels] | None = None
    in_parts: bool = True  # read a block at a time, not rebuilt as a whole

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Network:
    """The tensors of one network; ``file`` is what to call its file, ``member`` its name where a
    file has several. ``skipped``: tensors that cannot be shown, with the reason. ``head``: the
    classifier."""

    file: str
    tensors: tuple[TensorSource, ...]
    member: str | None = None
    model: str | None = None
    head: str | None = None
    ordered: bool = False  # from the first layer to the last
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file, and the member where it has several."""
        return self.file if self.member is None else f"{self.file}:{self.member}"


def open_networks(
    path: str | os.PathLike[str],
    stack: contextlib.ExitStack,
    title: str,
    *,
    base: Payloads | str | os.PathLike[str] | None = None,
    values: bool = True,
) -> list[Network]:
    """The networks of a safetensors file, of randsurgery or not, or of a sharded one's index;
    ``stack`` closes what was opened. ``title``: what to call the file. ``values`` false: no base is
    needed. Raises FileFormatError, or IncompatibleError for a base that is missing."""
    if is_index(path):
        return [_of_others(open_shards(Path(path), stack), title)]
    container = stack.enter_context(Container(path))
    if not is_checkpoint(container):
        return [_of_others(dict.fromkeys(container.infos, container), title)]
    container.__exit__()
    found = stack.enter_context(
        read_checkpoint(path, base=base, need_bases=values, spare_bases=True)
    )
    return networks_of(found, title)


def networks_of(
    checkpoint: Checkpoint, name: str, order: Iterable[str] | None = None
) -> list[Network]:
    """The members of a checkpoint, in a file or in memory, as networks; ``order``: their tensors
    from the first layer to the last, if it is known."""
    recipe, several = checkpoint.recipe, len(checkpoint.recipe.members) > 1
    return [
        Network(
            name,
            tuple(_rebuilt(checkpoint, member, n) for n in order or recipe.tensor_names(member)),
            member.name if several else None,
            recipe.model.name if recipe.model else None,
            member.head.name if member.head else None,
            order is not None,
        )
        for member in recipe.members
    ]


def network_in_memory(
    name: str,
    tensors: Mapping[str, Callable[[], RawTensor]],
    about: Mapping[str, tuple[str, tuple[int, ...]]],
    skipped: Mapping[str, str],
) -> Network:
    """A network whose tensors are fetched by calls; ``about`` has their dtypes and shapes."""

    def source(key: str, read: Callable[[], RawTensor]) -> TensorSource:
        dtype, shape = about[key]
        return TensorSource(key, dtype, shape, lambda: _stretch(read().array))

    found = tuple(source(key, read) for key, read in tensors.items())
    return Network(name, found, ordered=True, skipped=dict(skipped))


def _stretch(array: npt.NDArray[Any]) -> Fetch:
    flat = array.reshape(-1)
    return lambda start, stop: flat[start:stop]


# --- safetensors of any origin -------------------------------------------------------------------


def _of_others(files: Mapping[str, Container], title: str) -> Network:
    """The tensors by the file that each lies in."""
    dtypes = {name: file.infos[name].dtype for name, file in files.items()}
    return Network(
        title,
        tuple(_stored(files[name], name) for name in sorted(files) if dtypes[name] in DTYPES),
        skipped={name: dtype for name, dtype in dtypes.items() if dtype not in DTYPES},
    )


def _stored(container: Container, name: str) -> TensorSource:
    info = container.infos[name]

    def fetch(start: int, stop: int) -> npt.NDArray[Any]:
        return container.read_part(name, start, stop)

    return TensorSource(name, info.dtype, info.shape, lambda: fetch)


# --- files of randsurgery ------------------------------------------------------------------------


def _rebuilt(checkpoint: Checkpoint, member: Member, name: str) -> TensorSource:
    entry = checkpoint.recipe.resolved(member, name)
    whole = _one_part(checkpoint.recipe, member, name)

    def values() -> Fetch:
        with naming(checkpoint.path):
            return _stretch(checkpoint.rebuild(member, name).array)

    return TensorSource(
        name,
        entry.dtype,
        entry.shape,
        values,
        _initial(checkpoint.recipe, member, name, entry),
        whole,
        None if whole else lambda: element_labels(checkpoint, member, name),
        in_parts=False,
    )


def _before(made: Derivation) -> int:
    """What the elements of a source are, before any overlay."""
    scattered = any(isinstance(overlay, ScatterOverlay) for overlay in made.overlays)
    if scattered and isinstance(made.source, ConstantSource):
        return MASKED  # the zeros that survivors are scattered into
    stored = isinstance(made.source, (StoredSource, SignsSource, ConstantSource))
    return LEARNED if stored and made.owner != SHARED else FIXED


def _one_part(recipe: Recipe, member: Member, name: str) -> Part | None:
    """The one part that all elements belong to, if headers show it; None if there are several."""
    made = derivation(recipe, member, name)
    found: int | None = _before(made)
    for step in made.steps:
        brought, overlay = FIXED if step.owner == SHARED else LEARNED, step.overlay
        if isinstance(overlay, ReplaceOverlay):
            found = brought
        elif isinstance(overlay, SliceOverlay):
            all_of_it = overlay.count == made.entry.shape[overlay.dim]
            found = brought if all_of_it or found == brought else None
        elif isinstance(overlay, (MaskOverlay, ScatterOverlay)):
            found = None
        elif not isinstance(overlay, ScaleOverlay):
            assert_never(overlay)
    return None if found is None else PARTS[found]


def element_labels(checkpoint: Checkpoint, member: Member, name: str) -> Labels:
    """The part that each element belongs to. Shape (size,)."""
    made = checkpoint.derivation(member, name)
    entry = made.entry
    labels = np.full(entry.size, _before(made), dtype=np.uint8)
    for step in made.steps:
        brought, overlay = FIXED if step.owner == SHARED else LEARNED, step.overlay
        if isinstance(overlay, ReplaceOverlay):
            labels[:] = brought
        elif isinstance(overlay, SliceOverlay):
            labels.reshape(entry.shape)[sliced(entry, overlay, name)] = brought
        elif isinstance(overlay, (MaskOverlay, ScatterOverlay)):
            bits = read_mask(checkpoint.payloads, step, entry.size).unpack()
            if isinstance(overlay, MaskOverlay):
                labels[~bits] = MASKED
            else:
                labels[bits] = brought
        elif not isinstance(overlay, ScaleOverlay):
            assert_never(overlay)
    return labels


def _initial(recipe: Recipe, member: Member, name: str, entry: Entry) -> Initial | None:
    """What the tensor started from: what its plan says of the learned slice, else the shared entry,
    which stays in the file when a member replaces it, else a draw of the member's own."""
    plan = member.plan.tensors.get(name) if member.plan else None
    own, shared = member.tensors.get(name), recipe.tensors.get(name)
    drawn = own is not None and own.entry is not None and isinstance(
        own.entry.source, (RandomSource, HadamardSource)
    )  # fmt: skip
    if plan is not None and plan.start is not None:
        source: Source = plan.start
    elif drawn:
        source = entry.source
    elif shared is not None:
        source = shared.source
    else:
        return None
    width = math.prod(entry.shape[1:]) if len(entry.shape) > 1 else None
    return initial_of(source, width)


def initial_of(source: Source, width: int | None) -> Initial | None:
    """The moments of a source's distribution; ``width`` is the number of elements of a filter. None
    for values that follow no distribution: stored, or of a base."""
    if isinstance(source, ConstantSource):
        value = float.fromhex(source.value)
        kind, scale, mean, mean_abs, variance = "constant", value, value, abs(value), 0.0
    elif isinstance(source, (RandomSource, SignsSource, HadamardSource)):
        scale, mean = abs(float.fromhex(source.scale)), 0.0
        kind = source.distribution if isinstance(source, RandomSource) else source.kind
        if kind == "normal":
            mean_abs, variance = scale * math.sqrt(2 / math.pi), scale * scale
        elif kind == "uniform":
            mean_abs, variance = scale / 2, scale * scale / 3
        else:
            mean_abs, variance = scale, scale * scale
    elif isinstance(source, (StoredSource, BaseSource)):
        return None
    else:
        assert_never(source)
    norm = None if width is None else math.sqrt(width * (variance + mean * mean))
    return Initial(kind, scale, mean, mean_abs, variance, norm)


def with_members(networks: list[list[Network]], wanted: list[str]) -> list[Network]:
    """The networks of several files, of those with several members the named ones. Raises
    UsageError for a name that no member of any file bears."""
    members = {n.member for file in networks for n in file if n.member is not None}
    for name in wanted:
        if name not in members:
            known = f"; members: {', '.join(sorted(members))}" if members else ""
            raise UsageError(f"no file has several members and one named {name!r}{known}")
    return [
        network
        for file in networks
        for network in file
        if not wanted or network.member is None or network.member in wanted
    ]
