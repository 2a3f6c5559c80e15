"""The recipe: what a checkpoint says about every tensor, without its payload bytes.

    tensor = overlay_n( ... overlay_1( source ) )

The set of sources and overlays is closed. docs/format.md sections 2, 4 and 5 are normative. All
models are frozen and refuse unknown fields; only ``notes`` is free.

Payload bytes live in safetensors tensors whose names follow from the place that needs them:
``OWNER/TENSOR/SLOT``, where OWNER is ``shared`` or a member's name and SLOT is ``source``,
``N.mask``, ``N.values``, ``N.slice``, ``N.tensor`` (N the overlay's index) or ``scores``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from randsurgery.format.fields import (
    SHARED,
    Count,
    Digest,
    HexFloat,
    MemberName,
    Seed,
    Shape,
    TensorName,
    Text,
)
from randsurgery.format.generator import Distribution
from randsurgery.format.masks import Encoding
from randsurgery.format.specs import (
    Calibration,
    DatasetSpec,
    HeadSpec,
    InputSpec,
    Model,
    ModelSpec,
)
from randsurgery.format.tensors import DType, element_count

FORMAT = "randsurgery"
VERSION = 1


# --- sources ---------------------------------------------------------------------------------


class RandomSource(Model):
    """Values drawn from a seed: no payload. ``stream`` is the tensor's own name if left out."""

    kind: Literal["random"] = "random"
    distribution: Distribution
    seed: Seed
    scale: HexFloat  # magnitude, standard deviation or half-width; a float32 value
    stream: Text | None = None


class ConstantSource(Model):
    """Every element equals ``value``."""

    kind: Literal["constant"] = "constant"
    value: HexFloat


class HadamardSource(Model):
    """Rows of a Hadamard matrix times ``scale``; the shape is (rows, columns)."""

    kind: Literal["hadamard"] = "hadamard"
    scale: HexFloat


class SignsSource(Model):
    """Stored sign bits times ``scale``. Payload ``source``: packed bits, 1 for +."""

    kind: Literal["signs"] = "signs"
    scale: HexFloat
    digest: Digest


class BaseSource(Model):
    """Tensor ``tensor`` of the base checkpoint named ``base`` in the recipe."""

    kind: Literal["base"] = "base"
    base: Text
    tensor: TensorName


class StoredSource(Model):
    """The tensor itself. Payload ``source``."""

    kind: Literal["stored"] = "stored"
    digest: Digest


Source = Annotated[
    RandomSource | ConstantSource | HadamardSource | SignsSource | BaseSource | StoredSource,
    Field(discriminator="kind"),
]

# --- overlays --------------------------------------------------------------------------------


class MaskOverlay(Model):
    """Keep where the bit is 1, +0.0 elsewhere. Payload ``N.mask``."""

    kind: Literal["mask"] = "mask"
    encoding: Encoding
    count: Count  # ones
    digest: Digest


class ScatterOverlay(Model):
    """Values at the positions of a mask. Payloads ``N.mask`` and ``N.values``."""

    kind: Literal["scatter"] = "scatter"
    encoding: Encoding
    count: Count
    digest: Digest
    values_digest: Digest


class SliceOverlay(Model):
    """Overwrite the first ``count`` indices along ``dim``. Payload ``N.slice``."""

    kind: Literal["slice"] = "slice"
    dim: Annotated[int, Field(ge=0, lt=16)]
    count: Count
    digest: Digest


class ReplaceOverlay(Model):
    """The whole tensor. Payload ``N.tensor``."""

    kind: Literal["replace"] = "replace"
    digest: Digest


class ScaleOverlay(Model):
    """Times one float32 number."""

    kind: Literal["scale"] = "scale"
    factor: HexFloat


Overlay = Annotated[
    MaskOverlay | ScatterOverlay | SliceOverlay | ReplaceOverlay | ScaleOverlay,
    Field(discriminator="kind"),
]

# --- the whole -------------------------------------------------------------------------------


class Entry(Model):
    """One tensor: a source, then overlays. ``digest`` is of the finished tensor."""

    dtype: DType
    shape: Shape
    source: Source
    overlays: tuple[Overlay, ...] = ()
    digest: Digest | None = None  # absent in memory, and where one payload holds the tensor

    @property
    def size(self) -> int:
        """The number of elements."""
        return element_count(self.shape)

    @property
    def in_one_payload(self) -> bool:
        """True if one payload holds the whole finished tensor, so that its digest says it all."""
        if self.overlays:
            return isinstance(self.overlays[-1], ReplaceOverlay)
        return isinstance(self.source, StoredSource)


