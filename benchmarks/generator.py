"""Random numbers: our generator against torch's, 25 million float32 values.

Every contender fills memory that exists and has been written before, so that page faults count
for nobody. ``sign``, ``normal``, ``uniform`` are ours, on one thread; ``torch_normal`` and
``torch_uniform`` are ``normal_()`` and ``uniform_()`` of a CPU tensor.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.timing import Action, in_turn, parser_for, report
from randsurgery.format.generator import Distribution, F32Array, generate


def ours(distribution: Distribution, out: F32Array) -> Action:
    """Fill ``out`` from our generator."""
    return lambda: generate(distribution, out.size, 0.5, seed=0, stream="benchmark", out=out)


def main() -> None:
    """Measure and print the report."""
    parser = parser_for("generator", __doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--size", type=int, default=25_000_000)
    args = parser.parse_args()
    out = np.zeros(args.size, dtype=np.float32)
    tensor = torch.from_numpy(out)
    actions: dict[str, Action] = {
        "sign": ours("sign", out),
        "normal": ours("normal", out),
        "uniform": ours("uniform", out),
        "torch_normal": tensor.normal_,
        "torch_uniform": tensor.uniform_,
    }
    timings = in_turn(actions, args.rounds)
    ratios = {
        "sign/torch_normal": timings.ratio("sign", "torch_normal"),
        "normal/torch_normal": timings.ratio("normal", "torch_normal"),
        "uniform/torch_uniform": timings.ratio("uniform", "torch_uniform"),
    }
    report(timings, ratios, size=args.size, rounds=args.rounds)


if __name__ == "__main__":
    main()
