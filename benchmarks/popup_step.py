"""One training step: edge-popup against dense training, sorting and kthvalue.

A step is zero_grad, forward, cross entropy, backward and an SGD step with momentum, on one fixed
random batch, in training mode, float32. Contenders, each a network of its own:

    dense      timm's network, every parameter learned
    popup      make_recipe, build, attach with k = 0.3: the scores are learned
    sort       the algorithm as published: every forward sorts the magnitudes of all scores
    kthvalue   the same, with torch.kthvalue for the threshold instead of the sort

The last three learn the same number of scores over the same random weights. On an accelerator
each step ends with a synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

import randsurgery
from benchmarks.timing import Action, Timings, in_turn, note, parser_for, report

K = 0.3
CLASSES = 10
CONTENDERS = ("dense", "popup", "sort", "kthvalue")


@dataclass(frozen=True)
class Case:
    """A network and the batch it is fed."""

    model: str
    batch: int
    size: int


CASES = {"resnet18": Case("resnet18", 128, 32), "resnet50": Case("resnet50", 8, 224)}


# --- the naive ways ------------------------------------------------------------------------------


def mask_by_sorting(magnitude: torch.Tensor, zeroed: int) -> torch.Tensor:
    """1 for all but the ``zeroed`` lowest magnitudes, by sorting all of them."""
    order = magnitude.flatten().argsort()
    mask = torch.ones_like(magnitude)
    mask.flatten()[order[:zeroed]] = 0
    return mask


def mask_by_kthvalue(magnitude: torch.Tensor, zeroed: int) -> torch.Tensor:
    """1 for all but the ``zeroed`` lowest magnitudes, by selecting the threshold."""
    if zeroed == 0:
        return torch.ones_like(magnitude)
    threshold = magnitude.flatten().kthvalue(zeroed).values
    return (magnitude > threshold).to(magnitude.dtype)


class GetSubnet(torch.autograd.Function):
    """Ramanujan et al., Algorithm 1: the mask forward, the identity backward."""

    @staticmethod
    def forward(
        ctx: Any,
        magnitude: torch.Tensor,
        zeroed: int,
        mask_of: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        return mask_of(magnitude, zeroed)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


class NaiveScores(nn.Module):
    """weight * GetSubnet(|scores|) as a parametrization."""

    def __init__(
        self, weight: torch.Tensor, mask_of: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.empty_like(weight))
        nn.init.kaiming_uniform_(self.scores, a=5**0.5)
        self.zeroed = int((1 - K) * weight.numel())
        self.mask_of = mask_of

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The masked weight."""
        mask: torch.Tensor = GetSubnet.apply(self.scores.abs(), self.zeroed, self.mask_of)
        return weight * mask


def attach_naively(
    model: nn.Module, mask_of: Callable[[torch.Tensor, int], torch.Tensor]
) -> nn.Module:
    """Scores on every convolution and linear weight, all else frozen."""
    model.requires_grad_(False)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        scores = NaiveScores(layer.weight, mask_of)
        parametrize.register_parametrization(layer, "weight", scores)
    return model


# --- measuring -----------------------------------------------------------------------------------


def make_network(contender: str, case: Case) -> nn.Module:
    """The network of one contender, on the CPU, in training mode."""
    if contender == "dense":
        dense: nn.Module = timm.create_model(case.model, num_classes=CLASSES)
        return dense.train()
    model = randsurgery.build(randsurgery.make_recipe(case.model, args={"num_classes": CLASSES}))
    if contender == "popup":
        randsurgery.attach(model, randsurgery.Popup(k=str(K)))
    else:
        attach_naively(model, mask_by_sorting if contender == "sort" else mask_by_kthvalue)
    return model.train()


def make_step(contender: str, case: Case, device: torch.device) -> Action:
    """One training step of a contender, ready to be repeated."""
    model = make_network(contender, case).to(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learned, lr=0.1, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (case.batch,), generator=generator).to(device)

    def step() -> None:
        optimiser.zero_grad()
        cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(case: Case, device: torch.device, rounds: int, warm_up: int) -> Timings:
    """All contenders in turn."""
    torch.manual_seed(0)
    steps = {contender: make_step(contender, case, device) for contender in CONTENDERS}
    return in_turn(steps, rounds, warm_up)


def main() -> None:
    """Run the cases asked for and print the report."""
    parser = parser_for("popup_step", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--device", choices=["cpu", "cuda", "all"], default="all")
    args = parser.parse_args()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    for name in CASES if args.case == "all" else [args.case]:
        for device in devices if args.device == "all" else [args.device]:
            note(f"{name} on {device}")
            found = measure(CASES[name], torch.device(device), args.rounds, args.warm_up)
            prefix = f"{name}/{device}"
            seconds |= {f"{prefix}/{key}": times for key, times in found.seconds.items()}
            for contender in CONTENDERS[1:]:
                ratios[f"{prefix}/{contender}/dense"] = found.ratio(contender, "dense")
    sizes = {n: {"batch": c.batch, "input": [3, c.size, c.size]} for n, c in CASES.items()}
    report(Timings(seconds), ratios, k=K, classes=CLASSES, rounds=args.rounds, cases=sizes)


if __name__ == "__main__":
    main()
