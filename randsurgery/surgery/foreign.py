"""Dense state dicts of other programs -> an architecture's names and shapes.

Two namings are known: timm's own, and that of hidden-networks, the published code of Ramanujan et
al. (github.com/allenai/hidden-networks): convolutions of the small networks in ``convs``, their
fully connected layers as 1x1 convolutions in ``linear``, ``shortcut`` where timm has
``downsample``, a 1x1 convolution without bias for ``fc``, norms without scale and shift, and a
tensor ``scores`` beside the weights that are masked. In both, names may bear what
``surgery.checkpoints`` knows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from randsurgery.errors import IncompatibleError, UsageError, near
from randsurgery.format.masks import Mask
from randsurgery.format.specs import ModelSpec
from randsurgery.format.tensors import STORAGE, RawTensor, from_f32
from randsurgery.surgery.architectures import ArgValue, build_meta, check_name, spec_of
from randsurgery.surgery.bases import Base
from randsurgery.surgery.checkpoints import (
    check_parametrizations,
    counts_note,
    missing_counts,
    plain_names,
    prefix_hint,
    pruned,
    pruning_note,
    says_arch,
    unpruned,
)
from randsurgery.surgery.recipes import CONSTANTS, as_built, pruning_mask
from randsurgery.surgery.roles import tensor_roles

SCORES = ".scores"

ARCHITECTURES = {
    "FC": "lenet_300_100", "Conv2": "conv2", "Conv4": "conv4", "Conv6": "conv6", "Conv8": "conv8",
    "Conv4Wide": "conv4", "Conv6Wide": "conv6", "ResNet18": "resnet18", "ResNet50": "resnet50",
    "ResNet101": "resnet101", "WideResNet50_2": "wide_resnet50_2",
    "WideResNet101_2": "wide_resnet101_2", "cResNet18": "resnet18_cifar",
    "cResNet50": "resnet50_cifar",
}  # fmt: skip
"""hidden-networks' names of architectures, and ours."""

_RENAMED = (
    (re.compile(r"^convs\."), "features."),
    (re.compile(r"^linear\.0\."), "fc1."),
    (re.compile(r"^linear\.2\."), "fc2."),
    (re.compile(r"^linear\.4\."), "fc."),
    (re.compile(r"\.shortcut\."), ".downsample."),
)


@dataclass(frozen=True)
class Foreign:
    """A state dict as the tensors of an architecture.

    ``tensors``: under the architecture's names and in its shapes. ``scores``: by the name of the
    weight they belong to. ``names``: the file's own name of each tensor. ``filled``: tensors that
    the file lacks, with the values that make no difference (scales 1, shifts and biases 0).
    ``masks``: what is alive of tensors that torch.nn.utils.prune pruned. ``notes``: what the user
    is to know.
    """

    file: str
    spec: ModelSpec
    shell: nn.Module
    tensors: dict[str, RawTensor]
    scores: dict[str, RawTensor]
    names: dict[str, str]
    filled: tuple[str, ...] = ()
    masks: dict[str, Mask] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check_arch(arch: str | None, about: Mapping[str, object]) -> str:
    """The architecture's name, a tag of timm's cut off. Raises UsageError with a proposal if the
    checkpoint says what it is of."""
    if arch is None:
        raise UsageError(f"--arch is missing: the architecture of the weights{_told(about)}")
    if arch in ARCHITECTURES:
        raise UsageError(
            f"unknown architecture {arch!r}; hidden-networks' name for {ARCHITECTURES[arch]}: "
            f"try --arch {ARCHITECTURES[arch]}"
        )
    return check_name(arch.partition(".")[0])


def _told(about: Mapping[str, object], arch: str | None = None) -> str:
    """A proposal, if the checkpoint names another architecture than ``arch``; else nothing."""
    said = about.get("arch")
    ours = ARCHITECTURES.get(said) if isinstance(said, str) else None
    if ours is None:
        return says_arch(about, arch)
    return "" if ours == arch else f"; the checkpoint says {said}, so try --arch {ours}"


def fit(base: Base, arch: str, args: Mapping[str, ArgValue]) -> Foreign:
    """The state dict as tensors of ``arch``, built with ``args`` and as many classes as it has.

    Raises IncompatibleError: a tensor that the architecture does not have or has in another shape,
    one that is missing, scores of no weight.
    """
    file = str(base.file)
    spec = spec_of(arch, dict(args))
    known = set(build_meta(spec).state_dict())
    plain = plain_names(base.names, lambda name: _known(name, known))
    ours = {_renamed(name, known): own for name, own in plain.own.items()}
    spec = as_built(spec, base, ours)
    shell = build_meta(spec)
    wanted = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    names = dict(plain.own)
    check_parametrizations(names, wanted, file)
    found = Foreign(file, spec, shell, {}, {}, {})
    for name in pruned(names, wanted):
        _take_pruned(found, base, name, names.pop(f"{name}_orig"), names.pop(f"{name}_mask"))
    theirs = False
    for name, own in sorted(names.items()):
        theirs = _take(found, base, name, own, wanted) or theirs
    weights = {name for name, role in tensor_roles(shell).items() if role.role == "weight"}
    if orphans := sorted(set(found.scores) - (set(found.tensors) & weights)):
        raise IncompatibleError(
            f"{file}: has scores of {orphans[0]!r}, which is missing or no weight of {arch}"
        )
    notes = [*base.notes, *plain.notes]
    if found.masks:
        notes.append(pruning_note(found.masks))
    return _filled(replace(found, notes=tuple(notes)), arch, theirs)


