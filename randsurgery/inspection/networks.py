"""One network of a file, opened for inspection: what its header says, and its tensors one by one.

The network is a member of a file of ours, or any other safetensors file. Bases are opened when a
tensor is asked for that cannot be had without them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randsurgery.errors import IncompatibleError, UsageError, near
from randsurgery.format.canonical import canonical_json
from randsurgery.format.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from randsurgery.format.container import Container
from randsurgery.format.derivation import Derivation, derivation
from randsurgery.format.masks import Mask
from randsurgery.format.rebuild import kept
from randsurgery.format.recipe import (
    BaseRef,
    BaseSource,
    Entry,
    MaskOverlay,
    Member,
    Recipe,
    ReplaceOverlay,
    ScatterOverlay,
    StoredSource,
)
from randsurgery.format.shards import is_index, open_shards
from randsurgery.format.tensors import RawTensor
from randsurgery.inspection.headers import naming

Kind = tuple[str, tuple[int, ...]]
"""(dtype, shape)"""


FindBase = Callable[[str, str | None, Iterable[BaseRef]], Any]
"""(file, the base that was given, what the file builds on) -> what ``read_checkpoint`` takes."""


class OpenFile:
    """A file of ours: its checkpoint without bases, and with them when they are needed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.base: str | os.PathLike[str] | None = None
        self.find: FindBase | None = None
        self.checkpoint = read_checkpoint(path, need_bases=False)
        self._based: Checkpoint | IncompatibleError | None = None

    def based(self) -> Checkpoint:
        """The checkpoint with its bases. Raises IncompatibleError if one is not to be had; no
        base is read twice to find that out."""
        if self._based is None:
            try:
                given: Any = self.base
                if self.find is not None:
                    base = None if given is None else str(given)
                    given = self.find(str(self.path), base, self.checkpoint.recipe.bases.values())
                self._based = read_checkpoint(self.path, base=given, spare_bases=True)
            except IncompatibleError as error:
                self._based = error
        if isinstance(self._based, IncompatibleError):
            raise self._based
        return self._based

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each payload."""
        file = self.checkpoint.payloads
        assert isinstance(file, Container)
        return {name: info.stop - info.start for name, info in file.infos.items()}

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()
        if isinstance(self._based, Checkpoint):
            self._based.close()


@dataclass(frozen=True)
class Dense:
    """A file of another program: the dtypes and shapes it tells, and who reads a tensor."""

    kinds: Mapping[str, Kind]
    read: Callable[[str], RawTensor]

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self.kinds)

    def kind(self, name: str) -> Kind:
        """The tensor's dtype and shape."""
        return self.kinds[name]

    def sure(self, name: str) -> set[bytes]:
        """The header says nothing of a tensor's bits."""
        return set()

    def tensor(self, name: str) -> RawTensor:
        """The tensor."""
        return self.read(name)

    def kept(self, name: str) -> Mask | None:
        """No mask."""
        return None


