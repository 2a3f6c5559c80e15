"""A recipe with its payloads and bases: opened, read, rebuilt."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from randsurgery.errors import FileFormatError, IncompatibleError, UsageError, near
from randsurgery.format.canonical import canonical_json, strict_json
from randsurgery.format.container import Container
from randsurgery.format.derivation import (
    SCORES,
    Derivation,
    derivation,
    needed_bases,
    payload_name,
    payload_names,
)
from randsurgery.format.generator import F32Array
from randsurgery.format.rebuild import Payloads, check_affordable, read_payload, rebuild
from randsurgery.format.recipe import (
    FORMAT,
    VERSION,
    BaseSource,
    Entry,
    Member,
    RandomSource,
    Recipe,
)
from randsurgery.format.tensors import DTYPES, RawTensor, claimed_bytes

METADATA_KEY = "randsurgery"
LINE = 16
"""float32 elements in a cache line."""
T = TypeVar("T")


class Memory(dict[str, RawTensor]):
    """Payloads, or a base's tensors, held in memory."""

    def read(self, name: str) -> RawTensor:
        """The tensor of that name, read-only: overlays copy it before they change it."""
        tensor = self[name]
        array = tensor.array.view()
        array.flags.writeable = False
        return RawTensor(tensor.dtype, array)


