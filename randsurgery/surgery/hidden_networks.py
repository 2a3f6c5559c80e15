"""Checkpoints of hidden-networks (Ramanujan et al.): their scores -> our masks.

Their ``SubnetConv`` sorts the |scores| of a layer of n weights and zeroes the lowest
``int((1 - k) * n)``, computed in floats; k is what they call ``prune_rate``, although it is the
share that is kept. Their ``FixedSubnetConv`` holds scores that are 0 or 1, the mask itself. Their
``SampleSubnetConv`` (Zhou et al.) keeps a weight with the probability sigmoid(score), drawn anew
in each pass; its most probable mask keeps the positive scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.derivation import payload_name
from randsurgery.format.fields import SHARED
from randsurgery.format.masks import Mask
from randsurgery.format.recipe import Algorithm, ConstantSource, Entry, Member, Recipe
from randsurgery.format.tensors import RawTensor, hex_float
from randsurgery.surgery.foreign import Foreign
from randsurgery.surgery.initialisers import parse_fraction
from randsurgery.surgery.modules import record
from randsurgery.surgery.recipes import CONSTANTS, head_of
from randsurgery.surgery.roles import Role, masked_weights, tensor_roles
from randsurgery.surgery.sentences import compact_entry, magnitudes, stored_entry
from randsurgery.surgery.tensors import to_torch

Weights = Literal["auto", "signs", "stored", "survivors"]


@dataclass(frozen=True)
class Reading:
    """How scores and weights are to be read.

    k: the share of each layer's weights that is kept, for "edge-popup". weights: "signs" refuses
    layers of several magnitudes, "stored" stores every weight, "survivors" only those that the
    mask keeps, "auto" signs where they will do; else survivors of a fixed mask, else all.
    """

    k: str | None = None
    algorithm: Algorithm = "edge-popup"
    weights: Weights = "auto"
    save_scores: bool = False

    def check(self) -> None:
        """Raises UsageError for values that are not allowed or contradict each other."""
        for option, value, allowed in (
            ("--algorithm", self.algorithm, get_args(Algorithm)),
            ("--weights", self.weights, get_args(Weights)),
        ):
            if value not in allowed:
                raise UsageError(f"unknown {option} {value!r}, expected {', '.join(allowed)}")
        if self.k is not None:
            parse_fraction(self.k, "--k")
            if self.algorithm == "supermask":
                raise UsageError("--k goes with edge-popup: a supermask keeps the positive scores")
        if self.save_scores and self.weights == "survivors":
            raise UsageError(
                "--save-scores and --weights survivors contradict each other: scores choose among "
                "weights that would be gone"
            )


@dataclass(frozen=True)
class Masks:
    """The masks by weight, and how they came about. ``k``: None for fixed masks and supermasks.
    ``tied``: layers in which equal |scores| stand on both sides of the cut."""

    masks: dict[str, Mask]
    k: float | None
    fixed: bool = False
    tied: tuple[str, ...] = ()


def recorded_k(about: Mapping[str, Any]) -> float | None:
    """A share in (0, 1] that stands beside the state dict as ``prune_rate``; None without one."""
    for place in (about, about.get("args"), about.get("config")):
        value = place.get("prune_rate") if isinstance(place, Mapping) else None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and value is not None and 0 < value <= 1:
            return float(value)
    return None


def k_of_folder(path: Path) -> str | None:
    """The prune_rate in the name of a folder above the file, as hidden-networks names them."""
    for folder in path.resolve().parents:
        if found := re.fullmatch(r"prune_rate=(\d?\.?\d+)", folder.name):
            return found[1]
    return None


def zeroed_count(k: float, size: int) -> int:
    """How many of ``size`` weights hidden-networks zeroes: their expression, floats and all. For
    k = 0.9 and 150 weights that is 14, where exact arithmetic has 15."""
    return int((1 - k) * size)


def read_masks(found: Foreign, wish: Reading, k: float | None, hint: str = "") -> Masks:
    """The masks that the scores choose. Raises IncompatibleError for scores that are not finite or
    lacking, UsageError for a missing or idle ``k``, ``hint`` telling what it may be.

    Of equal |scores| the lower index is zeroed first, as a stable sort has it.
    """
    _check_scored(found)
    scores = {name: _finite(raw, name) for name, raw in found.scores.items()}
    if wish.algorithm == "supermask":
        return Masks({name: Mask.of(values > 0) for name, values in scores.items()}, None)
    if all(bool(((values == 0) | (values == 1)).all()) for values in scores.values()):
        if wish.k is not None:
            raise UsageError(
                "the scores are 0 and 1, a mask already (FixedSubnetConv); leave --k out"
            )
        if wish.save_scores:
            raise UsageError(
                "the scores are 0 and 1, a mask already (FixedSubnetConv); leave --save-scores out"
            )
        return Masks({name: Mask.of(values != 0) for name, values in scores.items()}, None, True)
    if k is None:
        raise UsageError(
            "--k is missing: the share of each layer's weights that is kept, which hidden-networks "
            f"calls prune_rate{hint} (for conv_type SampleSubnetConv pass --algorithm supermask)"
        )
    masks, tied = {}, []
    for name, values in scores.items():
        bits, tie = _top(np.abs(values), zeroed_count(k, values.size))
        masks[name] = Mask.of(bits)
        if tie:
            tied.append(name)
    return Masks(masks, k, tied=tuple(tied))


def _finite(raw: RawTensor, name: str) -> npt.NDArray[Any]:
    """The scores as numbers, flat."""
    tensor = to_torch(raw)
    values: npt.NDArray[Any] = (tensor if raw.dtype == "F64" else tensor.float()).numpy().ravel()
    if not np.isfinite(values).all():
        raise IncompatibleError(f"the scores of {name} are not finite")
    return values


def _top(values: npt.NDArray[Any], zeroed: int) -> tuple[npt.NDArray[np.bool_], bool]:
    """True for all but the ``zeroed`` lowest values, and whether equal ones were told apart."""
    if zeroed == 0:
        return np.ones(values.size, dtype=np.bool_), False
    cut = np.partition(values, zeroed - 1)[zeroed - 1]
    bits: npt.NDArray[np.bool_] = values > cut
    equal = np.flatnonzero(values == cut)
    dropped = zeroed - int(np.count_nonzero(values < cut))
    bits[equal[dropped:]] = True
    return bits, dropped < equal.size


def unscored(found: Foreign) -> list[str]:
    """The weights of convolutions and linear layers that have no scores beside them."""
    layers = [f"{name}.{leaf}" for name, _, leaf in masked_weights(found.shell)]
    return [name for name in layers if name not in found.scores]


def _check_scored(found: Foreign) -> None:
    """Their code leaves the first and the last layer alone without scores."""
    layers = [f"{name}.{leaf}" for name, _, leaf in masked_weights(found.shell)]
    bare = [name for name in unscored(found) if name in layers[1:-1]]
    if bare:
        raise IncompatibleError(
            f"{found.file}: {found.names[bare[0]]!r} has no scores beside it, while "
            f"{len(found.scores)} other weights have; only the first and the last layer may lack "
            "them"
        )
    for name in found.scores:
        if not np.isfinite(to_torch(found.tensors[name]).float().numpy()).all():
            raise IncompatibleError(f"{found.file}: {found.names[name]!r} holds values not finite")


def make_checkpoint(found: Foreign, masks: Masks, wish: Reading) -> Checkpoint:
    """The network as ``popup`` writes them: weights, and what norms start from, in shared entries;
    masks and running statistics the member's. Raises IncompatibleError."""
    payloads = Memory()
    roles = tensor_roles(found.shell)
    entries: dict[str, Entry] = {}
    alive: dict[str, Mask] = {}
    for name, raw in sorted(found.tensors.items()):
        if name not in masks.masks:
            entries[name] = _start(raw, roles[name].role, name, payloads)
            continue
        entry = _weight(raw, name, masks.fixed, wish.weights, payloads)
        if entry is None:
            alive[name] = masks.masks[name]
            entry = _zeros(raw)
        entries[name] = entry
    recipe = Recipe(model=found.spec, tensors=entries, members=(Member(head=head_of(found.shell)),))
    kept = found.scores if wish.save_scores else {}
    return record(
        Checkpoint(recipe, payloads),
        found.tensors,
        chosen=masks.masks,
        alive=alive,
        scores={name: _as_f32(raw) for name, raw in kept.items()},
        algorithm=wish.algorithm,
    )


