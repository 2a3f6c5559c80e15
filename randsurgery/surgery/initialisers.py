"""The papers' weight distributions as random sources.

Ramanujan et al., Section 4.1: Kaiming normal has standard deviation sqrt(2 / fan_in), and the
signed constant is that deviation with a random sign. Section 4.4 takes the Xavier forms, which
Zhou et al. use. Section 4.5: the scaled forms are multiplied by 1 / sqrt(k), k being the share of
weights that is kept.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Literal, get_args

from randsurgery.errors import UsageError, near
from randsurgery.format.generator import Distribution
from randsurgery.format.recipe import RandomSource
from randsurgery.format.tensors import f32, hex_float

Init = Literal[
    "signed-constant",
    "kaiming-normal",
    "kaiming-uniform",
    "xavier-normal",
    "xavier-uniform",
    "xavier-constant",
]
INITS: tuple[str, ...] = get_args(Init)

_DISTRIBUTION: dict[str, Distribution] = {
    "constant": "sign",
    "normal": "normal",
    "uniform": "uniform",
}


def standard_deviation(init: Init, fan_in: int, fan_out: int) -> float:
    """Kaiming (gain sqrt 2, fan in): sqrt(2 / fan_in). Xavier: sqrt(2 / (fan_in + fan_out))."""
    return math.sqrt(2 / (fan_in + fan_out if init.startswith("xavier") else fan_in))


def random_source(
    init: Init, fan_in: int, fan_out: int, seed: int, scaled_for: Fraction | None = None
) -> RandomSource:
    """The source of one weight. ``scaled_for`` is k if the deviation is to be over sqrt(k).

    The scale is computed in float64 and rounded once; the stored value is normative.
    """
    deviation = standard_deviation(init, fan_in, fan_out)
    if scaled_for is not None:
        deviation /= math.sqrt(scaled_for)
    distribution = _DISTRIBUTION[init.rsplit("-", 1)[1]]
    half_width = deviation * math.sqrt(3) if distribution == "uniform" else deviation
    return RandomSource(distribution=distribution, seed=seed, scale=hex_float(f32(half_width)))


def embedding_source(init: Init, seed: int) -> RandomSource:
    """The source of position embeddings and tokens: deviation 1, that of the patch embeddings they
    are added to. Architectures start them near 0.02 and learn them larger; a network whose
    positions stay at 0.02 sees its patches as a bag (docs/log.md has the figures)."""
    distribution = _DISTRIBUTION[init.rsplit("-", 1)[1]]
    half_width = math.sqrt(3) if distribution == "uniform" else 1.0
    return RandomSource(distribution=distribution, seed=seed, scale=hex_float(f32(half_width)))


def check_init(name: str) -> Init:
    """The name of an initialiser. Raises UsageError listing them."""
    for init in get_args(Init):
        if init == name:
            checked: Init = init
            return checked
    raise UsageError(f"unknown --init {name!r}, expected {', '.join(INITS)}{near(name, INITS)}")


def check_seed(seed: int) -> int:
    """The seed itself. Raises UsageError unless it is an integer from 0 to 2^63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise UsageError(f"a seed must be an integer from 0 to 2^63 - 1, found {seed!r:.60}")
    return seed


def parse_fraction(text: str | float | Fraction, what: str) -> Fraction:
    """A share in (0, 1] as an exact number: 0.9 is nine tenths, not the float beside it."""
    try:
        if re.search(r"[eE][+-]?\d{4}", str(text)):
            raise ValueError  # an exact power of ten would take all memory
        value = text if isinstance(text, Fraction) else Fraction(str(text).strip())
    except (ValueError, ZeroDivisionError):
        raise UsageError(
            f"{what} must be a number in (0, 1], found {str(text)!r:.60}{_of_percent(str(text))}"
        ) from None
    if not 0 < value <= 1:
        raise UsageError(
            f"{what} must lie in (0, 1], found {str(text)!r:.60}{_of_percent(str(text))}"
        )
    return value


def _of_percent(text: str) -> str:
    """``; did you mean 0.3?`` for ``30`` and ``30%``."""
    found = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,6})?)\s*%?\s*", text)
    share = float(found[1]) / 100 if found else 0
    return f"; did you mean {share:g}?" if 0.01 <= share <= 1 else ""


def kept_count(k: Fraction, size: int) -> int:
    """How many of ``size`` weights stay: all but the lowest int((1 - k) * size), exactly."""
    return size - int((1 - k) * size)
