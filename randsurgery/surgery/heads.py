"""Fixed classifiers (Hoffer et al., "Fix your classifier"): the last layer is never learned.

The classifier's rows are unit vectors, a random orthonormal set (Section 3.1) or rows of a
Hadamard matrix (Section 4). Its input is normalised to length 1, and one scale and a bias a class
are left to learn:

    logits = scale * (x / |x|) W^T + bias
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.canonical import digest
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.derivation import payload_name, payload_names, split_payload_name
from randsurgery.format.fields import SHARED
from randsurgery.format.generator import generate
from randsurgery.format.recipe import (
    ConstantSource,
    Entry,
    HadamardSource,
    Learned,
    Plan,
    Source,
    StoredSource,
)
from randsurgery.format.specs import HeadSpec, ModelSpec
from randsurgery.format.tensors import RawTensor, f32, hex_float
from randsurgery.surgery.architectures import build_meta, classifier_names

FixedKind = Literal["orthonormal", "hadamard"]
FIXED_KINDS: tuple[FixedKind, ...] = get_args(FixedKind)


class FixedClassifier(nn.Module):
    """A classifier with fixed rows. (..., in) -> (..., classes), or (N, in, H, W) -> (N, classes,
    H, W) where it takes the place of a 1x1 convolution.

    ``weight`` (classes, in) is frozen; ``scale`` (1) and ``bias`` (classes) are learned.
    """

    fixed = True

    def __init__(
        self, in_features: int, classes: int, *, channels: bool = False, scale_learned: bool = True
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, classes
        self.channels, self.scale_learned = channels, scale_learned
        self.weight = nn.Parameter(torch.empty(classes, in_features), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(1), requires_grad=scale_learned)
        self.bias = nn.Parameter(torch.empty(classes))

    def learned_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of what may be learned."""
        if self.scale_learned:
            yield "scale", self.scale
        yield "bias", self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scaled cosines to the rows, plus the bias."""
        if self.channels:
            x = x.movedim(1, -1)
        # lengths in float32: under autocast a sum of squares of thousands would lose digits
        unit = F.normalize(x.float(), dim=-1).to(x.dtype)
        out = F.linear(unit, self.weight) * self.scale + self.bias
        return out.movedim(-1, 1) if self.channels else out


def fixed_heads(model: nn.Module) -> dict[str, FixedClassifier]:
    """The fixed classifiers of a module by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FixedClassifier)}


def check_not_fixed(model: nn.Module, names: Iterable[str]) -> None:
    """Raises IncompatibleError if one of the tensors to be learned is fixed: the rows of a fixed
    classifier, or a given scale."""
    fixed: dict[str, str] = {}
    for place, head in fixed_heads(model).items():
        free = {leaf for leaf, _ in head.learned_parameters()}
        prefix = f"{place}." if place else ""
        fixed |= {prefix + leaf: leaf for leaf, _ in head.named_parameters() if leaf not in free}
    if wrong := [name for name in names if name in fixed]:
        what = "rows are" if fixed[wrong[0]] == "weight" else "given scale is"
        raise IncompatibleError(
            f"{wrong[0]} cannot be learned: a fixed classifier's {what} never learned; leave it out"
        )


def head_scale(model: nn.Module) -> float | None:
    """The scale of the (first) fixed classifier now; None without one."""
    first = next(iter(fixed_heads(model).values()), None)
    return None if first is None else float(first.scale.detach())


