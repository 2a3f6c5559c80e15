"""Masks that are there already: those of another file, or chosen anew from a file's scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from randsurgery.errors import UsageError
from randsurgery.surgery.edge_popup import ABOUT_K_FOR, k_for_settings
from randsurgery.surgery.method import Method, about

if TYPE_CHECKING:
    from torch import nn

    from randsurgery.format.checkpoint import Checkpoint


@dataclass(frozen=True)
class FixedMasks(Method):
    """A method that learns nothing about masks."""

    def sizes(self, checkpoint: Checkpoint) -> dict[str, tuple[int, int | None]]:
        """As of any method, of masks that have been placed."""
        from randsurgery.jobs.sources import masked_tensors
        from randsurgery.surgery.learning import survivor_mask
        from randsurgery.surgery.modules import meta_module
        from randsurgery.surgery.scores import select_learned

        select_learned(meta_module(checkpoint), self)  # a pattern without a match is told
        who = checkpoint.member()
        names = masked_tensors(checkpoint.recipe, who)
        masks = {name: survivor_mask(checkpoint, who, name) for name in names}
        return {name: (mask.size, mask.count) for name, mask in masks.items()}

    def attach(self, model: nn.Module) -> nn.Module:
        """Learn what ``learn`` names, and freeze all else."""
        from randsurgery.surgery.scores import learn_beside

        return learn_beside(model, self)


@dataclass(frozen=True)
class Ticket(FixedMasks):
    """The masks of another file on this network's weights.

    mask_from: the file.
    """

    name: ClassVar[str] = "ticket"
    paper: ClassVar[str] = "Frankle & Carbin, The Lottery Ticket Hypothesis"
    chosen_by: ClassVar[str | None] = "--mask-from"

    mask_from: str = field(
        metadata=about(
            "Take the masks of a file, on these weights: the re-initialised ticket.", metavar="FILE"
        )
    )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The file that has the masks."""
        return (self.mask_from,)

    def settings(self) -> dict[str, Any]:
        """As of any method; no path."""
        return {"mask_from": Path(self.mask_from).name, "rethreshold": None}

    def given(self) -> dict[str, Any]:
        """The file's whole path."""
        return {"mask-from": self.mask_from}

    def place(self, checkpoint: Checkpoint, *, from_file: bool) -> tuple[Checkpoint, list[str]]:
        """The network under the other's masks. Factors of weights are not taken over."""
        from randsurgery.jobs.sources import has_factors, masks_of
        from randsurgery.surgery.tickets import with_masks

        donor = Path(self.mask_from).name
        said = f"{donor} multiplies what it keeps; its masks alone are taken"
        notes = [said] if has_factors(self.mask_from) else []
        return with_masks(checkpoint, masks_of(self.mask_from)), notes


@dataclass(frozen=True)
class Rethreshold(FixedMasks):
    """Masks chosen anew from the scores that a file keeps.

    rethreshold: the share of each tensor that is kept. k_for: (pattern, share) pairs for layers
    that keep another share.
    """

    name: ClassVar[str] = "rethreshold"
    paper: ClassVar[str] = "Ramanujan et al., Section 3.2"
    chosen_by: ClassVar[str | None] = "--rethreshold"

    rethreshold: str | Fraction = field(
        metadata=about(
            "Choose masks anew from the scores that SOURCE has; nothing is learned.", metavar="K"
        )
    )
    k_for: tuple[tuple[str, str], ...] = field(
        default=(),
        kw_only=True,
        metadata=ABOUT_K_FOR,
    )

    @property
    def share(self) -> Fraction:
        """What is kept, as an exact number. Raises UsageError outside (0, 1]."""
        from randsurgery.surgery.initialisers import parse_fraction

        return parse_fraction(self.rethreshold, "--rethreshold")

    def check(self) -> None:
        """Raises UsageError for a share outside (0, 1]."""
        _ = self.share

    @property
    def label(self) -> str:
        """As a run with that share is called."""
        return f"popup-k{str(self.share).replace('/', '-')}"

    @property
    def reads_scores(self) -> bool:
        """Always."""
        return True

    def settings(self) -> dict[str, Any]:
        """As of any method."""
        found = {"mask_from": None, "rethreshold": str(self.share)}
        return {**found, **k_for_settings(self.k_for)}

    def place(self, checkpoint: Checkpoint, *, from_file: bool) -> tuple[Checkpoint, list[str]]:
        """The network under the new masks."""
        from randsurgery.surgery.tickets import rethresholded

        if not from_file:
            raise UsageError("--rethreshold goes with a file that popup --save-scores wrote")
        settings = checkpoint.member().provenance.get("settings")
        scaled = isinstance(settings, dict) and settings.get("scaled")
        said = "the weights are scaled for the k they were trained with, and stay so"
        return rethresholded(checkpoint, self.share, self.k_for), [said] if scaled else []