@dataclass(frozen=True)
class Checkpoint:
    """A recipe and the payloads it speaks of, in a file or in memory.

    ``bases`` holds the tensors of base checkpoints by base id; each has been checked by identity.
    """

    recipe: Recipe
    payloads: Payloads
    bases: Mapping[str, Payloads] = field(default_factory=dict)
    path: Path | None = None
    opened: tuple[Container, ...] = ()  # files of bases, closed with this one

    def member(self, name: str | None = None) -> Member:
        """The member of that name, or the only one. Raises UsageError naming the members."""
        names = [m.name for m in self.recipe.members]
        if name is None and len(names) > 1:
            raise UsageError(
                f"the file has {len(names)} members ({', '.join(names)}); name one (member=, "
                "--member), or take one out with ensemble extract"
            )
        try:
            return self.recipe.member(name)
        except StopIteration:
            known = near(str(name), names) or f"; members: {', '.join(names)}"
            raise UsageError(f"the file has no member {name!r}{known}") from None

    def tensor(self, name: str, member: str | None = None) -> RawTensor:
        """One finished tensor."""
        return self.rebuild(self.member(member), name)

    def derivation(self, member: Member, name: str) -> Derivation:
        """What makes one tensor of a member."""
        return derivation(self.recipe, member, name)

    def scores(self, name: str, member: str | None = None) -> npt.NDArray[np.float32]:
        """The popup scores of one tensor, in its shape. Raises KeyError if none were kept."""
        who = self.member(member)
        slot, shape = payload_name(who.name, name, SCORES), self.recipe.resolved(who, name).shape
        return read_payload(self.payloads, slot, who.scores[name], dtype="F32", shape=shape)

    def rebuild(self, member: Member, name: str, out: F32Array | None = None) -> RawTensor:
        """One finished tensor; ``out``, shape (size,), is room for a random source."""
        return self.made(self.derivation(member, name), out)

    def made(self, what: Derivation, out: F32Array | None = None) -> RawTensor:
        """What a derivation makes of the payloads and bases; ``out`` as for ``rebuild``."""
        return rebuild(what, self.payloads, self._base_tensor, out)

    def _base_tensor(self, base: str, name: str) -> RawTensor:
        if base not in self.bases:
            raise IncompatibleError(missing_base(self.recipe, base))
        try:
            return self.bases[base].read(name)
        except KeyError:
            raise IncompatibleError(f"base {base!r} has no tensor {name!r}") from None

    def tensors(
        self, member: str | None = None, threads: int | None = None
    ) -> dict[str, RawTensor]:
        """All finished tensors of a member by name, in sorted order.

        Random tensors share one allocation, which is freed when the last of them is. ``threads``
        changes the time alone, never a bit.
        """
        who = self.member(member)
        names = self.recipe.tensor_names(who)
        check_affordable(finished_bytes(self.recipe, who), "the checkpoint")
        room = _arena({name: self.recipe.resolved(who, name) for name in names})
        rebuilt = in_threads(lambda name: self.rebuild(who, name, room.get(name)), names, threads)
        return dict(zip(names, rebuilt, strict=True))

    @property
    def files(self) -> tuple[Container, ...]:
        """The files that closing it closes: its own, if it is in one, and those of its bases."""
        own = (self.payloads,) if isinstance(self.payloads, Container) else ()
        return (*self.opened, *own)

    def close(self) -> None:
        """Close the file, if there is one, and the bases that were opened for it."""
        for file in self.files:
            file.__exit__()

    def in_memory(self) -> Checkpoint:
        """The same without any file: its payloads, and the tensors of bases that it speaks of."""
        payloads = Memory({n: self.payloads.read(n) for n in payload_names(self.recipe)})
        used: list[object] = [entry.source for _, _, entry in self.recipe.entries()]
        for member in self.recipe.members:
            used += [p.start for p in (member.plan.tensors if member.plan else {}).values()]
        bases: dict[str, Memory] = {key: Memory() for key in self.bases}
        for source in used:
            if isinstance(source, BaseSource) and source.base in self.bases:
                tensor = self._base_tensor(source.base, source.tensor)
                bases[source.base][source.tensor] = tensor
        return Checkpoint(self.recipe, payloads, bases)

    def __reduce__(self) -> tuple[Any, ...]:
        # copies and pickles take the values along: an open file can be neither
        alone = self.in_memory()
        return Checkpoint, (alone.recipe, alone.payloads, alone.bases)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _arena(entries: Mapping[str, Entry]) -> dict[str, F32Array]:
    """Room for the F32 random tensors, cut from one allocation, each part on a cache line.

    One large allocation gets large pages, of which the system hands out and clears hundreds, not
    tens of thousands.
    """
    drawn = {
        name: entry.size
        for name, entry in entries.items()
        if entry.dtype == "F32" and isinstance(entry.source, RandomSource)
    }
    arena = np.empty(sum(size + LINE for size in drawn.values()), dtype=np.float32)
    at = -(arena.ctypes.data // 4) % LINE
    room: dict[str, F32Array] = {}
    for name, size in drawn.items():
        room[name] = arena[at : at + size]
        at += -(-size // LINE) * LINE
    return room


def in_threads(
    work: Callable[[str], T], names: Iterable[str], threads: int | None = None
) -> Iterator[T]:
    """``map`` on a few threads; NumPy and zlib release the interpreter while they work."""
    todo = list(names)
    done: list[T | None] = [None] * len(todo)
    queue = iter(range(len(todo)))

    def worker() -> None:
        for index in queue:  # shared: each index goes to one worker
            done[index] = work(todo[index])

    count = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        for finished in [pool.submit(worker) for _ in range(count)]:
            finished.result()
    yield from cast(list[T], done)


def finished_bytes(recipe: Recipe, member: Member) -> int:
    """Bytes of all finished tensors of one member, from shapes alone."""
    entries = (recipe.resolved(member, name) for name in recipe.tensor_names(member))
    return sum(claimed_bytes(entry.dtype, entry.shape) for entry in entries)


def missing_base(recipe: Recipe, base: str) -> str:
    """The message for a base that was not found."""
    ref = recipe.bases[base]
    origin = f" {ref.origin}" if ref.origin else ""
    revision = f" at {ref.revision}" if ref.revision else ""
    beside = f"put {ref.file} beside the file or " if ref.file else ""
    return f"the base{origin}{revision} ({ref.identity}) is needed; {beside}pass --base FILE"


def identity(names: Iterable[str], tensors: Payloads) -> str:
    """A base's identity: digest over its tensors by sorted name, each the canonical JSON array
    [name, dtype, shape], a zero byte, and the bytes."""
    sha = hashlib.sha256()
    for name in sorted(names):
        tensor = tensors.read(name)
        sha.update(canonical_json([name, tensor.dtype, list(tensor.shape)]) + b"\0")
        sha.update(tensor.array.reshape(-1).view("u1").data)
    return sha.hexdigest()[:32]


# --- reading -------------------------------------------------------------------------------------


def parse_recipe(text: str, name: str) -> Recipe:
    """The recipe in a file's metadata. Raises FileFormatError with the first fault."""
    try:
        value = strict_json(text)
    except ValueError as error:
        raise FileFormatError(f"{name}: the recipe is not valid JSON ({error})") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FileFormatError(f"{name}: the recipe is not a JSON object with format {FORMAT!r}")
    version = value.get("version")
    if type(version) is not int or version != VERSION:
        raise FileFormatError(
            f"{name}: format version {version!r}, this release reads {VERSION}; read it with the "
            "release that wrote it"
        )
    try:
        # strict JSON mode: arrays become tuples, nothing else is converted
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(
            f"{name}: the recipe is invalid at {where!r}: {first['msg']}"
        ) from None


def is_checkpoint(container: Container) -> bool:
    """True for a file of this format, False for any other safetensors file."""
    return METADATA_KEY in container.metadata


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """True if the name says so. Other dense files need torch to be read, and are given as such."""
    return Path(path).suffix == ".safetensors"


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    base: Payloads | str | os.PathLike[str] | None = None,
    need_bases: bool = True,
    spare_bases: bool = False,
) -> Checkpoint:
    """Open a file of this format; only the header is read until a tensor is asked for.

    ``base`` is the base checkpoint (a safetensors path or its tensors); without it a base is
    looked for beside the file under its recorded name. With ``need_bases`` false, bases are left
    out, for readers that want the recipe only; with ``spare_bases``, one may be missing of which no
    value is left in any member, for readers that change nothing. Raises FileFormatError or
    IncompatibleError.
    """
    container = Container(path)
    try:
        name = container.path.name
        if not is_checkpoint(container):
            raise FileFormatError(
                f"{name}: a safetensors file, but not one of randsurgery; "
                "pass it as --checkpoint with an architecture"
            )
        recipe = parse_recipe(container.metadata[METADATA_KEY], name)
        for key, info in container.infos.items():
            if info.dtype not in DTYPES:
                raise FileFormatError(
                    f"{name}: {key!r} has dtype {info.dtype}, not one of {', '.join(DTYPES)}"
                )
        needed = set(payload_names(recipe))
        if missing := sorted(needed - set(container.infos)):
            raise FileFormatError(f"{name}: payload {missing[0]!r} is missing")
        if foreign := sorted(set(container.infos) - needed):
            raise FileFormatError(f"{name}: tensor {foreign[0]!r} belongs to no part of the recipe")
        with contextlib.ExitStack() as stack:
            bases: dict[str, Payloads] = {}
            opened: list[Container] = []
            if need_bases:
                spare = recipe.bases.keys() - needed_bases(recipe) if spare_bases else ()
                bases, opened = _find_bases(recipe, container.path, base, stack, spare)
            stack.pop_all()
        return Checkpoint(recipe, container, bases, container.path, tuple(opened))
    except BaseException:
        container.__exit__()
        raise


def _find_bases(
    recipe: Recipe,
    path: Path,
    given: Payloads | str | os.PathLike[str] | None,
    stack: contextlib.ExitStack,
    spare: Collection[str],
) -> tuple[dict[str, Payloads], list[Container]]:
    """Each base by its id, and the files opened for them, which ``stack`` closes on failure. Those
    of ``spare`` may be missing."""
    opened: list[Container] = []
    known: dict[str | None, tuple[Payloads, str]] = {}  # by file name; None is the given one

    def look(file: str | None, where: Payloads | str | os.PathLike[str]) -> tuple[Payloads, str]:
        if file not in known:
            if isinstance(where, (str, os.PathLike)):
                where = stack.enter_context(Container(where))
                opened.append(where)
            known[file] = where, identity(_names(where), where)
        return known[file]

    found: dict[str, Payloads] = {}
    for key, ref in recipe.bases.items():
        candidates = [] if given is None else [look(None, given)]
        beside = path.parent / ref.file if ref.file and is_safetensors(ref.file) else None
        wanting = ref.identity not in (actual for _, actual in candidates)
        if wanting and beside is not None and os.path.isfile(beside):
            candidates.append(look(ref.file, beside))
        if not candidates and key in spare:
            continue
        if not candidates:
            raise IncompatibleError(f"{path.name}: {missing_base(recipe, key)}")
        fitting = [tensors for tensors, actual in candidates if actual == ref.identity]
        if not fitting:
            tensors, actual = candidates[0]
            where = tensors.path if isinstance(tensors, Container) else "the given base"
            raise IncompatibleError(_other_base(recipe, path, where, actual, ref.identity))
        found[key] = fitting[0]
    if given is not None:
        _check_used(recipe, path, *look(None, given))
    return found, opened


def _check_used(recipe: Recipe, path: Path, given: Payloads, actual: str) -> None:
    """A base that was given is one that the file builds on, also where the right one lies beside
    the file. Raises IncompatibleError."""
    wanted = {ref.identity for ref in recipe.bases.values()}
    where = given.path if isinstance(given, Container) else "the given base"
    if not wanted:
        raise IncompatibleError(f"{path.name} builds on no base; leave {where} out")
    if actual not in wanted:
        raise IncompatibleError(_other_base(recipe, path, where, actual, sorted(wanted)[0]))


def _other_base(recipe: Recipe, path: Path, where: object, actual: str, wanted: str) -> str:
    origin = next(ref.origin for ref in recipe.bases.values() if ref.identity == wanted)
    return (
        f"{where} is another base: its identity is {actual}, {path.name} was made on {wanted}"
        + (f" ({origin})" if origin else "")
    )


def _names(tensors: Payloads) -> Iterable[str]:
    if isinstance(tensors, Container):
        return tensors.infos
    return tensors.keys() if isinstance(tensors, Mapping) else ()