class MemberTensor(Model):
    """What one member does to one tensor: overlays on the shared entry, or an entry of its own."""

    overlays: tuple[Overlay, ...] = ()
    entry: Entry | None = None
    digest: Digest | None = None

    @property
    def added(self) -> tuple[Overlay, ...]:
        """The member's own overlays, wherever they stand."""
        return self.overlays if self.entry is None else self.entry.overlays

    @property
    def in_one_payload(self) -> bool:
        """As of an entry."""
        if self.entry is not None:
            return self.entry.in_one_payload
        return isinstance(self.overlays[-1], ReplaceOverlay)

    def with_added(self, overlays: tuple[Overlay, ...]) -> MemberTensor:
        """The same with other overlays of the member's own; the finished digest is left out."""
        if self.entry is None:
            return MemberTensor(overlays=overlays)
        entry = self.entry.model_copy(update={"overlays": overlays, "digest": None})
        return MemberTensor(entry=entry)

    @model_validator(mode="after")
    def _one_of_two(self) -> MemberTensor:
        if bool(self.overlays) == (self.entry is not None):
            raise ValueError("a member's tensor has either overlays or an entry")
        if self.entry is not None and self.digest is not None:
            raise ValueError("the digest of a member's own entry stands in the entry")
        return self


class Learned(Model):
    """What is learned of one tensor: the first ``count`` indices along ``dim`` (a slice), the
    positions its mask keeps (survivors), or all of it. ``start`` is what a slice holds before
    training where that is not the tensor's own value."""

    part: Literal["whole", "slice", "survivors"] = "whole"
    dim: Annotated[int, Field(ge=0, lt=16)] | None = None
    count: Count | None = None
    start: RandomSource | BaseSource | ConstantSource | None = None

    @model_validator(mode="after")
    def _slices_have_both(self) -> Learned:
        sliced = self.part == "slice"
        if (self.dim is not None) != sliced or (self.count is not None) != sliced:
            raise ValueError("a slice, and nothing else, has dim and count")
        if self.start is not None and not sliced:
            raise ValueError("only a slice has a start")
        return self


class Plan(Model):
    """What training may change: parts of the named tensors, and running statistics if tracked."""

    tensors: dict[TensorName, Learned] = {}
    statistics: Literal["tracked", "frozen"] = "tracked"


class BaseRef(Model):
    """A checkpoint that this file builds on and does not contain."""

    identity: Digest
    file: Text | None = None  # a bare file name, looked for beside this file
    origin: Text | None = None  # such as hf-hub:timm/resnet18.a1_in1k
    revision: Text | None = None

    @model_validator(mode="after")
    def _bare_name(self) -> BaseRef:
        if self.file is not None and (
            re.search(r"[/\\:\x00-\x1f]", self.file) or ".." in self.file or self.file in ("", ".")
        ):
            raise ValueError(f"base file {self.file!r} is not a bare file name")
        return self


Algorithm = Literal["edge-popup", "supermask"]
"""Whose scores: edge-popup keeps the largest magnitudes, a supermask keeps with sigmoid(score)."""


class Member(Model):
    """One network of the checkpoint: the shared entries with its own overlays."""

    name: MemberName = "main"
    tensors: dict[TensorName, MemberTensor] = {}
    scores: dict[TensorName, Digest] = {}  # F32; payload ``scores``
    algorithm: Algorithm = "edge-popup"  # what the scores mean
    rescaled: bool = False  # what a supermask keeps is multiplied by all / kept of its tensor
    head: HeadSpec | None = None
    input: InputSpec | None = None  # where it is not the recipe's
    classes: tuple[Text, ...] | None = None
    dataset: DatasetSpec | None = None
    calibration: Calibration | None = None
    plan: Plan | None = None
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_name_a_class(self) -> Member:
        if self.head is not None and self.classes and len(self.classes) != self.head.classes:
            raise ValueError(f"{len(self.classes)} class names, but {self.head.classes} classes")
        return self


