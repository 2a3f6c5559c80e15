"""What a file says of its tensors before one of them is read: files of randsurgery, any other
safetensors file, sharded ones by their index, and tensors that another program's file held."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from randsurgery.errors import FileFormatError
from randsurgery.format.canonical import canonical_json
from randsurgery.format.checkpoint import METADATA_KEY, is_checkpoint, parse_recipe
from randsurgery.format.container import Container, TensorInfo
from randsurgery.format.derivation import payload_names
from randsurgery.format.recipe import BaseRef, Member, Recipe
from randsurgery.format.shards import bytes_behind, is_index, open_shards
from randsurgery.format.tensors import RawTensor, byte_count

Kind = Literal["randsurgery", "safetensors", "sharded safetensors", "torch.save", "architecture"]


@dataclass(frozen=True)
class MemberBytes:
    """One member. ``bytes``: what it adds to the file, its payloads and what the header says of
    it; ``payload_bytes``: the former alone; ``dense_bytes``: its network stored whole."""

    name: str
    bytes: int
    payload_bytes: int
    dense_bytes: int
    tensors: int

    @property
    def header_bytes(self) -> int:
        """What the header says of it."""
        return self.bytes - self.payload_bytes


@dataclass(frozen=True)
class Header:
    """A file without its tensors. ``file``: its bare name; ``bytes``: of all its parts, of which
    ``header_bytes`` are no tensor's. ``recipe``: of a file of randsurgery."""

    file: str
    kind: Kind
    bytes: int
    header_bytes: int
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    recipe: Recipe | None = None
    parts: int = 1


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file, or those of all parts of a ``.safetensors.index.json``.

    Raises FileFormatError.
    """
    if is_index(path):
        return _sharded(Path(path))
    with Container(path) as file:
        recipe = None
        if is_checkpoint(file):
            recipe = parse_recipe(file.metadata[METADATA_KEY], file.path.name)
            if missing := sorted(set(payload_names(recipe)) - set(file.infos)):
                raise FileFormatError(f"{file.path.name}: payload {missing[0]!r} is missing")
        return Header(
            file=file.path.name,
            kind="safetensors" if recipe is None else "randsurgery",
            bytes=file.size,
            header_bytes=file.header_bytes,
            infos=file.infos,
            metadata=file.metadata,
            recipe=recipe,
        )


def bases_of(path: str | os.PathLike[str]) -> dict[str, BaseRef] | None:
    """The bases that a file builds on, by the keys it gives them; None for a sound safetensors file
    that is not one of randsurgery. Raises FileFormatError."""
    with Container(path) as file:
        if not is_checkpoint(file):
            return None
        return dict(parse_recipe(file.metadata[METADATA_KEY], file.path.name).bases)


def header_of(path: str | os.PathLike[str], tensors: Mapping[str, RawTensor]) -> Header:
    """The same of a file whose tensors were read already, as those of ``torch.save`` must be."""
    infos, at = {}, 0
    for name, tensor in tensors.items():
        infos[name] = TensorInfo(tensor.dtype, tensor.shape, at, at + tensor.nbytes)
        at += tensor.nbytes
    size = bytes_behind(path)
    return Header(Path(path).name, "torch.save", size, max(0, size - at), infos, {})


def header_of_recipe(name: str, recipe: Recipe) -> Header:
    """The same of a network that no file has been written of."""
    return Header(name, "architecture", 0, 0, {}, {}, recipe, 0)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """What is wrong with a payload is said of its file, of which a command may have several."""
    try:
        yield
    except FileFormatError as error:
        file = Path(path).name if path else ""
        if not file or str(error).startswith(file):
            raise
        raise FileFormatError(f"{file}: {error}") from None


def looks_like_safetensors(path: str | os.PathLike[str]) -> bool:
    """True if the file says so by its name, or begins as one whatever it is called."""
    if Path(path).suffix == ".safetensors":
        return True
    try:
        with Path(path).open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start[8:] == b"{" and start[:4] != b"PK\x03\x04"


def _sharded(path: Path) -> Header:
    """All parts that an index names."""
    with contextlib.ExitStack() as stack:
        found = open_shards(path, stack)
        parts = {file.path: file for file in found.values()}.values()
        index = path.stat().st_size
        return Header(
            path.name,
            "sharded safetensors",
            index + sum(part.size for part in parts),
            index + sum(part.header_bytes for part in parts),
            {name: info for part in parts for name, info in part.infos.items()},
            {},
            None,
            len(parts),
        )


def member_bytes(recipe: Recipe, member: Member, infos: Mapping[str, TensorInfo]) -> MemberBytes:
    """What a member takes of a file with these payloads."""
    names = list(payload_names(recipe, member.name))
    payload = sum(infos[name].stop - infos[name].start for name in names)
    entries = (recipe.resolved(member, name) for name in recipe.tensor_names(member))
    return MemberBytes(
        name=member.name,
        bytes=payload + _header_text(member, names, infos),
        payload_bytes=payload,
        dense_bytes=sum(byte_count(entry.dtype, entry.shape) for entry in entries),
        tensors=len(member.tensors),
    )


def _header_text(member: Member, names: list[str], infos: Mapping[str, TensorInfo]) -> int:
    """Bytes that a member takes in the header: its part of the recipe, which is a string there,
    and its payloads' entries."""
    recipe = json.dumps(canonical_json(member.to_json()).decode("ascii"))
    entries = 0
    for name in names:
        info = infos[name]
        about = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.start, info.stop]}
        entries += len(json.dumps({name: about}, separators=(",", ":"))) - 1
    return len(recipe) - 1 + entries
