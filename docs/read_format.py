"""An independent reader, written from format.md alone; `python docs/read_format.py FILE` lists."""

import hashlib
import json
import math
import os
import sys
import zlib
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = dict[str, tuple[str, Array]]  # name -> (dtype as format.md names it, elements)
KINDS = "F64 <f8 F32 <f4 F16 <f2 BF16 <u2 F8_E4M3 u1 F8_E5M2 u1 BOOL ? I64 <i8 I32 <i4 I16 <i2 "
WORDS = (KINDS + "I8 i1 U64 <u8 U32 <u4 U16 <u2 U8 u1").split()
NUMPY = {WORDS[i]: np.dtype(WORDS[i + 1]) for i in range(0, len(WORDS), 2)}
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # of this machine, in bytes
NORMAL = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"  # section 3
# Sections 2, 4, 5: the fields an object must have, and after `|` those it may have.
FIELDS = {
    "recipe": "format version | model input tensors members bases backbone_id notes",
    "entry": "dtype shape source | overlays digest",
    "member": "| name tensors scores head classes dataset provenance",
    "own": "| overlays digest entry",
    "base-id": "identity | file origin revision",
    "random": "kind distribution seed scale | stream",
    "constant": "kind value |",
    "hadamard": "kind scale |",
    "signs": "kind scale digest |",
    "base": "kind base tensor |",
    "stored": "kind digest |",
    "mask": "kind encoding count digest |",
    "scatter": "kind encoding count digest values_digest |",
    "slice": "kind dim count digest |",
    "replace": "kind digest |",
    "scale": "kind factor |",
}


def need(good: object, what: str) -> None:
    """Refuse, as the head of format.md defines it."""
    if not good:
        raise ValueError(what)


def digest(*parts: Any) -> str:
    """Section 6: D, of bytes and of other values as canonical JSON (section 1) and a zero byte."""
    dumped = (json.dumps(p, sort_keys=True, separators=(",", ":")).encode() for p in parts)
    ...
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def parse(text: str) -> Any:
    """Section 1: strict JSON."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(items)) == len(items), "a key occurs twice")
        return dict(items)

    def number(text: str) -> float:
        need(math.isfinite(float(text)), "a number beyond float64")
        return float(text) if ... else int(text)

    return json.loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=number)
