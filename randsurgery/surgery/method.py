"""What a way to find masks is: one object, its options as fields, in a file of its own.

A method's file imports what is heavy inside its functions alone, so that the command line can read
its options for ``--help``. ``jobs/methods.py`` registers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from randsurgery.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from randsurgery.format.checkpoint import Checkpoint


def about(
    help: str, *, metavar: str | None = None, cli_default: str | None = None
) -> dict[str, str | None]:
    """The metadata of a field that is an option of the command line, too. ``cli_default``: what
    the command line takes for a field without a default; one without either must be given."""
    return {"help": help, "metavar": metavar, "cli_default": cli_default}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to find which weights of a network are kept.

    seed: of what is drawn. learn: patterns (``@norm``, ``@head``) of layers, or of single
    parameters (``pos_embed``), that are learned beside the mask, not masked.
    """

    name: ClassVar[str]
    """As ``--algorithm`` and provenance have it."""
    paper: ClassVar[str]
    """Where it is from."""
    chosen_by: ClassVar[str | None] = None
    """The option that chooses it, if that is not ``--algorithm``."""

    seed: int = 0
    learn: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Layers learned beside the mask, such as @norm or @head; repeatable.", metavar="PATTERN"
        ),
    )

    def __post_init__(self) -> None:
        from randsurgery.surgery.initialisers import check_seed

        check_patterns("learn", self.learn)
        check_seed(self.seed)

    @property
    def label(self) -> str:
        """What it is called in the names of files."""
        return self.name

    @property
    def learns(self) -> bool:
        """True if masks are learned, not given or drawn."""
        return False

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings of training that it needs, unless others are given."""
        return {}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Files that it reads besides the network's own."""
        return ()

    @property
    def reads_scores(self) -> bool:
        """True if it needs the network as a file has it, scores and masks apart."""
        return False

    def check(self) -> None:
        """Raises UsageError for values that no network allows."""

    def settings(self) -> dict[str, Any]:
        """Its options as provenance has them: plain values, no paths."""
        raise NotImplementedError

    def given(self) -> dict[str, Any]:
        """Options as they were given, where ``settings`` has them otherwise."""
        return {}

    def place(self, checkpoint: Checkpoint, *, from_file: bool) -> tuple[Checkpoint, list[str]]:
        """The network with masks that are there before training, and what there is to say of them.
        Raises RandsurgeryError."""
        return checkpoint, []

    def sizes(self, checkpoint: Checkpoint) -> dict[str, tuple[int, int | None]]:
        """Weights of each tensor that is masked, and how many of them are kept, None where that is
        found in training. Makes no weight. Raises as ``attach``."""
        raise NotImplementedError

    def attach(self, model: nn.Module) -> nn.Module:
        """Make the module learn, and freeze all else. In place; any nn.Module will do. Raises
        UsageError or IncompatibleError."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Scoring(Method):
    """A method that gives every convolution and linear weight a score.

    skip: patterns of layers left dense and frozen.
    """

    skip: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Layers left dense and frozen (their running statistics still follow the data); "
            "repeatable.",
            metavar="PATTERN",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns("skip", self.skip)


def check_patterns(field: str, patterns: object) -> None:
    """Raises UsageError unless they are several strings."""
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):  # type: ignore[attr-defined]
        raise UsageError(f"{field} must be a sequence of patterns, found {patterns!r}")


def check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UsageError for a value that is not one of those."""
    if value not in known:
        raise UsageError(f"unknown {option} {value!r}, expected {' or '.join(known)}")