_FROZEN: tuple[Role, ...] = (
    "norm scale", "norm shift", "running mean", "running var", "batch count",
)  # fmt: skip


def _start(raw: RawTensor, role: Role, name: str, payloads: Memory) -> Entry:
    """The shared entry of a tensor without scores: what training starts norms from, so that files
    of one random network share all of it; dense layers as they are."""
    if role not in _FROZEN:
        return compact_entry(raw, SHARED, name, payloads)
    source = ConstantSource(value=hex_float(CONSTANTS[role]))
    return Entry(dtype=raw.dtype, shape=raw.shape, source=source)  # type: ignore[arg-type]


def _weight(
    raw: RawTensor, name: str, fixed: bool, weights: Weights, payloads: Memory
) -> Entry | None:
    """The shared entry of a masked weight; None if its survivors alone are to be stored."""
    if weights == "survivors":
        return None
    if weights == "stored":
        return stored_entry(raw, payload_name(SHARED, name, "source"), payloads)
    trial = Memory()
    entry = compact_entry(raw, SHARED, name, trial)
    if entry.source.kind == "stored":
        if weights == "signs":
            some = " and ".join(f"{value:g}" for value in magnitudes(raw))
            raise IncompatibleError(
                f"{name} ({raw.dtype}) does not hold one magnitude but several ({some} among "
                "them), so signs cannot stand for it; pass --weights auto, stored or survivors"
            )
        if fixed:
            return None
    payloads.update(trial)
    return entry


def _zeros(raw: RawTensor) -> Entry:
    zero = ConstantSource(value=hex_float(0.0))
    return Entry(dtype=raw.dtype, shape=raw.shape, source=zero)  # type: ignore[arg-type]


def _as_f32(raw: RawTensor) -> RawTensor:
    return RawTensor("F32", np.ascontiguousarray(to_torch(raw).float().numpy()))


def meant(found: Foreign, masks: Mapping[str, Mask]) -> Iterable[tuple[str, RawTensor]]:
    """(name, tensor) of what the converted file is to give, made the obvious way."""
    for name, raw in found.tensors.items():
        if name in masks:
            array = raw.array.copy().reshape(-1)
            array[~masks[name].unpack()] = 0
            raw = RawTensor(raw.dtype, array.reshape(raw.shape))
        yield name, raw
