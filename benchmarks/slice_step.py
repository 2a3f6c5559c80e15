"""Partial training at fraction 0.1 against dense training: time, memory, file.

A step is zero_grad, forward, cross entropy, backward and an SGD step with momentum, on one fixed
random batch, in training mode, float32. Both networks are the same random one; one learns
everything, the other a tenth of every layer's filters, all norms and the classifier. Memory is that
of gradients and optimiser state, by their bytes after a step; the file is that of the learned
network against the dense weights.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import randsurgery
from benchmarks.popup_step import CASES, CLASSES, Case
from benchmarks.timing import Action, Timings, in_turn, note, parser_for, report
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.modules import build, meta_module
from randsurgery.surgery.plans import Freeze, everything, make_plan, with_plan

FRACTION = "0.1"


@dataclass
class Run:
    """A network in training and its optimiser."""

    start: Checkpoint
    model: nn.Module
    optimiser: torch.optim.Optimizer
    images: torch.Tensor
    labels: torch.Tensor

    def step(self) -> None:
        """One training step."""
        self.optimiser.zero_grad()
        cross_entropy(self.model(self.images), self.labels).backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        if self.images.device.type == "cuda":
            torch.cuda.synchronize()

    def state_bytes(self) -> int:
        """Bytes of gradients and of the optimiser's state after a step."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        state = [
            value
            for part in self.optimiser.state.values()
            for value in part.values()
            if isinstance(value, torch.Tensor)
        ]
        return sum(t.numel() * t.element_size() for t in (*gradients, *state))


def make_run(case: Case, device: torch.device, *, partial: bool) -> Run:
    """The dense or the partial contender."""
    start = randsurgery.make_recipe(case.model, "kaiming-normal", args={"num_classes": CLASSES})
    shell = meta_module(start)
    plan = make_plan(shell, Freeze(fraction=FRACTION)) if partial else everything(shell)
    start = with_plan(start, plan)
    model = learn_plan(build(start).to(device), start).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learned, lr=0.01, momentum=0.9, weight_decay=1e-4)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=draw).to(device)
    labels = torch.randint(CLASSES, (case.batch,), generator=draw).to(device)
    return Run(start, model, optimiser, images, labels)


def file_ratio(run: Run) -> float:
    """The learned network's file against its dense float32 weights."""
    with tempfile.TemporaryDirectory() as folder:
        written = randsurgery.save(Path(folder) / "slim.safetensors", run.start, run.model.cpu())
    state: dict[str, torch.Tensor] = build(run.start).state_dict()
    return written / sum(t.numel() * t.element_size() for t in state.values())


def main() -> None:
    """Run the cases asked for and print the report."""
    parser = parser_for("slice_step", __doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    for name in CASES if args.case == "all" else [args.case]:
        note(f"{name} on {device}")
        runs = {kind: make_run(CASES[name], device, partial=kind == "slice")
                for kind in ("dense", "slice")}  # fmt: skip
        actions: dict[str, Action] = {kind: run.step for kind, run in runs.items()}
        found = in_turn(actions, args.rounds, args.warm_up)
        seconds |= {f"{name}/{kind}": times for kind, times in found.seconds.items()}
        ratios[f"{name}/step"] = found.ratio("slice", "dense")
        memory = {kind: run.state_bytes() for kind, run in runs.items()}
        ratios[f"{name}/gradients and optimiser"] = memory["slice"] / memory["dense"]
        ratios[f"{name}/file"] = file_ratio(runs["slice"])
    report(Timings(seconds), ratios, fraction=FRACTION, classes=CLASSES, rounds=args.rounds)


if __name__ == "__main__":
    main()