def _last_layer(model: nn.Module, name: str) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The linear layer (or 1x1 convolution) within a classifier that gives the logits."""
    layers = [
        (f"{name}.{inner}" if inner else name, module)
        for inner, module in model.get_submodule(name).named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
    ]
    if not layers:
        raise IncompatibleError(f"the classifier {name} has no linear layer to fix")
    found, module = layers[-1]
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    return found, module


def install(model: nn.Module, *, scale_learned: bool = True) -> dict[str, FixedClassifier]:
    """Put an empty fixed classifier in the place of each of the module's classifiers; its tensors
    are for the caller to fill. Raises IncompatibleError if there is none."""
    names = classifier_names(model)
    if not names:
        raise IncompatibleError("the network has no classifier to fix")
    made: dict[str, FixedClassifier] = {}
    for name in names:
        place, old = _last_layer(model, name)
        conv = isinstance(old, nn.Conv2d)
        width = old.in_channels if isinstance(old, nn.Conv2d) else old.in_features
        classes = old.out_channels if isinstance(old, nn.Conv2d) else old.out_features
        with torch.device(old.weight.device):
            head = FixedClassifier(width, classes, channels=conv, scale_learned=scale_learned)
        made[place] = head.to(old.weight.dtype)
        model.set_submodule(place, made[place])
    return made


def orthonormal_rows(rows: int, columns: int, seed: int, stream: str) -> npt.NDArray[np.float32]:
    """Unit rows from our generator; the first ``columns`` are orthogonal to float32's precision,
    and so is each further set of as many, should there be more rows than columns.

    The decomposition is the linear algebra library's, whose last digits differ between machines;
    that is why such a head is stored.
    """
    blocks = []
    for turn in range(-(-rows // columns)):
        drawn = generate(
            "normal", columns * columns, 1.0, seed=seed, stream=f"{stream}-{turn}", role="head"
        ).reshape(columns, columns)
        q, r = np.linalg.qr(drawn.astype(np.float64).T)
        blocks.append((q * np.sign(np.diagonal(r))).T)
    return np.concatenate(blocks)[:rows].astype(np.float32)


def coherence(rows: npt.NDArray[Any]) -> float:
    """The largest |cosine| between two different rows; 0 for orthogonal ones."""
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    largest = 0.0
    for first in range(0, len(unit), 512):  # a block of rows at a time: there may be 20,000
        gram = np.abs(unit[first : first + 512] @ unit.T)
        gram[np.arange(len(gram)), first + np.arange(len(gram))] = 0.0
        largest = max(largest, float(gram.max(initial=0.0)))
    # below the last digits of float32, orthogonal rows differ from orthogonal by rounding alone
    return 0.0 if largest < 1e-6 else largest


def describe_head(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Kind, rows, width and coherence of the fixed classifier; None without one."""
    who = checkpoint.member()
    head, spec = who.head, checkpoint.recipe.model_of(who)
    if head is None or head.kind == "linear" or spec is None:
        return None
    place = last_layers(build_meta(spec))[0]
    rows = checkpoint.tensor(f"{place}.weight").array
    return {"kind": head.kind, "rows": len(rows), "width": rows.shape[1],
            "coherence": coherence(rows)}  # fmt: skip


def head_sentence(about: dict[str, Any]) -> str:
    """What ``describe_head`` found, for people."""
    how = (
        "orthogonal"
        if about["coherence"] == 0
        else f"not all orthogonal: the largest cosine between two is {about['coherence']:.3f}"
    )
    return f"classifier fixed: {about['rows']} {about['kind']} rows of {about['width']}, {how}"


def check_fixed_kind(name: str) -> FixedKind:
    """``orthonormal`` or ``hadamard``. Raises UsageError."""
    for kind in FIXED_KINDS:
        if kind == name:
            return kind
    raise UsageError(f"unknown --head {name!r}, expected {', '.join(FIXED_KINDS)}")


def _rows(kind: FixedKind, shape: tuple[int, int], seed: int, name: str, into: Memory) -> Entry:
    """The entry of the fixed rows, its payload put into ``into`` if it has one."""
    source: Source
    if kind == "hadamard":  # every entry ±1/sqrt(d): unit rows, and no byte is stored
        source = HadamardSource(scale=hex_float(f32(shape[1] ** -0.5)))
    else:
        raw = RawTensor("F32", orthonormal_rows(*shape, seed, name))
        into[payload_name(SHARED, name, "source")] = raw
        source = StoredSource(digest=digest(raw.array))
    return Entry(dtype="F32", shape=shape, source=source)


def with_fixed_head(
    checkpoint: Checkpoint, kind: FixedKind, *, seed: int = 0, scale: float | None = None
) -> Checkpoint:
    """The same network with its classifier fixed. Whatever the old one held is dropped.

    ``scale``: given and never learned; None: learned from sqrt(width / classes) on, so that the
    logits start with the deviation that learned classifiers have. Raises IncompatibleError if the
    network has no architecture of timm's or no classifier, or if there are not enough distinct
    rows.
    """
    recipe, who = checkpoint.recipe, checkpoint.member()
    spec = recipe.model_of(who)
    if spec is None or who.head is None:
        raise IncompatibleError("the network has no classifier to fix")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"--head-scale must be above 0, found {scale}")
    shell = build_meta(spec)
    gone = tuple(f"{place}." for place in last_layers(shell))
    tensors = {n: e for n, e in recipe.tensors.items() if not n.startswith(gone)}
    own = {n: e for n, e in who.tensors.items() if not n.startswith(gone)}
    payloads = Memory(
        {
            name: checkpoint.payloads.read(name)
            for name in payload_names(recipe)
            if not split_payload_name(name)[1].startswith(gone)
        }
    )
    for place, head in install(shell).items():
        width, classes = head.in_features, head.out_features
        start = math.sqrt(width / classes) if scale is None else scale
        rows = f"{place}.weight"
        tensors[rows] = _rows(kind, (classes, width), seed, rows, payloads)
        tensors[f"{place}.scale"] = _constant((1,), start)
        tensors[f"{place}.bias"] = _constant((classes,), 0.0)
    fixed = HeadSpec(
        name=who.head.name,
        kind=kind,
        classes=who.head.classes,
        scale="learned" if scale is None else "given",
        seed=seed,
    )
    plan = who.plan and refitted(who.plan, build_meta(spec), scale_learned=scale is None)
    fresh = who.model_copy(update={"head": fixed, "tensors": own, "plan": plan})
    update = {"tensors": dict(sorted(tensors.items())), "members": (fresh,), "backbone_id": None}
    changed = recipe.model_copy(update=update)
    # it has been read; who closes this closes that
    return replace(checkpoint, recipe=changed, payloads=payloads, opened=checkpoint.files)


