"""Where a file's bytes go: tensor by tensor, by what makes it, and against a dense file."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from randsurgery.format.checkpoint import METADATA_KEY, parse_recipe, step_payloads
from randsurgery.format.container import Container
from randsurgery.format.rebuild import payload_name, sentence
from randsurgery.format.recipe import Member, Recipe
from randsurgery.format.tensors import byte_count


@dataclass(frozen=True)
class TensorStorage:
    """One tensor of one member. ``bytes`` are its payloads', shared ones counted once."""

    member: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    overlays: tuple[str, ...]
    bytes: int
    dense_bytes: int

    @property
    def made_of(self) -> str:
        """The sentence in short: ``random + mask``."""
        return " + ".join((self.source, *self.overlays))


@dataclass(frozen=True)
class StorageReport:
    """A file's bytes. ``dense_bytes`` is what its tensors take stored whole, each member's own."""

    file: str
    bytes: int
    dense_bytes: int
    header_bytes: int
    score_bytes: int
    tensors: tuple[TensorStorage, ...]

    @property
    def ratio(self) -> float:
        """Dense bytes over bytes."""
        return self.dense_bytes / max(1, self.bytes)

    def groups(self) -> list[tuple[str, int, int, int]]:
        """(what makes them, tensors, bytes, dense bytes), largest dense part first."""
        found: dict[str, list[int]] = {}
        for tensor in self.tensors:
            row = found.setdefault(tensor.made_of, [0, 0, 0])
            row[0] += 1
            row[1] += tensor.bytes
            row[2] += tensor.dense_bytes
        rows = [(name, row[0], row[1], row[2]) for name, row in found.items()]
        return sorted(rows, key=lambda row: (-row[3], row[0]))

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``ratio``."""
        return {**asdict(self), "ratio": self.ratio}


def storage(path: str | os.PathLike[str]) -> StorageReport:
    """Report on any safetensors file from its header alone. Raises FileFormatError."""
    with Container(path) as file:
        sizes = {name: info.stop - info.start for name, info in file.infos.items()}
        if METADATA_KEY in file.metadata:
            recipe = parse_recipe(file.metadata[METADATA_KEY], file.path.name)
            rows, scores = _recipe_rows(recipe, sizes)
        else:
            rows, scores = _foreign_rows(file), 0
        return StorageReport(
            file=file.path.name,
            bytes=file.size,
            dense_bytes=sum(row.dense_bytes for row in rows),
            header_bytes=file.header_bytes,
            score_bytes=scores,
            tensors=tuple(rows),
        )


def _foreign_rows(file: Container) -> list[TensorStorage]:
    return [
        TensorStorage(
            "", name, info.dtype, info.shape, "stored", (), info.stop - info.start,
            info.stop - info.start,
        )
        for name, info in sorted(file.infos.items())
    ]  # fmt: skip


def _recipe_rows(recipe: Recipe, sizes: dict[str, int]) -> tuple[list[TensorStorage], int]:
    rows, scores, counted = [], 0, set[str]()
    for member in recipe.members:
        for name in recipe.tensor_names(member):
            rows.append(_row(recipe, member, name, sizes, counted))
        scores += sum(sizes.get(payload_name(member.name, n, "scores"), 0) for n in member.scores)
    return rows, scores


def _row(
    recipe: Recipe, member: Member, name: str, sizes: dict[str, int], counted: set[str]
) -> TensorStorage:
    owner, entry, steps = sentence(recipe, member, name)
    slots = {payload_name(owner, name, "source")}
    for who, index, overlay in steps:
        slots |= set(step_payloads(name, who, index, overlay))
    fresh = (slots & set(sizes)) - counted
    counted |= fresh
    return TensorStorage(
        member=member.name,
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        source=entry.source.kind,
        overlays=tuple(overlay.kind for _, _, overlay in steps),
        bytes=sum(sizes[p] for p in fresh),
        dense_bytes=byte_count(entry.dtype, entry.shape),
    )
