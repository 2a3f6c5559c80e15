"""Members of one file moved between files: picked, renamed, grafted.

Payload bytes move as they are, and the digests of finished tensors stay as they were recorded, so
that a file written with ``finished=True`` proves that no member changed by a bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from randsurgery.errors import FileFormatError, IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.derivation import (
    derivation,
    payload_digests,
    payload_name,
    payload_names,
    split_payload_name,
)
from randsurgery.format.fields import SHARED, as_given, check_member_name
from randsurgery.format.rebuild import Payloads, read_payload
from randsurgery.format.recipe import (
    BaseRef,
    BaseSource,
    Entry,
    Learned,
    Member,
    MemberTensor,
    RandomSource,
    Recipe,
)
from randsurgery.format.tensors import RawTensor
from randsurgery.format.writing import backbone_id


@dataclass(frozen=True)
class Moved:
    """Payloads that lie elsewhere, perhaps under other names; read when they are asked for."""

    places: Mapping[str, tuple[Payloads, str]]

    def read(self, name: str) -> RawTensor:
        """The payload of that name. Raises KeyError if there is none."""
        payloads, there = self.places[name]
        return payloads.read(there)


Renames = dict[str, str]
"""New payload name by the old one."""


def _places(checkpoint: Checkpoint, renames: Renames) -> dict[str, tuple[Payloads, str]]:
    names = payload_names(checkpoint.recipe)
    return {renames.get(name, name): (checkpoint.payloads, name) for name in names}


def _with_payloads(
    checkpoint: Checkpoint, recipe: Recipe, places: Mapping[str, tuple[Payloads, str]]
) -> Checkpoint:
    """The checkpoint with that recipe and what it needs of the payloads; who closes it closes the
    file it came from."""
    needed = {name: places[name] for name in payload_names(recipe)}
    return replace(checkpoint, recipe=recipe, payloads=Moved(needed), opened=checkpoint.files)


def members_named(checkpoint: Checkpoint, names: Iterable[str] | None) -> list[Member]:
    """The members of those names, or all, in the file's order. Raises UsageError for a name that
    no member bears, or without a name."""
    if names is None:
        return list(checkpoint.recipe.members)
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UsageError("an ensemble has one member at least; leave members out for all")
    wanted = {checkpoint.member(name).name for name in names}
    return [member for member in checkpoint.recipe.members if member.name in wanted]


def pick(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The same backbone with those members alone. Raises UsageError for an unknown member, or if
    none would be left."""
    kept = tuple(members_named(checkpoint, names))
    recipe = checkpoint.recipe.model_copy(update={"members": kept})
    return _with_payloads(checkpoint, recipe, _places(checkpoint, {}))


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Members under new names, by their old ones. Raises UsageError for what is no name of a
    member's, or if two would share one."""
    fresh = [names.get(member.name, member.name) for member in checkpoint.recipe.members]
    check_names(fresh)
    renames = {
        old: payload_name(names[owner], tensor, slot)
        for old in payload_names(checkpoint.recipe)
        for owner, tensor, slot in [split_payload_name(old)]
        if owner != SHARED and owner in names
    }
    members = tuple(
        member.model_copy(update={"name": name})
        for member, name in zip(checkpoint.recipe.members, fresh, strict=True)
    )
    recipe = checkpoint.recipe.model_copy(update={"members": members})
    return _with_payloads(checkpoint, recipe, _places(checkpoint, renames))


def check_names(names: Collection[str]) -> None:
    """Raises UsageError naming what is no name of a member's, or occurs twice."""
    seen: set[str] = set()
    for name in names:
        try:
            check_member_name(name)
        except ValueError as error:
            raise UsageError(f"{error}; give another with --name") from None
        if name in seen:
            raise UsageError(f"two members would bear the name {name!r}; give others with --name")
        seen.add(name)