def refitted(plan: Plan, model: nn.Module, *, scale_learned: bool = True) -> Plan:
    """A plan for the network once its classifiers are fixed: what is gone or fixed leaves the plan,
    bias and scale of a fixed classifier, but not a given scale, enter it."""
    places = last_layers(model)
    gone = tuple(f"{place}." for place in places)
    kept = {name: part for name, part in plan.tensors.items() if not name.startswith(gone)}
    for place in places:
        kept |= {f"{place}.bias": Learned()}
        kept |= {f"{place}.scale": Learned()} if scale_learned else {}
    return plan.model_copy(update={"tensors": dict(sorted(kept.items()))})


def last_layers(model: nn.Module) -> list[str]:
    """The dotted names of the layers that give the logits, one for each classifier."""
    return [_last_layer(model, name)[0] for name in classifier_names(model)]


def _constant(shape: tuple[int, ...], value: float) -> Entry:
    return Entry(dtype="F32", shape=shape, source=ConstantSource(value=hex_float(f32(value))))


def with_head(checkpoint: Checkpoint, classes: int) -> Checkpoint:
    """The same architecture for another number of classes, its classifier drawn anew.

    The tensors whose shape depends on the classes are found on meta. Only such as hold nothing
    learned can be redrawn. Raises IncompatibleError naming ``--num-classes`` if one does, or if
    there is no classifier.
    """
    recipe, member = checkpoint.recipe, checkpoint.member()
    head, spec = member.head, recipe.model_of(member)
    if head is None or spec is None:
        raise IncompatibleError("the network has no classifier to give other classes")
    if head.classes == classes:
        return checkpoint
    spec = spec.model_copy(update={"args": {**spec.args, "num_classes": classes}})
    if head.kind != "linear":
        return _refixed(checkpoint, head, spec, classes)
    tensors = dict(recipe.tensors)
    for name, wanted in build_meta(spec).state_dict().items():
        entry, shape = recipe.resolved(member, name), tuple(wanted.shape)
        if entry.shape == shape:
            continue
        drawn = entry.source.kind in ("random", "constant", "hadamard")
        if not drawn or entry.overlays or name in member.tensors:
            raise IncompatibleError(
                f"the classifier is learned for {head.classes} classes, {classes} are wanted; "
                + _other_head(head.classes, classes)
            )
        tensors[name] = entry.model_copy(update={"shape": shape, "digest": None})
    fresh = member.model_copy(
        update={"head": head.model_copy(update={"classes": classes}), "classes": None}
    )
    changed = recipe.model_copy(update={"tensors": tensors, "model": spec, "members": (fresh,)})
    return replace(checkpoint, recipe=changed)


def _other_head(have: int, wanted: int) -> str:
    """What can be done about a learned classifier of another number of classes."""
    if have > wanted:
        return f"pass --num-classes {have} or start from another file"
    return (
        f"pass --num-classes {have} if the dataset has no more, or start from a file whose "
        "classifier is not learned"
    )


def _refixed(checkpoint: Checkpoint, head: HeadSpec, spec: ModelSpec, classes: int) -> Checkpoint:
    """The fixed classifier made anew for another number of classes, unless its bias or scale is
    learned."""
    recipe, member = checkpoint.recipe, checkpoint.member()
    before = recipe.model_of(member)
    assert before is not None
    places = last_layers(build_meta(before))
    names = [f"{place}.{leaf}" for place in places for leaf in ("bias", "scale")]
    if any(name in member.tensors or recipe.tensors[name].overlays for name in names):
        raise IncompatibleError(
            f"the classifier's bias is learned for {head.classes} classes, {classes} are wanted; "
            + _other_head(head.classes, classes)
        )
    scale = None
    if head.scale == "given":
        source = checkpoint.recipe.tensors[f"{places[0]}.scale"].source
        assert isinstance(source, ConstantSource)
        scale = float.fromhex(source.value)
    fresh = member.model_copy(
        update={"head": head.model_copy(update={"classes": classes}), "classes": None}
    )
    changed = checkpoint.recipe.model_copy(update={"model": spec, "members": (fresh,)})
    assert head.kind != "linear"
    again = replace(checkpoint, recipe=changed)
    return with_fixed_head(again, head.kind, seed=head.seed, scale=scale)
