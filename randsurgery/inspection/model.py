"""The network in a file, layer by layer, from its header alone.

Layers are listed in the order that their names suggest: no file records the one in which a network
runs through them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from randsurgery.errors import UsageError, near
from randsurgery.format.fields import as_given
from randsurgery.format.recipe import Member, Recipe
from randsurgery.format.specs import DatasetSpec, HeadSpec, InputSpec
from randsurgery.format.tensors import RawTensor
from randsurgery.inspection.grouping import fitting_depth, grouped, natural
from randsurgery.inspection.headers import Header, header_of, header_of_recipe, read_header
from randsurgery.inspection.layers import (
    Layer,
    TensorView,
    foreign_tensors,
    layer_from,
    layer_of,
    masked,
    tensor_view,
    total,
)


@dataclass(frozen=True)
class MemberView:
    """What a member says of itself."""

    name: str
    head: dict[str, Any] | None
    input: dict[str, Any] | None
    classes: tuple[str, ...] | None
    dataset: dict[str, Any] | None
    temperature: float | None
    learned: int | None
    masked: int  # of those learned, weights that a mask was learned for
    planned: bool
    provenance: dict[str, Any]


@dataclass(frozen=True)
class ModelReport:
    """A network. ``member``: whose tensors these are; None for what several members share, or a
    file of others. ``learned`` of its layers means nothing there."""

    file: str
    kind: str
    bytes: int
    header_bytes: int
    parts: int
    architecture: str | None
    arguments: dict[str, Any]
    member: str | None
    members: tuple[MemberView, ...]
    bases: dict[str, dict[str, Any]]
    backbone_id: str | None
    metadata: dict[str, str]
    tensors: tuple[TensorView, ...]

    @property
    def parameters(self) -> int:
        """Elements of all tensors that are no buffers."""
        return sum(tensor.size for tensor in self.tensors if not tensor.buffer)

    @property
    def buffers(self) -> int:
        """Elements of running statistics and the like."""
        return sum(tensor.size for tensor in self.tensors if tensor.buffer)

    @property
    def learned(self) -> int | None:
        """Learned parameters; None if the header does not tell, or if there is no one member."""
        return None if self.member is None else total(tensor.learned for tensor in self.tensors)

    @property
    def masked(self) -> int:
        """Of these, weights that a mask was learned for."""
        return masked(self.tensors)

    @property
    def shown(self) -> MemberView | None:
        """The member whose tensors these are."""
        return next((m for m in self.members if m.name == self.member), None)

    def layers(self, depth: int = 0) -> list[Layer]:
        """The layers, or with ``depth`` blocks: all whose names agree in so many parts."""
        view = self.shown or next(iter(self.members), None)
        head = str(view.head["name"]) if view is not None and view.head else None
        blocks = grouped(self.tensors, lambda tensor: layer_of(tensor.name), depth, head)
        return [layer_from(name, tensors) for name, tensors in blocks.items()]

    def fitting_depth(self) -> int:
        """How deep to look at a glance."""
        return fitting_depth(layer_of(tensor.name) for tensor in self.tensors)

    def to_json(self, depth: int = 0) -> dict[str, Any]:
        """Plain values: the layers in place of the tensors."""
        found = asdict(self)
        del found["tensors"]
        counts = {
            "tensors": len(self.tensors),
            "parameters": self.parameters,
            "buffers": self.buffers,
            "learned": self.learned,
            "masked": self.masked,
        }
        one = self.member is not None
        rows = [asdict(layer) for layer in self.layers(depth)]
        rows = rows if one else [{**row, "learned": None} for row in rows]
        return {**found, **counts, "depth": depth, "layers": rows}


def inspect_model(
    path: str | os.PathLike[str],
    member: str | None = None,
    tensors: Mapping[str, RawTensor] | None = None,
    recipe: Recipe | None = None,
) -> ModelReport:
    """Report on the network in a file of randsurgery, or in any safetensors file.

    ``member``: which network, if the file has several; without it, what they share. ``tensors``:
    what a file of another format holds, read by whoever can. ``recipe``: a network that is in no
    file; ``path`` is its name. Raises FileFormatError, and UsageError for a member that is not
    there.
    """
    if recipe is not None:
        header = header_of_recipe(str(path), recipe)
    else:
        header = read_header(path) if tensors is None else header_of(path, tensors)
    recipe = header.recipe
    if recipe is None:
        if member is not None:
            raise UsageError(f"{header.file} is not a file of randsurgery: it has no members")
        return _report(header, None, foreign_tensors(header.infos))
    names = [m.name for m in recipe.members]
    if member is not None and member not in names:
        known = near(member, names) or f"; members: {', '.join(names[:8])}"
        raise UsageError(f"the file has no member {member!r}{known}")
    if member is None and len(names) > 1:
        views = [tensor_view(recipe, Member(), name, None) for name in recipe.tensors]
        return _report(header, None, views)
    who = recipe.member(member)
    views = [tensor_view(recipe, who, name, who) for name in recipe.tensor_names(who)]
    return _report(header, who.name, views)


def _report(header: Header, member: str | None, tensors: Iterable[TensorView]) -> ModelReport:
    recipe = header.recipe
    members = () if recipe is None else tuple(_member(recipe, m) for m in recipe.members)
    who = None if recipe is None or member is None else recipe.member(member)
    model = None if recipe is None else recipe.model if who is None else recipe.model_of(who)
    return ModelReport(
        file=header.file,
        kind=header.kind,
        bytes=header.bytes,
        header_bytes=header.header_bytes,
        parts=header.parts,
        architecture=None if model is None else model.name,
        arguments={} if model is None else {k: as_given(v) for k, v in model.args.items()},
        member=member,
        members=members,
        bases={} if recipe is None else {key: ref.to_json() for key, ref in recipe.bases.items()},
        backbone_id=None if recipe is None else recipe.backbone_id,
        metadata={} if recipe is not None else dict(header.metadata),
        tensors=tuple(sorted(tensors, key=lambda tensor: natural(tensor.name))),
    )


def _member(recipe: Recipe, member: Member) -> MemberView:
    own = [tensor_view(recipe, member, name, member) for name in recipe.tensor_names(member)]
    return MemberView(
        name=member.name,
        head=None if member.head is None else _head(member.head),
        input=None if (found := recipe.input_of(member)) is None else _input(found),
        classes=member.classes,
        dataset=None if member.dataset is None else _dataset(member.dataset),
        temperature=None
        if member.calibration is None
        else float.fromhex(member.calibration.temperature),
        learned=total(tensor.learned for tensor in own),
        masked=masked(own),
        planned=member.plan is not None,
        provenance=member.provenance,
    )


def _head(head: HeadSpec) -> dict[str, Any]:
    return {"name": head.name, "kind": head.kind, "classes": head.classes}


def _dataset(found: DatasetSpec) -> dict[str, Any]:
    return {"name": found.name, "train_split": found.train_split, "test_split": found.test_split}


def _input(found: InputSpec) -> dict[str, Any]:
    """As the recipe has it, hexadecimal numbers as numbers."""
    return {
        "size": list(found.size),
        "channels": found.channels,
        "mean": [float.fromhex(value) for value in found.mean],
        "std": [float.fromhex(value) for value in found.std],
        "interpolation": found.interpolation,
        "crop": float.fromhex(found.crop),
        "crop_mode": found.crop_mode,
    }