def with_own(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The same members with those shared tensors moved into each of them, payloads and all."""
    recipe, moved = checkpoint.recipe, sorted(set(names) & set(checkpoint.recipe.tensors))
    places = _places(checkpoint, {})
    members = []
    for member in recipe.members:
        tensors = dict(member.tensors)
        for name in moved:
            own = tensors.get(name)
            if own is None or own.entry is None:
                tensors[name] = _owned(recipe, member, name, places)
        members.append(member.model_copy(update={"tensors": dict(sorted(tensors.items()))}))
    rest = {name: entry for name, entry in recipe.tensors.items() if name not in moved}
    update: dict[str, Any] = {"tensors": rest, "members": tuple(members), "backbone_id": None}
    made = _with_payloads(checkpoint, recipe.model_copy(update=update), places)
    fresh = made.recipe.model_copy(update={"backbone_id": backbone_id(made.recipe, made.payloads)})
    return replace(made, recipe=fresh)


def _owned(
    recipe: Recipe, member: Member, name: str, places: dict[str, tuple[Payloads, str]]
) -> MemberTensor:
    """A shared entry with the member's overlays as the member's own entry; ``places`` learns where
    its payloads lie."""
    made, own = derivation(recipe, member, name), member.tensors.get(name)
    moved = made.moved(member.name)
    lying = [places[before] for before, _ in made.payloads]
    places |= {after: lie for (after, _), lie in zip(moved.payloads, lying, strict=True)}
    digest = made.entry.digest if own is None else own.digest
    return MemberTensor(entry=moved.entry.model_copy(update={"digest": digest}))


def graft(onto: Checkpoint, other: Checkpoint) -> Checkpoint:
    """``onto`` with the members of ``other``, all in order of their names; who closes it closes the
    files of both.

    Both have recorded digests, as files have. Raises IncompatibleError for another architecture,
    seed or backbone, naming both; UsageError if two members would share a name.
    """
    _check_alike(onto, other)
    check_names([member.name for c in (onto, other) for member in c.recipe.members])
    bases, keys = _joined_bases(onto.recipe, other.recipe)
    grafted = [_rebased(_with_input(onto.recipe, other.recipe, m), keys)
               for m in other.recipe.members]  # fmt: skip
    members = sorted((*onto.recipe.members, *grafted), key=lambda member: member.name)
    recipe = onto.recipe.model_copy(update={"members": tuple(members), "bases": bases})
    places = {**_places(other, {}), **_places(onto, {})}
    made = _with_payloads(onto, recipe, places)
    tensors = {keys[key]: tensors for key, tensors in other.bases.items()} | dict(onto.bases)
    return replace(made, bases=tensors, opened=(*made.opened, *other.files))


def _check_alike(onto: Checkpoint, other: Checkpoint) -> None:
    """Raises IncompatibleError naming the first difference of two backbones."""
    first, second = onto.recipe, other.recipe
    if architecture(first) != architecture(second):
        raise IncompatibleError(
            f"{_name(other)} is a {_told(second)}, {_name(onto)} a {_told(first)}; members share "
            "one architecture"
        )
    if not all(m.head for r in (first, second) for m in r.members) and first.model != second.model:
        raise IncompatibleError(
            f"{_name(other)} is a {_told(second)}, {_name(onto)} a {_told(first)}; only members "
            "that have a classifier may differ in classes"
        )
    if first.backbone_id == second.backbone_id and first.backbone_id is not None:
        return
    for name in sorted({*first.tensors, *second.tensors}):
        here, there = first.tensors.get(name), second.tensors.get(name)
        alike = here and there and _sentence(first, name, here) == _sentence(second, name, there)
        if not alike:
            raise IncompatibleError(
                f"{_name(other)} has another backbone: its {name} is {_words(there)}, in "
                f"{_name(onto)} it is {_words(here)}; members share one backbone, or "
                "each is kept whole (--kind full)"
            )
    raise IncompatibleError(
        f"{_name(other)} has another backbone ({second.backbone_id}) than {_name(onto)} "
        f"({first.backbone_id})"
    )


def architecture(recipe: Recipe) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of the architecture, less the classes, which are each member's own."""
    if recipe.model is None:
        return None
    args = {key: value for key, value in recipe.model.args.items() if key != "num_classes"}
    return recipe.model.name, args


def _told(recipe: Recipe) -> str:
    if recipe.model is None:
        return "module of no known architecture"
    args = [f"{key}={as_given(value)}" for key, value in sorted(recipe.model.args.items())]
    return " ".join((recipe.model.name, *args))


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.path.name if checkpoint.path else "the file"


def _sentence(recipe: Recipe, name: str, entry: Entry) -> dict[str, Any]:
    """What a shared entry is made of, its bases by identity."""
    return {**entry.to_json(), "source": recipe.source_facts(name, entry)}


def _words(entry: Entry | None) -> str:
    """An entry for people: what tells one backbone from another."""
    if entry is None:
        return "missing"
    what: str = entry.source.kind
    if isinstance(entry.source, RandomSource):
        what = f"{entry.source.distribution} of seed {entry.source.seed}"
    overlays = [overlay.kind for overlay in entry.overlays]
    whole = f"{list(entry.shape)} {' + '.join((what, *overlays))}"
    return f"{whole} (digest {entry.digest[:8]})" if entry.digest else whole


def _joined_bases(onto: Recipe, other: Recipe) -> tuple[dict[str, BaseRef], dict[str, str]]:
    """The bases of both, and the key of each of ``other``'s among them."""
    bases, keys = dict(onto.bases), {}
    known = {ref.identity: key for key, ref in bases.items()}
    for key, ref in other.bases.items():
        fresh, number = key, 2
        while ref.identity not in known and fresh in bases:
            fresh, number = f"{key}-{number}", number + 1
        keys[key] = known.setdefault(ref.identity, fresh)
        bases.setdefault(keys[key], ref)
    return bases, keys


def _with_input(onto: Recipe, other: Recipe, member: Member) -> Member:
    """The member with what it expects to see, if that is not what the file says of all."""
    if onto.input == other.input:
        return member
    look = other.input_of(member)
    return member.model_copy(update={"input": None if look == onto.input else look})


def _rebased(member: Member, keys: Mapping[str, str]) -> Member:
    """The member with its bases under their keys in another file."""
    if all(old == new for old, new in keys.items()):
        return member

    def source(found: Any) -> Any:
        if not isinstance(found, BaseSource):
            return found
        return found.model_copy(update={"base": keys[found.base]})

    def tensor(own: MemberTensor) -> MemberTensor:
        if own.entry is None:
            return own
        entry = own.entry.model_copy(update={"source": source(own.entry.source)})
        return MemberTensor(entry=entry)

    def learned(part: Learned) -> Learned:
        return part.model_copy(update={"start": source(part.start)})

    update: dict[str, Any] = {
        "tensors": {name: tensor(own) for name, own in member.tensors.items()}
    }
    if member.plan is not None:
        parts = {name: learned(part) for name, part in member.plan.tensors.items()}
        update["plan"] = member.plan.model_copy(update={"tensors": parts})
    return member.model_copy(update=update)


def fault_of(checkpoint: Checkpoint, owner: str) -> str | None:
    """What is wrong with the payloads of a member, or of the shared entries; None if every one
    agrees with its digest."""
    for name, expected in payload_digests(checkpoint.recipe, owner):
        try:
            read_payload(checkpoint.payloads, name, expected)
        except FileFormatError as error:
            return str(error)
    return None


def first_fault(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The first owner, the shared entries before the members, whose payloads are damaged, and
    what is wrong."""
    for owner in (SHARED, *(member.name for member in checkpoint.recipe.members)):
        if (fault := fault_of(checkpoint, owner)) is not None:
            return owner, fault
    return None
