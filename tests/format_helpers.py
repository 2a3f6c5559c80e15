"""A slow second reader of the format, written from docs/format.md alone, and small builders.

The reader works element by element on Python numbers and shares no code with the package: where
the two agree bit for bit, both follow the text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# --- generator (section 3) -----------------------------------------------------------------------

M64 = (1 << 64) - 1


def philox_block(counter: int, key: int) -> list[int]:
    """Philox4x64-10 of a 256-bit counter and a 128-bit key: four 64-bit words."""
    c = [counter >> 64 * i & M64 for i in range(4)]
    k0, k1 = key & M64, key >> 64
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [b >> 64 ^ c[1] ^ k0, b & M64, a >> 64 ^ c[3] ^ k1, a & M64]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & M64, (k1 + 0xBB67AE8584CAA73B) & M64
    return c


def stream_words(seed: int, stream: str, role: str) -> Iterator[int]:
    """The 64-bit words of a stream, without end."""
    text = json.dumps(["randsurgery.philox.1", seed, stream, role], separators=(",", ":"))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    counter = 1
    while True:
        yield from philox_block(counter, key)
        counter += 1


def stream_bytes(count: int, seed: int, stream: str, role: str) -> bytes:
    words = stream_words(seed, stream, role)
    return b"".join(next(words).to_bytes(8, "little") for _ in range(-(-count // 8)))[:count]


def f32(value: float) -> float:
    """Round to float32; a product of two float32 values is exact in Python's floats before."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


@functools.cache
def normal_table() -> list[float]:
    inverse = statistics.NormalDist().inv_cdf
    return [f32(inverse((i + 0.5) / 65536)) for i in range(65536)]


