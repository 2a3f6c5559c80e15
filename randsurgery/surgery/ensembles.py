"""Cheap ensembles (Rosenfeld & Tsotsos, Section 4.3): members that share one backbone, in one
resident network.

A file's members differ from the shared backbone by their own overlays. One network is held in
memory and becomes each member in turn (resident.py). Or the members' own tensors are held beside
it, stacked, and run one after another or as one batched call.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.func import functional_call

from randsurgery.errors import IncompatibleError, UsageError, reason
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.members import graft, members_named, with_own
from randsurgery.format.recipe import Member
from randsurgery.surgery.architectures import build_meta
from randsurgery.surgery.heads import last_layers
from randsurgery.surgery.resident import Resident, head_kind
from randsurgery.surgery.tensors import to_torch

Engine = Literal["auto", "switch", "held", "batched"]


def check_engine(name: str) -> Engine:
    """``auto``, ``switch``, ``held`` or ``batched``. Raises UsageError."""
    for engine in get_args(Engine):
        if engine == name:
            checked: Engine = engine
            return checked
    raise UsageError(f"unknown --engine {name!r}, expected {', '.join(get_args(Engine))}")


def settled(engine: Engine, device: torch.device) -> Engine:
    """On a CPU, auto is one member after another: over many images the batched call was never
    faster there (docs/performance.md), and no timing decides the last digits."""
    return "switch" if engine == "auto" and device.type == "cpu" else engine


def joined(onto: Checkpoint, other: Checkpoint) -> Checkpoint:
    """``onto`` with the members of ``other``. Where the backbones differ in the classifier alone
    (another task), every member gets its classifier as its own. Raises as ``graft`` does."""
    if onto.recipe.backbone_id == other.recipe.backbone_id or onto.recipe.model is None:
        return graft(onto, other)
    ours, theirs = (with_own(one, _classifier_tensors(one)) for one in (onto, other))
    if ours.recipe.backbone_id != theirs.recipe.backbone_id:
        return graft(onto, other)  # which says how they differ
    return graft(ours, theirs)


def _classifier_tensors(checkpoint: Checkpoint) -> set[str]:
    """The shared tensors of some member's classifier."""
    recipe = checkpoint.recipe
    places: set[str] = set()
    for member in recipe.members:
        spec = recipe.model_of(member)
        if spec is not None and member.head is not None:
            places |= set(last_layers(build_meta(spec)))  # without a fixed one in its place
    prefixes = tuple(f"{place}." for place in places)
    return {name for name in recipe.tensors if name.startswith(prefixes)} if prefixes else set()


def check_one_task(checkpoint: Checkpoint, members: Sequence[Member]) -> None:
    """Raises IncompatibleError if the members' probabilities have no mean: other classes, or other
    preprocessing of the images."""
    tasks: dict[Any, list[str]] = {}
    for member in members:
        classes = member.head.classes if member.head else None
        tasks.setdefault((classes, member.classes), []).append(member.name)
    if len(tasks) > 1:
        told = "; ".join(f"{', '.join(names)}: {_task(*task)}" for task, names in tasks.items())
        raise IncompatibleError(
            f"the members have different classes, so they have no mean ({told}); choose members of "
            "one task with --member"
        )
    looks: dict[Any, list[str]] = {}
    for member in members:
        looks.setdefault(checkpoint.recipe.input_of(member), []).append(member.name)
    if len(looks) > 1:
        told = "; ".join(", ".join(names) for names in looks.values())
        raise IncompatibleError(
            f"the members expect differently prepared images ({told}); choose with --member"
        )


def _task(classes: int | None, names: tuple[str, ...] | None) -> str:
    if not names:
        return f"{classes} classes" if classes else "no classes"
    first = ", ".join(names[:3])
    return f"{classes} classes ({first}{', ...' if len(names) > 3 else ''})"


@dataclass(frozen=True)
class Prediction:
    """What an ensemble says of B images with C classes, in float32 on the images' device.

    probabilities: (B, C), the members' mean. entropy: (B,), of these, in nats.
    mutual_information: (B,), entropy less the members' mean entropy, in nats: how much of it is
    disagreement. disagreement: (B,), the share of members that choose another class.
    members: (M, B, C), each member's probabilities.
    """

    probabilities: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor
    disagreement: torch.Tensor
    members: torch.Tensor