def _known(name: str, wanted: Collection[str]) -> bool:
    """True for a name that the architecture has, under its own naming or hidden-networks'."""
    if name.endswith(SCORES):
        name = name.removesuffix(SCORES) + ".weight"
    return _renamed(name, wanted) in wanted or unpruned(name) in wanted


def _take_pruned(found: Foreign, base: Base, name: str, own: str, mask: str) -> None:
    """A tensor that torch.nn.utils.prune pruned, with zeros where its mask is 0."""
    raw = base.tensors.read(own)
    found.masks[name] = pruning_mask(base.tensors.read(mask), mask, raw.shape)
    array = raw.array.copy().reshape(-1)
    array[~found.masks[name].unpack()] = 0
    found.tensors[name] = RawTensor(raw.dtype, array.reshape(raw.shape))
    found.names[name] = own


def _take(
    found: Foreign, base: Base, plain: str, own: str, wanted: Mapping[str, tuple[int, ...]]
) -> bool:
    """One tensor, or the scores of one; True if it is as hidden-networks writes it. Raises
    IncompatibleError."""
    file, arch = found.file, found.spec.name
    scored = plain.endswith(SCORES) and plain not in wanted
    weight = plain.removesuffix(SCORES) + ".weight" if scored else plain
    name = _renamed(weight, wanted)
    if name not in wanted:
        raise IncompatibleError(
            f"{file}: tensor {own!r} is not one of {arch}, nor known from hidden-networks"
            + (_told(base.about, arch) or prefix_hint(base.names, wanted) or near(weight, wanted))
        )
    raw = base.tensors.read(own)
    shaped = _reshaped(raw, wanted[name])
    if shaped is None:
        remedy = _told(base.about, arch) or (
            "; if the network was built otherwise, pass --width, --img-size, --in-chans or "
            "--model-kwargs"
        )
        raise IncompatibleError(
            f"{file}: {own!r} is {list(raw.shape)}, {arch} needs {list(wanted[name])}{remedy}"
        )
    into = found.scores if scored else found.tensors
    if name in into:
        raise IncompatibleError(f"{file}: {own!r} and another tensor are both {name} of {arch}")
    into[name] = shaped
    if not scored:
        found.names[name] = own
    return scored or name != weight or raw.shape != shaped.shape


def _renamed(name: str, wanted: Collection[str]) -> str:
    """The architecture's name of a tensor; the name itself if it has none."""
    if name in wanted:
        return name
    for pattern, ours in _RENAMED:
        new = pattern.sub(ours, name)
        if new != name and new in wanted:
            return new
    return name


def _reshaped(raw: RawTensor, shape: tuple[int, ...]) -> RawTensor | None:
    """The tensor in the architecture's shape, if it is that, or a 1x1 convolution for a linear
    layer; else None."""
    if raw.shape == shape:
        return raw
    if raw.shape == (*shape, 1, 1) and len(shape) == 2:
        return RawTensor(raw.dtype, raw.array.reshape(shape))
    return None


def _filled(found: Foreign, arch: str, theirs: bool) -> Foreign:
    """With what hidden-networks' layers do not have: scale and shift of norms, biases, and counts
    of batches. Raises IncompatibleError for anything else that is missing, or a dtype that does
    not fit."""
    roles = tensor_roles(found.shell)
    tensors, filled = dict(found.tensors), []
    counts = () if theirs else missing_counts(found.tensors, roles)
    for name, tensor in found.shell.state_dict().items():
        role, module = roles[name].role, name.rpartition(".")[0]
        if name in tensors:
            if tensors[name].dtype.startswith(("F", "BF")) != tensor.is_floating_point():
                raise IncompatibleError(
                    f"{found.file}: {name!r} is {tensors[name].dtype}, {arch} needs {tensor.dtype}"
                )
            continue
        affine = {f"{module}.weight", f"{module}.bias"}
        absent = role == "bias" or role == "batch count"
        absent = absent or (role in ("norm scale", "norm shift") and not affine & set(found.names))
        own = (n for n in found.names if n.rpartition(".")[0] == module)
        beside = next((n for n in own if found.tensors[n].dtype.startswith(("F", "BF"))), None)
        if name not in counts and not (theirs and absent and beside is not None):
            raise IncompatibleError(f"{found.file}: lacks {name!r} of {arch}")
        dtype = "I64" if role == "batch count" else found.tensors[str(beside)].dtype
        tensors[name] = _constant(CONSTANTS[role], dtype, tuple(tensor.shape))
        filled.append(name)
    notes = (*found.notes, counts_note(counts)) if counts else found.notes
    return replace(found, tensors=tensors, filled=tuple(filled), notes=notes)


def _constant(value: float, dtype: str, shape: tuple[int, ...]) -> RawTensor:
    if dtype == "BF16":
        return RawTensor(dtype, from_f32(dtype, np.full(shape, value, dtype=np.float32)))
    return RawTensor(dtype, np.full(shape, value, dtype=STORAGE[dtype]))