def random_values(
    distribution: str, size: int, scale: float, seed: int, stream: str, role: str = "weight"
) -> list[float]:
    if distribution == "sign":
        raw = stream_bytes(-(-size // 8), seed, stream, role)
        return [scale if raw[i // 8] >> i % 8 & 1 else -scale for i in range(size)]
    if distribution == "normal":
        raw = stream_bytes(2 * size, seed, stream, role)
        table = normal_table()
        return [f32(table[raw[2 * i] + 256 * raw[2 * i + 1]] * scale) for i in range(size)]
    raw = stream_bytes(4 * size, seed, stream, role)
    words = struct.unpack(f"<{size}I", raw)
    return [f32(((word >> 8) - (1 << 23)) / (1 << 23) * scale) for word in words]


# --- hadamard (section 4) ------------------------------------------------------------------------


def is_prime(n: int) -> bool:
    return n > 1 and all(n % p for p in range(2, math.isqrt(n) + 1))


def chi(a: int, q: int) -> int:
    power = pow(a % q, (q - 1) // 2, q)
    return -1 if power == q - 1 else power


@functools.cache
def hadamard(n: int) -> tuple[tuple[int, ...], ...] | None:
    if n == 1:
        return ((1,),)
    if n == 2:
        return ((1, 1), (1, -1))
    if n % 4:
        return None
    power_of_two = bin(n).count("1") == 1
    span = range(n)
    if not power_of_two and is_prime(n - 1):
        q = n - 1

        def one(i: int, j: int) -> int:
            if i == 0 or i == j:
                return 1
            return -1 if j == 0 else chi(i - j, q)

        return tuple(tuple(one(i, j) for j in span) for i in span)
    if not power_of_two and n % 8 == 4 and is_prime(n // 2 - 1):
        q = n // 2 - 1

        def two(i: int, j: int) -> int:
            (a, r), (b, s) = divmod(i, 2), divmod(j, 2)
            if a == b:
                return -1 if r or s else 1
            c = 1 if a == 0 or b == 0 else chi(a - b, q)
            return -c if r and s else c

        return tuple(tuple(two(i, j) for j in span) for i in span)
    for factor in [2, *range(4, math.isqrt(n) + 1, 4)]:
        if n % factor:
            continue
        outer, inner = hadamard(factor), hadamard(n // factor)
        if outer and inner:
            m = n // factor
            return tuple(
                tuple(outer[i // m][j // m] * inner[i % m][j % m] for j in span) for i in span
            )
    return None


def hadamard_rows(rows: int, columns: int) -> list[tuple[int, ...]]:
    order = columns
    while hadamard(order) is None:
        order += 1
    found: dict[tuple[int, ...], None] = {}
    turn = 0
    while len(found) < rows:
        flips = [1] * columns
        if turn:
            raw = stream_bytes(-(-columns // 8), 0, f"hadamard-{turn}", "head")
            flips = [-1 if raw[j // 8] >> j % 8 & 1 else 1 for j in range(columns)]
        for row in hadamard(order):
            found.setdefault(tuple(a * b for a, b in zip(row, flips, strict=False)))
        turn += 1
    return list(found)[:rows]


# --- masks (section 5) ---------------------------------------------------------------------------


def mask_bits(payload: bytes, encoding: str, size: int, count: int) -> list[int]:
    data = zlib.decompress(payload, -15)
    if encoding == "bits":
        return [data[i // 8] >> i % 8 & 1 for i in range(size)]
    symbol = 1 if 2 * count <= size else 0
    bits = [1 - symbol] * size
    position = 0
    for byte in data:
        position += byte
        if byte != 255:
            bits[position] = symbol
            position += 1
    return bits


def pack_bits(bits: list[int]) -> bytes:
    out = bytearray(-(-len(bits) // 8))
    for i, bit in enumerate(bits):
        out[i // 8] |= bool(bit) << i % 8
    return bytes(out)


def gap_bytes(bits: list[int]) -> bytes:
    symbol = 1 if 2 * sum(bits) <= len(bits) else 0
    out, run = bytearray(), 0
    for bit in bits:
        if bit != symbol:
            run += 1
            continue
        out += b"\xff" * (run // 255) + bytes([run % 255])
        run = 0
    return bytes(out)


def deflate(data: bytes) -> bytes:
    """Raw deflate by zlib's default strategy: any valid stream must be readable."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()


# --- a whole file --------------------------------------------------------------------------------

WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
Raw = tuple[str, list[int], bytes]


def round_to(dtype: str, value: float) -> bytes:
    """The bytes of a float32 value rounded to F32, F16 or BF16, ties to even."""
    if dtype == "F32":
        return struct.pack("<f", value)
    if dtype == "F16":
        return struct.pack("<e", value)
    high, low = divmod(struct.unpack("<I", struct.pack("<f", value))[0], 1 << 16)
    return struct.pack("<H", high + (low > 0x8000 or (low == 0x8000 and high % 2 == 1)))


def value_of(dtype: str, raw: bytes) -> float:
    if dtype == "BF16":
        return struct.unpack("<f", b"\0\0" + raw)[0]
    return struct.unpack({"F32": "<f", "F16": "<e"}[dtype], raw)[0]


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Raw]]:
    """(metadata, tensors) of a safetensors file that is known to be good."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    return metadata, {
        name: (
            info["dtype"],
            info["shape"],
            data[start + info["data_offsets"][0] : start + info["data_offsets"][1]],
        )
        for name, info in header.items()
    }


def naive_tensor(
    recipe: dict[str, Any],
    payloads: dict[str, Raw],
    member: str,
    name: str,
    bases: dict[str, dict[str, Raw]],
) -> Raw:
    """One finished tensor: the sentence read from left to right, every element on its own."""
    who = next(m for m in recipe["members"] if m.get("name", "main") == member)
    own = who.get("tensors", {}).get(name, {})
    if "entry" in own:
        owner, entry = member, own["entry"]
    else:
        owner, entry = "shared", recipe["tensors"][name]
    dtype, shape, source = entry["dtype"], entry["shape"], entry["source"]
    size, width = math.prod(shape), WIDTH[dtype]

    def cells(raw: bytes) -> list[bytes]:
        return [raw[i : i + width] for i in range(0, len(raw), width)]

    def payload(slot: str, who: str = owner) -> bytes:
        return payloads[f"{who}/{name}/{slot}"][2]

    kind = source["kind"]
    if kind == "stored":
        elements = cells(payload("source"))
    elif kind == "base":
        elements = cells(bases[source["base"]][source["tensor"]][2])
    elif kind == "constant":
        value = float.fromhex(source["value"])
        if dtype in ("F32", "F16", "BF16"):
            elements = [round_to(dtype, value)] * size
        else:
            elements = [int(value).to_bytes(width, "little", signed=dtype[0] == "I")] * size
    else:
        scale = float.fromhex(source["scale"])
        if kind == "random":
            stream = source.get("stream", name)
            values = random_values(source["distribution"], size, scale, source["seed"], stream)
        elif kind == "signs":
            raw = payload("source")
            values = [scale if raw[i // 8] >> i % 8 & 1 else -scale for i in range(size)]
        else:
            values = [sign * scale for row in hadamard_rows(*shape) for sign in row]
        elements = [round_to(dtype, value) for value in values]

    steps = [(owner, i, o) for i, o in enumerate(entry.get("overlays", []))]
    steps += [(member, i, o) for i, o in enumerate(own.get("overlays", []))]
    for who_brings, index, overlay in steps:
        kind = overlay["kind"]
        if kind in ("mask", "scatter"):
            packed = payload(f"{index}.mask", who_brings)
            bits = mask_bits(packed, overlay["encoding"], size, overlay["count"])
        if kind == "mask":
            elements = [e if b else bytes(width) for e, b in zip(elements, bits, strict=True)]
        elif kind == "scatter":
            values = iter(cells(payload(f"{index}.values", who_brings)))
            elements = [next(values) if b else e for e, b in zip(elements, bits, strict=True)]
        elif kind == "replace":
            elements = cells(payload(f"{index}.tensor", who_brings))
        elif kind == "scale":
            factor = float.fromhex(overlay["factor"])
            elements = [round_to(dtype, f32(value_of(dtype, e) * factor)) for e in elements]
        else:
            dim, count = overlay["dim"], overlay["count"]
            values = iter(cells(payload(f"{index}.slice", who_brings)))
            inner = math.prod(shape[dim + 1 :])
            elements = [
                next(values) if i // inner % shape[dim] < count else e
                for i, e in enumerate(elements)
            ]
    return dtype, shape, b"".join(elements)


# --- builders ------------------------------------------------------------------------------------


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor_header(dtype: Any, shape: Any, start: Any, stop: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}
