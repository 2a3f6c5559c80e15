"""Bit masks: bytes against the entropy bound and raw bits, and the time to encode and decode.

First masks of 25 million independent random bits at several k: ``ratios`` has their bytes over
Shannon's bound and over one bit an element, ``milliseconds`` the medians of encoding and decoding,
on one thread. Then a mask for every convolution and linear weight of ResNet-50 (1000 classes) at
k = 0.3: all decoded on one thread, and on the threads that ``load`` uses. Decoding means payload
to packed bits, checks included; neither reading the file nor its digests.
"""

from __future__ import annotations

import numpy as np

from benchmarks.timing import Action, Timings, in_turn, note, parser_for, report
from randsurgery.format.checkpoint import in_threads
from randsurgery.format.masks import Encoding, Mask, decode, encode, entropy_bytes
from randsurgery.surgery.architectures import build_meta, spec_of
from randsurgery.surgery.roles import tensor_roles

SHARES = (0.01, 0.05, 0.1, 0.3, 0.5)
NETWORK, NETWORK_K = "resnet50", 0.3


def random_mask(size: int, k: float, seed: int) -> Mask:
    """Independent bits, each 1 with probability k."""
    return Mask.of(np.random.default_rng(seed).random(size, dtype=np.float32) < k)


def one_share(k: float, size: int, rounds: int) -> tuple[Timings, dict[str, float], Encoding]:
    """Encode and decode one large mask: times, byte ratios and the encoding that won."""
    mask = random_mask(size, k, seed=0)
    encoding, payload = encode(mask)
    back = decode(payload, encoding, mask.size, mask.count)
    if not np.array_equal(back.packed, mask.packed):
        raise SystemExit(f"k = {k}: the mask came back changed")
    ratios = {
        f"bytes/entropy k={k}": len(payload) / entropy_bytes(mask.size, mask.count),
        f"bytes/raw k={k}": len(payload) / mask.packed.size,
    }
    actions: dict[str, Action] = {
        f"encode k={k}": lambda: encode(mask),
        f"decode k={k}": lambda: decode(payload, encoding, mask.size, mask.count),
    }
    return in_turn(actions, rounds), ratios, encoding


def network_sizes() -> dict[str, int]:
    """Elements of every convolution and linear weight of the network, by name."""
    model = build_meta(spec_of(NETWORK, {}))
    state = model.state_dict()
    roles = tensor_roles(model)
    return {name: state[name].numel() for name, role in roles.items() if role.role == "weight"}


def whole_network(rounds: int) -> tuple[Timings, dict[str, float]]:
    """Decode all masks of the network, on one thread and on load's: times, byte ratio."""
    sizes = network_sizes()
    masks = {n: random_mask(size, NETWORK_K, i) for i, (n, size) in enumerate(sizes.items())}
    encoded = {name: encode(mask) for name, mask in masks.items()}

    def decode_one(name: str) -> Mask:
        encoding, payload = encoded[name]
        return decode(payload, encoding, masks[name].size, masks[name].count, name)

    total = sum(len(payload) for _, payload in encoded.values())
    bound = sum(entropy_bytes(mask.size, mask.count) for mask in masks.values())
    actions: dict[str, Action] = {
        f"decode {NETWORK} k={NETWORK_K}, one thread": lambda: [decode_one(n) for n in masks],
        f"decode {NETWORK} k={NETWORK_K}, as load": lambda: list(in_threads(decode_one, masks)),
    }
    ratios = {f"bytes/entropy {NETWORK} k={NETWORK_K}": total / bound}
    return in_turn(actions, rounds, warm_up=2), ratios


def main() -> None:
    """Measure and print the report."""
    parser = parser_for("masks", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=25_000_000)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    encodings: dict[str, Encoding] = {}
    for k in SHARES:
        note(f"k = {k}")
        timings, found, encodings[str(k)] = one_share(k, args.size, args.rounds)
        seconds |= timings.seconds
        ratios |= found
    note(NETWORK)
    timings, found = whole_network(3 * args.rounds)
    every = Timings(seconds | timings.seconds)
    milliseconds = {name: 1000 * median for name, median in every.medians().items()}
    report(every, ratios | found, milliseconds=milliseconds, encodings=encodings,
           size=args.size, rounds=args.rounds)  # fmt: skip


if __name__ == "__main__":
    main()