@dataclass(frozen=True)
class Ours:
    """A member of a file of ours."""

    opened: OpenFile
    member: Member

    @property
    def recipe(self) -> Recipe:
        """The file's recipe."""
        return self.opened.checkpoint.recipe

    @property
    def names(self) -> list[str]:
        """Names of the finished tensors."""
        return self.recipe.tensor_names(self.member)

    def entry(self, name: str) -> Entry:
        """The whole sentence of a tensor."""
        return self.recipe.resolved(self.member, name)

    def kind(self, name: str) -> Kind:
        """The tensor's dtype and shape."""
        entry = self.entry(name)
        return entry.dtype, entry.shape

    def sure(self, name: str) -> set[bytes]:
        """What the header says that fixes every bit of a tensor of this dtype and shape: two
        tensors that have one of these in common are equal."""
        entry = self.entry(name)
        found = {canonical_json(self._words(name))}
        if entry.digest is not None:
            found.add(f"finished {entry.digest}".encode())
        if entry.in_one_payload:
            last = entry.overlays[-1] if entry.overlays else entry.source
            assert isinstance(last, (ReplaceOverlay, StoredSource))
            found.add(f"bytes {last.digest}".encode())
        return found

    def derivation(self, name: str) -> Derivation:
        """What makes the tensor, as far as it leaves a trace."""
        return derivation(self.recipe, self.member, name).needed()

    def _words(self, name: str) -> list[Any]:
        """Source and overlays; bases by identity, streams by name."""
        made = self.derivation(name)
        source = None if made.replaced else self.recipe.source_facts(name, made.entry)
        return [source, [overlay.to_json() for overlay in made.overlays]]

    def _checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint, with its bases if the tensor builds on one."""
        made = self.derivation(name)
        based = isinstance(made.source, BaseSource) and not made.replaced
        return self.opened.based() if based else self.opened.checkpoint

    def tensor(self, name: str) -> RawTensor:
        """The finished tensor. Raises FileFormatError or IncompatibleError."""
        with naming(self.opened.path):
            return self._checkpoint(name).rebuild(self.member, name)

    def is_masked(self, name: str) -> bool:
        """True if a mask says where the tensor is zero: a mask overlay, or values scattered over
        zeros. Values scattered over others are a change, not a mask."""
        made = self.derivation(name)
        kinds = {type(mask) for _, mask in made.masks}
        return MaskOverlay in kinds or (ScatterOverlay in kinds and made.from_zero)

    @property
    def masked(self) -> list[str]:
        """Names of the tensors that a mask lies over."""
        return [name for name in self.names if self.is_masked(name)]

    def kept(self, name: str) -> Mask | None:
        """The positions that masks leave, scatters fill and slices overwrite; None without a mask.

        Only payloads of masks are read. Raises FileFormatError.
        """
        if not self.is_masked(name):
            return None
        with naming(self.opened.path):
            return kept(self.derivation(name), self.opened.checkpoint.payloads)

    def before_masks(self, name: str) -> RawTensor | None:
        """The tensor as it is before its first mask; None if that is a constant 0."""
        made = self.derivation(name)
        if made.from_zero:
            return None
        first, _ = made.masks[0]
        return self._checkpoint(name).made(made.before(first))

    def masks_alone(self, name: str) -> bool:
        """True if nothing but masks follows the first mask, so that what is kept is what was."""
        kinds = [isinstance(overlay, MaskOverlay) for overlay in self.derivation(name).overlays]
        return True in kinds and all(kinds[kinds.index(True) :])


Network = Dense | Ours


def give_base(
    files: Sequence[OpenFile],
    base: str | os.PathLike[str] | None,
    find: FindBase | None = None,
) -> None:
    """The base checkpoint, and who reads it, to the files that build on one. Raises UsageError if
    none does."""
    based = [file for file in files if file.checkpoint.recipe.bases]
    if base is not None and not based:
        raise UsageError(f"no file builds on a base; leave {base} out")
    for file in based:
        file.base, file.find = base, find


def open_network(
    path: str | os.PathLike[str],
    member: str | None,
    option: str,
    stack: contextlib.ExitStack,
    tensors: Mapping[str, RawTensor] | None = None,
) -> Network:
    """The only member of a file, the named one, or a file of another program, sharded or not;
    ``tensors``: what a file of another format holds; ``stack`` closes what was opened.

    Raises UsageError, naming ``option``, if it must be named or there is none of that name.
    """
    file = Path(path).name
    dense: Dense | None = None
    if tensors is not None:
        dense = Dense({n: (t.dtype, t.shape) for n, t in tensors.items()}, tensors.__getitem__)
    elif is_index(path):
        dense = _in_files(open_shards(Path(path), stack))
    else:
        container = stack.enter_context(Container(path))
        if not is_checkpoint(container):
            dense = _in_files(dict.fromkeys(container.infos, container))
    if dense is not None:
        if member is not None:
            raise UsageError(f"{file} is not of randsurgery and has no members; leave {option} out")
        return dense
    opened = stack.enter_context(OpenFile(path))
    names = [one.name for one in opened.checkpoint.recipe.members]
    if member is None and len(names) > 1:
        raise UsageError(
            f"{file} has {len(names)} members ({', '.join(names)}); name one with {option}"
        )
    if member is not None and member not in names:
        hint = near(member, names) or f"; members: {', '.join(names)}"
        raise UsageError(f"{option}: {file} has no member {member!r}{hint}")
    return Ours(opened, opened.checkpoint.member(member))


def _in_files(files: Mapping[str, Container]) -> Dense:
    """Tensors by the file that each lies in."""
    infos = {name: file.infos[name] for name, file in files.items()}
    kinds = {name: (info.dtype, info.shape) for name, info in infos.items()}
    return Dense(kinds, lambda name: files[name].read(name))
