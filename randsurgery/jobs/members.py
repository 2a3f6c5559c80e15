"""``ensemble build FILE ...``, ``add``, ``remove``, ``extract``: members moved between files.

No payload is encoded again, and what is written is held against the digests that were recorded
before, so that no member changes by a bit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from randsurgery.errors import FileFormatError, IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint, is_safetensors, read_checkpoint
from randsurgery.format.container import check_network
from randsurgery.format.fields import SHARED
from randsurgery.format.members import check_names, first_fault, pick, renamed, with_own
from randsurgery.format.shards import check_not_input, read_behind
from randsurgery.format.specs import ModelSpec
from randsurgery.format.writing import finish, write_checkpoint
from randsurgery.jobs.convert import ConvertPlan, converted
from randsurgery.jobs.hub import PREFIX, holds_checkpoint, local_file
from randsurgery.surgery.architectures import ArgValue, arguments_of
from randsurgery.surgery.bases import open_checkpoint
from randsurgery.surgery.ensembles import joined

UNNAMED = "main"
"""The name of a file's only member, unless it was given another."""


@dataclass(frozen=True)
class Incoming:
    """Files whose members are to join. base: dense weights that files build on, or that dense files
    were fine-tuned from; those need ``arch`` and its ``args``, and with ``ema`` it is the average
    of their weights that joins. whole: members have nothing in common, and each is kept whole, as
    dense files are without a base. names: of the members in order, instead of their own or their
    files'."""

    files: tuple[str, ...]
    names: tuple[str, ...] = ()
    base: str | None = None
    arch: str | None = None
    ema: bool = False
    whole: bool = False
    args: dict[str, ArgValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A checked change, not yet written. ``moved``: the members that came, went or were taken out;
    ``notes``: what the user is to know. Its checkpoint is to be closed by the caller."""

    checkpoint: Checkpoint
    output: Path
    moved: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """The members that the written file will have."""
        return tuple(member.name for member in self.checkpoint.recipe.members)


def in_place(file: str, output: str | None, *, force: bool) -> Path:
    """Where a file goes that a command changes: ``output``, else where it was. Raises OutputError,
    or UsageError for a file that is not here."""
    if output is None and file.startswith(PREFIX):
        raise UsageError(f"{file} is not on this machine; pass --output")
    if output is None or Path(output).resolve() == Path(file).resolve():
        return check_network(file, force=True)
    return check_network(output, force=force)


def prepare_pack(incoming: Incoming, output: str | None, *, force: bool) -> Change:
    """One file of several files' members. Raises RandsurgeryError; writes nothing."""
    if not incoming.files:
        raise UsageError("no files; name those whose members are to be packed")
    target = check_network(output or "ensemble.safetensors", force=force)
    check_not_input(target, _read_by(incoming))
    notes: list[str] = []
    if incoming.base is None and not any(_is_ours(one) for one in incoming.files):
        if not incoming.whole:
            notes.append(
                "without --base each member is kept whole; with the weights that they were "
                "fine-tuned from, their differences from them"
            )
        incoming = replace(incoming, whole=True)
    with contextlib.ExitStack() as stack:
        parts = _opened(incoming, target, stack, notes)
        found = parts[0]
        for part in parts[1:]:
            found = joined(found, part)
        _check_whole(found)
        stack.pop_all()
    moved = tuple(member.name for member in found.recipe.members)
    return Change(found, target, moved, tuple(notes))


def prepare_add(
    file: str, incoming: Incoming, output: str | None = None, *, force: bool = False
) -> Change:
    """An ensemble with further members, into ``output`` or in place. Raises RandsurgeryError;
    writes nothing."""
    if any(Path(one).resolve() == Path(file).resolve() for one in incoming.files):
        raise UsageError(f"{file} has its members already; name other files to add")
    target = in_place(file, output, force=force)
    check_not_input(target, (*_read_by(incoming), *_bases_of(file)))
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(_open_file(local_file(file), incoming.base))
        model = found.recipe.model
        if model is not None and incoming.arch is None:
            incoming = _for_model(incoming, model)
        incoming = replace(incoming, whole=not found.recipe.tensors)
        before = {member.name for member in found.recipe.members}
        for part in _opened(incoming, target, stack, notes):
            found = joined(found, part)
        _check_whole(found)
        stack.pop_all()
    new = tuple(m.name for m in found.recipe.members if m.name not in before)
    return Change(found, target, new, tuple(notes))


def prepare_remove(
    file: str,
    names: Sequence[str],
    output: str | None = None,
    *,
    base: str | None = None,
    force: bool = False,
) -> Change:
    """An ensemble without those members, into ``output`` or in place. Raises UsageError for an
    unknown member, or if none would be left."""
    target = in_place(file, output, force=force)
    check_not_input(target, _bases_of(file))
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(_open_file(local_file(file), base))
        gone = {found.member(name).name for name in names}
        rest = [m.name for m in found.recipe.members if m.name not in gone]
        if not rest:
            raise UsageError(
                f"{file}: no member would be left; an ensemble has one at least, so delete the file"
            )
        kept = pick(found, rest)
        _check_whole(kept)
        stack.pop_all()
    return Change(kept, target, tuple(sorted(gone)))


def prepare_extract(
    file: str,
    name: str,
    output: str | None = None,
    *,
    base: str | None = None,
    force: bool = False,
) -> Change:
    """One member as a file of its own, with the whole backbone. Raises UsageError for an unknown
    member."""
    path = local_file(file)
    target = check_network(output or f"{Path(path).stem}-{name}.safetensors", force=force)
    check_not_input(target, [path])
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(_open_file(path, base))
        alone = pick(found, [name])
        _check_whole(alone)
        stack.pop_all()
    return Change(alone, target, (name,))


def run_change(change: Change) -> int:
    """Write, re-read and verify the file; returns its bytes. Raises FileFormatError if a tensor
    does not have the digest that was recorded, OutputError; the old file is then untouched."""
    return write_checkpoint(change.output, change.checkpoint, force=True, finished=True)


def _check_whole(checkpoint: Checkpoint) -> None:
    """Raises FileFormatError naming the member, or the shared tensors, whose payload is corrupt."""
    if (found := first_fault(checkpoint)) is not None:
        owner, fault = found
        who = "the backbone" if owner == SHARED else f"member {owner}"
        raise FileFormatError(f"{who} is damaged: {fault}; nothing was written")


def _open_file(path: str, base: str | None) -> Checkpoint:
    """A file of ours, with the base if it builds on one. Its payloads stay in the file."""
    with read_checkpoint(path, need_bases=False) as header:
        builds = bool(header.recipe.bases)
    return open_checkpoint(path, base if builds else None)


def _bases_of(file: str) -> tuple[Path, ...]:
    """What a file builds on, which may not be written over although the file itself may."""
    return read_behind(file)[1:]


def _read_by(incoming: Incoming) -> tuple[str | None, ...]:
    return *incoming.files, incoming.base


def _opened(
    incoming: Incoming, target: Path, stack: contextlib.ExitStack, notes: list[str]
) -> list[Checkpoint]:
    """The files to join, their members under the names they are to have."""
    parts = [_part(one, incoming, target, stack, notes) for one in incoming.files]
    names = [
        _stem(file) if len(part.recipe.members) == 1 and member.name == UNNAMED else member.name
        for file, part in zip(incoming.files, parts, strict=True)
        for member in part.recipe.members
    ]
    if incoming.names and len(incoming.names) != len(names):
        raise UsageError(f"{len(names)} members, but {len(incoming.names)} names (--name)")
    fresh = list(incoming.names or names)
    check_names(fresh)
    found = []
    for part in parts:
        old = [member.name for member in part.recipe.members]
        new, fresh = fresh[: len(old)], fresh[len(old) :]
        changed = {a: b for a, b in zip(old, new, strict=True) if a != b}
        found.append(renamed(part, changed) if changed else part)
    return found


def _part(
    file: str, incoming: Incoming, target: Path, stack: contextlib.ExitStack, notes: list[str]
) -> Checkpoint:
    """One file to join: of ours, or dense weights, as differences from the base if there is one."""
    path = local_file(file)
    if _is_ours(path):
        part = stack.enter_context(_open_file(path, incoming.base))
        return with_own(part, part.recipe.tensors) if incoming.whole else part
    if not Path(path).exists():
        raise FileFormatError(f"{file}: no such file")
    if incoming.base is None and not incoming.whole:
        raise IncompatibleError(
            f"{file} is a dense checkpoint; pass --base FILE, the weights it was fine-tuned from"
        )
    if incoming.base is None and incoming.arch is None:
        raise UsageError(
            f"{file} is a dense checkpoint; pass --arch NAME, and --base FILE if it was fine-tuned "
            "from other weights"
        )
    plan = ConvertPlan(path, incoming.arch, incoming.base, incoming.ema, dict(incoming.args))
    job = converted(plan, target)
    notes += [line for line in job.notes if line not in notes]
    made = finish(stack.enter_context(job.checkpoint))
    return with_own(made, made.recipe.tensors) if incoming.whole else made


def _is_ours(file: str) -> bool:
    """True for a file of this format, wherever it lies."""
    path = local_file(file)
    here = is_safetensors(path) and Path(path).is_file()
    return here and holds_checkpoint(path)


def _for_model(incoming: Incoming, model: ModelSpec) -> Incoming:
    """Dense files are of the ensemble's architecture; their classes are their own."""
    args = {key: value for key, value in arguments_of(model).items() if key != "num_classes"}
    return replace(incoming, arch=model.name, args=args)


def _stem(file: str) -> str:
    """A member name out of a file's."""
    place = file.partition("@")[0] if file.startswith(PREFIX) else file
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(place).stem).strip("._-")
    return re.sub(r"\.{2,}", ".", text)[:64] or UNNAMED