class Ensemble(nn.Module):
    """Members of one file as one module: images (B, channels, H, W) to mean probabilities (B, C).

    For inference: it stays in evaluation mode, and nothing of it takes gradients. ``engine``:
    "switch" holds one network, which becomes each member in turn, at every call; "held" holds the
    members' own tensors, M times as much, and runs them one after another; "batched" holds them and
    runs them in one vectorised call; "auto" times the last two on the first images of each shape
    and goes on with the faster, and switches if members cannot be held. Logits are divided by a
    member's temperature if it has one.

    Copies and pickles bring what they need of the file along. There is no state dict: a state of
    the one network in memory would be that of one member.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        members: Iterable[str] | None = None,
        *,
        model: nn.Module | None = None,
        engine: Engine = "auto",
    ) -> None:
        """Raises UsageError for an unknown member or none, IncompatibleError for several tasks.
        The checkpoint stays in use and is closed by ``close``."""
        super().__init__()
        chosen = members_named(checkpoint, members)
        check_one_task(checkpoint, chosen)
        self.engine, self.checkpoint = check_engine(engine), checkpoint
        self.members = tuple(member.name for member in chosen)
        self.temperatures = [temperature(member) for member in chosen]
        self.resident = Resident(checkpoint, self.members[0], model)
        self.backbone = self.resident.model  # registered, so that .to() and the like reach it
        self.stacked: dict[str, torch.Tensor] | None = None
        self.closed = False
        self.fastest: dict[tuple[int, ...], Engine] = {}

    def train(self, mode: bool = True) -> Ensemble:
        """Stays in evaluation mode, as members are not trained here."""
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> Ensemble:
        self.stacked = None  # lies on the device that the module leaves
        self.fastest = {}
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.closed:
            raise UsageError("the ensemble was closed, so it cannot be copied; load it again")
        return {**self.__dict__, "stacked": None, "fastest": {}}

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Raises UsageError: the members are in the file."""
        raise UsageError(
            "an ensemble has no state dict, which would hold one member of "
            f"{len(self.members)}; keep its file, pickle it, or take member(NAME).state_dict()"
        )

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Raises UsageError: the members are in the file."""
        raise UsageError("an ensemble takes no state dict; load_ensemble(FILE) loads another")

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        self.load_state_dict()  # as a part of another module

    def member(self, name: str) -> nn.Module:
        """The network, now that member; it is the same module for all, until the next call."""
        return self.resident.switch(name)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Every member's logits, by its temperature: (M, B, C), float32."""
        if self.closed:
            raise UsageError("the ensemble was closed; load it again")
        engine = self.engine if self.engine != "auto" else self.faster(images)
        run = {"batched": self.batched, "held": self._held}.get(engine, self._switched)
        found = run(images)
        scale = torch.tensor(self.temperatures, device=found.device).view(-1, 1, 1)
        return found / scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Mean probabilities of the members, (B, C)."""
        return self.logits(images).softmax(dim=-1).mean(dim=0)

    def predict(self, images: torch.Tensor) -> Prediction:
        """Mean probabilities with their uncertainty."""
        each = self.logits(images).softmax(dim=-1)
        mean = each.mean(dim=0)
        entropy = _entropy(mean)
        others = each.argmax(dim=-1) != mean.argmax(dim=-1)
        shared = (entropy - _entropy(each).mean(dim=0)).clamp(min=0)
        return Prediction(mean, entropy, shared, others.float().mean(dim=0), each)

    def _switched(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.resident.switch(name)(images).float() for name in self.members])

    def _held(self, images: torch.Tensor) -> torch.Tensor:
        stacked = self._own()
        each = [{name: own[index] for name, own in stacked.items()}
                for index in range(len(self.members))]  # fmt: skip
        return torch.stack([functional_call(self.backbone, own, (images,)).float() for own in each])

    def batched(self, images: torch.Tensor) -> torch.Tensor:
        """All members' logits in one call, before any temperature: (M, B, C)."""
        return self._run_stacked(self._own(), images)

    def _own(self) -> dict[str, torch.Tensor]:
        """The members' own tensors, stacked, beside a network in which the rest is right."""
        if self.resident.member not in self.members:
            self.resident.switch(self.members[0])  # what none of them changes is then right
        if self.stacked is None:
            self.stacked = self._stack()
        return self.stacked

    def _stack(self) -> dict[str, torch.Tensor]:
        """The tensors that some member changes, one for each member: (M, ...)."""
        chosen = [self.checkpoint.member(name) for name in self.members]
        if len({head_kind(member) for member in chosen}) > 1:
            raise IncompatibleError(
                "the members' classifiers are of different kinds, so they cannot be held side by "
                "side; choose --engine switch"
            )
        state = self.backbone.state_dict(keep_vars=True)
        names = sorted({name for member in chosen for name in member.tensors} & set(state))
        return {
            name: torch.stack(
                [
                    to_torch(self.checkpoint.rebuild(member, name)).to(state[name])
                    for member in chosen
                ]
            )
            for name in names
        }

    def _run_stacked(self, stacked: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        def one(own: dict[str, torch.Tensor]) -> torch.Tensor:
            found: torch.Tensor = functional_call(self.backbone, own, (images,))
            return found

        try:
            found: torch.Tensor = torch.func.vmap(one)(stacked)
        except (RuntimeError, ValueError, TypeError) as error:
            raise IncompatibleError(
                f"the network cannot run as one batched call ({reason(error)}); choose --engine "
                "switch"
            ) from None
        return found.float()

    def faster(self, images: torch.Tensor) -> Engine:
        """The faster engine for images of this shape, timed once."""
        shape = tuple(images.shape)
        if shape not in self.fastest:
            seconds: dict[Engine, float] = {}
            for engine, run in (("batched", self.batched), ("held", self._held)):
                with contextlib.suppress(IncompatibleError, torch.OutOfMemoryError):
                    seconds[engine] = _seconds(functools.partial(run, images), images.device)  # type: ignore[index]
            self.fastest[shape] = min(seconds, key=seconds.__getitem__, default="switch")
        return self.fastest[shape]

    def close(self) -> None:
        """Close the file. The ensemble cannot be used any more."""
        self.closed = True
        self.checkpoint.close()

    def __enter__(self) -> Ensemble:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def temperature(member: Member) -> float:
    """What the member's logits are divided by."""
    return 1.0 if member.calibration is None else float.fromhex(member.calibration.temperature)


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """In nats, over the last dimension; 0 log 0 is 0."""
    found: torch.Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return found


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The time of a second run: the first may load, allocate or compile."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - start
    return spent
