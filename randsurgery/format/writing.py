"""A checkpoint to a file, and a file held against its digests: finish, write, verify."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from randsurgery.errors import FileFormatError, IncompatibleError, OutputError
from randsurgery.format.canonical import canonical_json, digest
from randsurgery.format.checkpoint import METADATA_KEY, Checkpoint, in_threads, parse_recipe
from randsurgery.format.container import Container, check_output, pack, write_atomically
from randsurgery.format.derivation import (
    needed_bases,
    payload_digests,
    payload_names,
    split_payload_name,
    steps_of,
)
from randsurgery.format.fields import SHARED
from randsurgery.format.rebuild import Payloads, read_mask, read_payload
from randsurgery.format.recipe import (
    BaseSource,
    Entry,
    Member,
    MemberTensor,
    Recipe,
)


def backbone_id(recipe: Recipe, payloads: Payloads) -> str:
    """Digest of the shared entries by decoded content: equal if and only if members of one file
    can be grafted onto the other. Normative text: docs/format.md section 6."""
    rows = []
    for name, entry in sorted(recipe.tensors.items()):
        overlays = []
        for step in steps_of(SHARED, name, entry.overlays):
            part = step.overlay.to_json()
            if step.mask is not None:
                del part["encoding"]
                part["digest"] = digest(read_mask(payloads, step, entry.size).packed)
            overlays.append(part)
        source = recipe.source_facts(name, entry)
        rows.append([name, entry.dtype, list(entry.shape), source, overlays])
    return digest(canonical_json(rows))


def finish(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with its backbone id and the digest of every finished tensor, but those
    that one payload holds: its own digest says as much."""
    recipe = checkpoint.recipe
    bare = Member(name="main")  # shared entries alone

    def shared(name: str) -> Entry:
        entry = recipe.tensors[name]
        found = None if entry.in_one_payload else checkpoint.rebuild(bare, name).digest()
        return entry.model_copy(update={"digest": found})

    names = list(recipe.tensors)
    tensors = dict(zip(names, in_threads(shared, names), strict=True))
    members = tuple(_finish_member(checkpoint, member) for member in recipe.members)
    update: dict[str, Any] = {"tensors": tensors, "members": members}
    update["backbone_id"] = backbone_id(recipe, checkpoint.payloads)
    return replace(checkpoint, recipe=recipe.model_copy(update=update))


def _finish_member(checkpoint: Checkpoint, member: Member) -> Member:
    def own(name: str) -> MemberTensor:
        part = member.tensors[name]
        found = None if part.in_one_payload else checkpoint.rebuild(member, name).digest()
        if part.entry is None:
            return part.model_copy(update={"digest": found})
        return MemberTensor(entry=part.entry.model_copy(update={"digest": found}))

    names = list(member.tensors)
    return member.model_copy(
        update={"tensors": dict(zip(names, in_threads(own, names), strict=True))}
    )


def check_not_base(path: str | os.PathLike[str], recipe: Recipe) -> None:
    """Raises OutputError for a name under which the file would be taken for its own base."""
    for ref in recipe.bases.values():
        if ref.file == Path(path).name:
            raise OutputError(
                f"{path}: is the name of the base that the file builds on; choose another --output"
            )


def write_checkpoint(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    force: bool = False,
    finished: bool = False,
) -> int:
    """Finish, write, re-read and verify a checkpoint, then rename it into place.

    ``finished``: it has its digests from files, and nothing is written if one does not agree.
    Returns the file's bytes. Raises OutputError if the disk refuses or the file exists and
    ``force`` is false; an old file is untouched unless all went well.
    """
    check_output(path, force=force)
    check_not_base(path, checkpoint.recipe)
    done = checkpoint if finished else finish(checkpoint)
    text = canonical_json(done.recipe.to_json()).decode("ascii")
    readable = parse_recipe(text, Path(path).name)  # what is written can be read
    names = list(payload_names(done.recipe))
    payloads = {name: done.payloads.read(name) for name in names}
    metadata = {"format": "pt", METADATA_KEY: text}

    def verify_written(written: Path) -> None:
        with Container(written) as container:
            again = parse_recipe(container.metadata[METADATA_KEY], written.name)
            if again != readable:
                raise FileFormatError(f"{written}: the recipe read back differs")
            copy = Checkpoint(again, container, done.bases, written)
            if faults := [c for c in verify(copy) if not c.ok]:
                raise FileFormatError(f"{written}: {faults[0].what}: {faults[0].detail}")

    return write_atomically(path, pack(payloads, metadata), verify_written)


@dataclass(frozen=True)
class Check:
    """One digest compared: what it covers, whether it agreed, and if not, how."""

    what: str
    ok: bool
    detail: str = ""


def verify(checkpoint: Checkpoint) -> list[Check]:
    """Compare every digest of the file: finished tensors, payloads, backbone id.

    A tensor that fails does not stop the others. Payloads are compared on their own, too: one
    that lies under a replacement takes no part in any finished tensor.
    """
    recipe, bare = checkpoint.recipe, Member(name="main")

    def check(member: Member, name: str, expected: str | None, what: str) -> Check:
        try:
            found = checkpoint.rebuild(member, name).digest()
        except (FileFormatError, IncompatibleError) as error:
            return Check(what, False, str(error))
        said = recipe.tensors[name] if member is bare else member.tensors[name]
        # its payload's digest, which rebuilding compares, says as much
        ok = found == expected or (expected is None and said.in_one_payload)
        return Check(what, ok, "" if ok else f"rebuilt {found}, the recipe says {expected}")

    spare = recipe.bases.keys() - checkpoint.bases.keys() - needed_bases(recipe)

    def absent(entry: Entry) -> bool:
        """True for what no member has any more, of a base that is not there."""
        source = entry.source
        return isinstance(source, BaseSource) and source.base in spare

    work: list[Callable[[], Check]] = [
        functools.partial(check, bare, name, entry.digest, f"shared/{name}")
        for name, entry in recipe.tensors.items()
        if not absent(entry)
    ]
    for member in recipe.members:
        for name, own in member.tensors.items():
            wanted = own.digest if own.entry is None else own.entry.digest
            what = f"{member.name}/{name}"
            work.append(functools.partial(check, member, name, wanted, what))
    for slot, expected in payload_digests(recipe):
        work.append(functools.partial(_check_payload, checkpoint, slot, expected))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checks = list(pool.map(lambda one: one(), work))
    return [*checks, _check_backbone(checkpoint)]


def _check_payload(checkpoint: Checkpoint, slot: str, expected: str) -> Check:
    owner, name, last = split_payload_name(slot)
    try:
        if last == "scores":
            checkpoint.scores(name, owner)
        else:
            read_payload(checkpoint.payloads, slot, expected)
    except FileFormatError as error:
        return Check(slot, False, str(error))
    return Check(slot, True)


def _check_backbone(checkpoint: Checkpoint) -> Check:
    try:
        found = backbone_id(checkpoint.recipe, checkpoint.payloads)
    except (FileFormatError, IncompatibleError) as error:
        return Check("backbone_id", False, str(error))
    ok = found == checkpoint.recipe.backbone_id
    return Check("backbone_id", ok, "" if ok else f"{found}, not {checkpoint.recipe.backbone_id}")
