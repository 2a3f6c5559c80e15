"""What the training loop costs beside forward, backward and optimiser, in-memory data.

One epoch of ``training.loop.fit`` on random images that live in memory (3x32x32, crop and flip),
against the same number of steps of forward, loss, backward and optimiser alone on batches that are
ready. The share is what the loop adds: order, augmentation, normalisation, schedule, sums.
"""

from __future__ import annotations

import time

import torch
from torch.nn.functional import cross_entropy

import randsurgery
from benchmarks.timing import Timings, in_turn, note, parser_for, report
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.modules import build
from randsurgery.training.catalogue import input_for
from randsurgery.training.data import Resident
from randsurgery.training.loop import Hooks, fit
from randsurgery.training.settings import TrainSettings

CLASSES = 10


def main() -> None:
    """Measure and print the report."""
    parser = parser_for("input_pipeline", __doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    count = args.batch * args.steps
    images = torch.randint(256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    names = tuple(str(c) for c in range(CLASSES))
    look = input_for("torch/cifar10", {})
    train = Resident(images, labels, names, look)
    test = Resident(images[: args.batch], labels[: args.batch], names, look)
    start = randsurgery.make_recipe(args.model, args={"num_classes": CLASSES})
    settings = TrainSettings(epochs=1, batch_size=args.batch, lr=0.01)
    model = learn_plan(build(start), start)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learned, lr=0.01, momentum=0.9)
    batches = list(train.training(settings, 0))
    looped: list[float] = []

    def loop() -> None:
        """The epoch up to its last step; what follows is evaluation."""
        began = time.perf_counter()
        last = began

        def on_step(step: int, loss: float) -> None:
            nonlocal last
            last = time.perf_counter()

        fit(model, train, test, settings, Hooks(on_step=on_step))
        looped.append(last - began)

    def bare() -> None:
        model.train()
        for x, y in batches:
            optimiser.zero_grad()
            cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimiser.step()

    note(f"{args.model}, {args.steps} steps a round")
    found = in_turn({"loop": loop, "bare": bare}, args.rounds)
    seconds = {"loop": looped[1:], "bare": found.seconds["bare"]}  # without the warm-up
    timings = Timings(seconds)
    share = 1 - timings.median("bare") / timings.median("loop")
    report(timings, {"share outside": share}, model=args.model, batch=args.batch, steps=args.steps)


if __name__ == "__main__":
    main()
