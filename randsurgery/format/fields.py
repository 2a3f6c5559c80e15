"""What the recipe's fields may hold: names, digests, floats as text."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

SHARED = "shared"


def as_given(value: Any) -> Any:
    """A recorded value as it was given: floats travel as canonical hexadecimal text, and what is
    not that, or no finite number, stays what it is."""
    try:
        number = float.fromhex(value) if isinstance(value, str) else math.nan
    except (ValueError, OverflowError):
        return value
    return number if math.isfinite(number) and number.hex() == value else value


def _checked_hex(text: str) -> str:
    if isinstance(as_given(text), str):
        raise ValueError(f"{text[:60]!r} is not a canonical finite hexadecimal float")
    return text


MAX_NAME = 400
MAX_PAYLOAD_NAME = 500  # MEMBER/TENSOR/SLOT: 64 + 1 + 400 + 1 + at most 20


def check_tensor_name(name: str, *, limit: int = MAX_NAME, ascii_only: bool = True) -> str:
    """A name that can be printed and can never be taken for a path. Raises ValueError."""
    plain = name.isprintable() and (name.isascii() or not ascii_only)
    if not 1 <= len(name) <= limit or not plain:
        letters = "ASCII characters" if ascii_only else "characters"
        raise ValueError(f"{name[:60]!r} is not a tensor name: 1 to {limit} printable {letters}")
    if name == "__metadata__" or name.startswith("/") or ".." in name or "\\" in name:
        raise ValueError(f"{name[:60]!r} is not a tensor name: no '..', '\\', leading '/'")
    return name


def check_member_name(name: str) -> str:
    """A name that is no path and no other owner's. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name == SHARED or ".." in name:
        raise ValueError(
            f"{name!r} is not a member name: letters, digits, '.', '_', '-', not 'shared'"
        )
    return name


HexFloat = Annotated[str, AfterValidator(_checked_hex)]
TensorName = Annotated[str, AfterValidator(check_tensor_name)]
MemberName = Annotated[str, AfterValidator(check_member_name)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**48)]
Word = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Shape = Annotated[tuple[Count, ...], Field(max_length=16)]
Text = Annotated[str, Field(max_length=1000)]