class Recipe(Model):
    """A whole checkpoint without its payload bytes."""

    format: Literal["randsurgery"] = "randsurgery"
    version: Literal[1] = 1
    model: ModelSpec | None = None  # None: the user's own module
    input: InputSpec | None = None
    tensors: dict[TensorName, Entry] = {}
    members: Annotated[tuple[Member, ...], Field(min_length=1)] = (Member(),)
    bases: dict[Text, BaseRef] = {}
    backbone_id: Digest | None = None
    notes: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [member.name for member in self.members]
        if len(set(names)) != len(names):
            raise ValueError("two members bear the same name")
        for member in self.members:
            strangers = set(member.tensors) - set(self.tensors)
            if strangers and any(member.tensors[name].entry is None for name in strangers):
                raise ValueError(f"member {member.name!r} overlays a tensor that does not exist")
            unknown = set(member.scores) - set(self.tensors) - set(member.tensors)
            if unknown:
                raise ValueError(f"member {member.name!r} has scores of no tensor")
            self._check_plan(member)
        for _, _, entry in self.entries():
            if isinstance(entry.source, BaseSource) and entry.source.base not in self.bases:
                raise ValueError(f"base {entry.source.base!r} is not declared")
        return self

    def _check_plan(self, member: Member) -> None:
        for name, learned in (member.plan.tensors if member.plan else {}).items():
            if name not in self.tensors and name not in member.tensors:
                raise ValueError(f"member {member.name!r} plans to learn no tensor: {name!r}")
            entry = self.resolved(member, name)
            shape = entry.shape
            dim, count = learned.dim, learned.count
            if dim is not None and (dim >= len(shape) or (count or 0) > shape[dim]):
                raise ValueError(f"{name}: no slice of {count} along dim {dim} to learn")
            kinds = {overlay.kind for overlay in entry.overlays}
            if learned.part == "survivors" and not kinds & {"mask", "scatter"}:
                raise ValueError(f"{name}: no mask says which values survive to be learned")
            if isinstance(learned.start, BaseSource) and learned.start.base not in self.bases:
                raise ValueError(f"base {learned.start.base!r} is not declared")

    def entries(self) -> Iterator[tuple[str, str, Entry]]:
        """(owner, tensor name, entry) of every entry, shared ones first."""
        for name, entry in self.tensors.items():
            yield SHARED, name, entry
        for member in self.members:
            for name, own in member.tensors.items():
                if own.entry is not None:
                    yield member.name, name, own.entry

    def member(self, name: str | None = None) -> Member:
        """The member of that name; the only one if ``name`` is None. Raises KeyError."""
        if name is None and len(self.members) == 1:
            return self.members[0]
        return next(m for m in self.members if m.name == name)

    def source_facts(self, name: str, entry: Entry) -> dict[str, Any]:
        """What an entry of that name is made from, the same in every file that makes the same:
        the stream written out, a base by its identity."""
        found = entry.source.to_json()
        if isinstance(entry.source, RandomSource):
            found["stream"] = name if entry.source.stream is None else entry.source.stream
        if isinstance(entry.source, BaseSource):
            found["base"] = self.bases[entry.source.base].identity
        return found

    def input_of(self, member: Member) -> InputSpec | None:
        """What the member expects to see."""
        return member.input or self.input

    def model_of(self, member: Member) -> ModelSpec | None:
        """The architecture, for the member's classes."""
        if self.model is None or member.head is None:
            return self.model
        if self.model.args.get("num_classes") == member.head.classes:
            return self.model
        args = {**self.model.args, "num_classes": member.head.classes}
        return self.model.model_copy(update={"args": args})

    def seen_by(self, member: Member) -> Recipe:
        """The recipe with the member's own architecture and input for all."""
        return self.model_copy(
            update={"model": self.model_of(member), "input": self.input_of(member)}
        )

    def tensor_names(self, member: Member) -> list[str]:
        """Names of the member's finished tensors, sorted."""
        return sorted({*self.tensors, *member.tensors})

    def resolved(self, member: Member, name: str) -> Entry:
        """The whole sentence for one tensor of one member: shared overlays, then its own."""
        own = member.tensors.get(name)
        if own is None:
            return self.tensors[name]
        if own.entry is not None:
            return own.entry
        shared = self.tensors[name]
        return shared.model_copy(
            update={"overlays": shared.overlays + own.overlays, "digest": own.digest}
        )

    def with_member(self, member: Member) -> Recipe:
        """A copy in which ``member`` takes the place of the member of the same name."""
        members = tuple(member if m.name == member.name else m for m in self.members)
        return self.model_copy(update={"members": members})
