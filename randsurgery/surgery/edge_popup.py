"""edge-popup (Ramanujan et al., Section 3.2, Algorithm 1): learn which weights to keep."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from randsurgery.errors import UsageError
from randsurgery.surgery.method import Scoring, about, check_choice

if TYPE_CHECKING:
    import torch
    from torch import nn

    from randsurgery.format.checkpoint import Checkpoint
    from randsurgery.surgery.masking import Scores

MaskKind = Literal["learned", "random"]


ABOUT_K_FOR = about(
    "Layers that keep another share; the last match decides; repeatable.", metavar="PATTERN=K"
)


@dataclass(frozen=True)
class TopShare(Scoring):
    """A method that keeps a given share of each tensor.

    k: the share, in (0, 1]; parsed as a decimal, so 0.9 is exact.
    k_for: (pattern, share) pairs for layers that keep another share; of several patterns that match
    a layer the last decides.
    """

    k: str | float | Fraction = field(
        metadata=about("Share of weights kept, (0, 1]; default 0.3.", cli_default="0.3")
    )
    k_for: tuple[tuple[str, str | float | Fraction], ...] = field(
        default=(),
        kw_only=True,
        metadata=ABOUT_K_FOR,
    )

    @property
    def share(self) -> Fraction:
        """``k`` as an exact number. Raises UsageError outside (0, 1]."""
        from randsurgery.surgery.initialisers import parse_fraction

        return parse_fraction(self.k, "k")

    def check(self) -> None:
        """Raises UsageError for a share outside (0, 1]."""
        _ = self.share

    def share_settings(self) -> dict[str, Any]:
        """``k`` and ``k_for`` as provenance has them."""
        return {"k": str(self.k), **k_for_settings(self.k_for)}

    def shares(self, model: nn.Module) -> dict[str, Fraction]:
        """The share that each tensor to be masked keeps, by tensor name. A module on meta will do.
        Raises UsageError or IncompatibleError as ``attach`` does."""
        from randsurgery.surgery.scores import resolve, tensor_name

        targets, _ = resolve(model, self)
        found = layer_shares(model, self.share, self.k_for, {place for place, _, _ in targets})
        return {tensor_name(place, leaf): found[place] for place, _, leaf in targets}

    def sizes(self, checkpoint: Checkpoint) -> dict[str, tuple[int, int | None]]:
        """As of any method; how many are kept is known."""
        from randsurgery.surgery.initialisers import kept_count
        from randsurgery.surgery.modules import meta_module
        from randsurgery.surgery.scores import target_sizes

        shell = meta_module(checkpoint)
        keep, sizes = self.shares(shell), target_sizes(shell, self)
        return {name: (size, kept_count(keep[name], size)) for name, size in sizes.items()}


@dataclass(frozen=True)
class Popup(TopShare):
    """What edge-popup is to do. All fields but ``k`` have the paper's defaults.

    k: share of weights kept in each tensor, (0, 1]; parsed as a decimal, so 0.9 is exact.
    k_for: (pattern, share) pairs for layers that keep another share; of several patterns that match
    a layer the last decides.
    mask: "learned", or "random" for the baseline in which nothing about the mask is learned;
    ``seed`` is then that of the mask.
    """

    name: ClassVar[str] = "edge-popup"
    paper: ClassVar[str] = "Ramanujan et al."

    mask: MaskKind = field(
        default="learned", kw_only=True, metadata=about("learned, or random: the baseline.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("--mask", self.mask, get_args(MaskKind))

    @property
    def label(self) -> str:
        """With the share that is kept."""
        kind = "random-mask" if self.mask == "random" else "popup"
        return f"{kind}-k{str(self.k).replace('/', '-')}"

    @property
    def learns(self) -> bool:
        """False for the random baseline."""
        return self.mask == "learned"

    def settings(self) -> dict[str, Any]:
        """As of any method."""
        return {"algorithm": self.name, **self.share_settings(), "mask": self.mask}

    def attach(self, model: nn.Module) -> nn.Module:
        """Give every convolution and linear weight a score; freeze everything else. In place.

        Afterwards ``model.parameters()`` that require gradients are the scores, what ``learn``
        names, and scale and bias of a fixed classifier. Works on any nn.Module. Raises UsageError
        (a pattern that matches nothing, k outside (0, 1], nothing to mask) or IncompatibleError (a
        tied weight, a weight-standardised convolution, a weight under another parametrization).
        """
        from randsurgery.surgery.initialisers import kept_count
        from randsurgery.surgery.popup_scores import PopupScores
        from randsurgery.surgery.scores import initial_scores, put_scores

        keep = self.shares(model)

        def make(name: str, weight: torch.Tensor, fan_in: int) -> Scores:
            role: Literal["score", "mask"] = "score" if self.learns else "mask"
            scores = initial_scores(name, weight, fan_in, self.seed, role)
            zeroed = weight.numel() - kept_count(keep[name], weight.numel())
            layer = PopupScores(name, scores, zeroed)
            layer.scores.requires_grad_(self.learns)
            return layer

        return put_scores(model, self, make)


def k_for_settings(k_for: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Shares of single layers as provenance has them; nothing if there are none."""
    return {"k_for": [f"{pattern}={k}" for pattern, k in k_for]} if k_for else {}


def layer_shares(
    model: nn.Module,
    share: Fraction,
    k_for: tuple[tuple[str, str | float | Fraction], ...],
    layers: Collection[str],
) -> dict[str, Fraction]:
    """The share that each of the layers keeps. Raises UsageError for a pattern of ``k_for`` that
    matches none of them."""
    from randsurgery.surgery.initialisers import parse_fraction
    from randsurgery.surgery.roles import select_modules

    found = dict.fromkeys(layers, share)
    for pattern, k in k_for:
        own = parse_fraction(k, f"k of {pattern}")
        hits = select_modules(model, (pattern,)) & found.keys()
        if not hits:
            raise UsageError(f"--k-for {pattern} matches no layer that is masked")
        found |= dict.fromkeys(hits, own)
    return found
