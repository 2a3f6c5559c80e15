"""A slow and strict reader of the format, written from format.md alone.

It makes the tensors of all members, so that a fault anywhere refuses the whole file.
`python docs/read_format.py FILE [MEMBER]` lists name, dtype, shape and finished digest.
"""

import json
import math
import re
import sys
import zlib
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = dict[str, tuple[str, Array]]  # name -> (dtype as in format.md, elements)
Payload = Callable[[str, str, str, list[int] | None], Array]  # slot, digest, dtype, shape
WORDS = "F64 f8 F32 f4 F16 f2 BF16 u2 F8_E4M3 u1 F8_E5M2 u1 I64 i8 I32 i4 I16 i2 I8 i1 BOOL b1"
PAIRS = f"{WORDS} U64 u8 U32 u4 U16 u2 U8 u1".split()
NUMPY = {name: np.dtype("<" + kind) for name, kind in zip(PAIRS[::2], PAIRS[1::2], strict=True)}
FLOATS = ("F32", "F16", "BF16")  # what section 3 can make
NORMAL = np.array([NormalDist().inv_cdf((j + 0.5) / 65536) for j in range(65536)], "<f4")
NORMAL_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
MOST = 2**34  # bytes: this reader makes no larger tensor (section 1, last MUST NOT)
SAME = np.array([[1, -1], [-1, -1]], "i1")
FAULTS = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, zlib.error)
OTHER = np.array([[1, 1], [1, -1]], "i1")


def need(good: object, what: object) -> None:
    """Refuse, as the head of format.md defines it."""
    if not good:
        raise ValueError(f"refused: {what}")


def only(value: dict[str, Any], must: str, may: str = "") -> None:
    """Refuse missing and unknown fields (section 2)."""
    need(set(must.split()) <= value.keys() <= set(f"{must} {may}".split()), sorted(value))


def number(text: str) -> float:
    """A hex (section 2)."""
    value = float.fromhex(text)
    need(math.isfinite(value) and value.hex() == text, text)
    return value


def digest(*parts: Any) -> str:
    """D of section 6; parts that are not bytes stand for their canonical JSON (section 1)."""
    plain = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    joined = b"".join(p if isinstance(p, bytes) else plain(p).encode() for p in parts)
    return sha256(joined).hexdigest()[:32]


def finished(dtype: str, array: Array) -> str:
    """The finished digest of a tensor (section 6)."""
    return digest([dtype, array.shape], b"\0", array.tobytes())


def parse(text: str) -> Any:
    """JSON without a key twice, a number beyond float64, half a surrogate pair (section 1)."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(items)) == len(items), "a key twice")
        return dict(items)

    value = json.loads(text, object_pairs_hook=unique)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


def load(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a safetensors file (section 1)."""
    raw = path.read_bytes()
    end = begin = 8 + int.from_bytes(raw[:8], "little")
    need(8 < begin <= min(10**8 + 8, len(raw)) and raw[8:9] == b"{", "header")
    header, tensors = parse(raw[8:begin].decode()), {}
    metadata = header.pop("__metadata__", {})
    need(all(isinstance(text, str) for text in metadata.values()), "__metadata__")
    for name, field in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        only(field, "dtype shape data_offsets")
        shape, (start, stop), kind = field["shape"], field["data_offsets"], NUMPY[field["dtype"]]
        need(re.fullmatch(r"(?!/)(?!.*\.\.)[ -\[\]-~]{1,500}", name), name)
        need(all(type(n) is int and 0 <= n < 2**63 for n in [*shape, start, stop]), name)
        need(math.prod(n or 1 for n in shape) * kind.itemsize < 2**40 and len(shape) < 17, name)
        need(begin + start == end and stop - start == math.prod(shape) * kind.itemsize, name)
        end = begin + stop
        need(end <= len(raw), name)
        need(kind.kind != "b" or set(raw[begin + start : end]) <= {0, 1}, name)
        tensors[name] = field["dtype"], np.ndarray(shape, kind, raw, begin + start)
    need(end == len(raw), "bytes after the last tensor")
    return tensors, metadata


def stream(kind: str, size: int, *of: Any) -> Array:
    """Elements for a seed, stream key and role, with scale 1 (section 3)."""
    key = int.from_bytes(bytes.fromhex(digest(["randsurgery.philox.1", *of])), "little")
    words: Array = np.random.Philox(key=key, counter=0).random_raw(size // 2 + 1).astype("<u8")
    if kind == "sign":
        words = 2 * np.unpackbits(words.view("u1"), count=size, bitorder="little").astype("<f4") - 1
    elif kind == "normal":
        need(sha256(NORMAL.tobytes()).hexdigest() == NORMAL_SHA256, "the table made here")
        words = NORMAL[words.view("<u2")[:size]]
    else:
        need(kind == "uniform", kind)
        words = (words.view("<u4")[:size] // 256).astype("<f4") / 2**23 - 1
    return words


def scaled(values: Array, text: str, dtype: str) -> Array:
    """Float32 values times a float32 factor, rounded to the dtype (sections 3 and 5)."""
    factor = np.float32(number(text))
    need(dtype in FLOATS and float(factor) == number(text), f"{text} for {dtype}")
    values = values.astype("<f4") * factor
    values[np.isnan(values)] = np.nan
    return narrow(values, dtype)


def narrow(values: Array, dtype: str) -> Array:
    """Values in another dtype, ties to even (section 3)."""
    if dtype != "BF16":
        return values.astype(NUMPY[dtype])
    bits: Array = values.astype("<f4").view("<u4")
    bits = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return bits


def wide(array: Array, dtype: str) -> Array:
    """The values of a tensor: those of BF16 are the upper halves of float32 (section 1)."""
    return (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array


def chi(q: int) -> Array | None:
    """The matrix of chi(i - j) for i and j from 0 to q, if q is prime (section 4)."""
    if q < 2 or not all(q % p for p in range(2, math.isqrt(q) + 1)):
        return None
    values: Array = np.where(np.isin(np.arange(q), np.arange(1, q) ** 2 % q), 1, -1).astype("i1")
    matrix: Array = values[np.subtract.outer(np.arange(q + 1), np.arange(q + 1)) % q]
    return matrix


def hadamard(n: int) -> Array | None:
    """H(n) of section 4, if it exists."""
    if n <= 2:
        return OTHER[:n, :n]
    if n % 4 == 0 and n & (n - 1) and (paley := chi(n - 1)) is not None:
        paley[:, 0] = -1
        paley[0] = paley[np.diag_indices(n)] = 1
        return paley
    if n % 8 == 4 and n > 4 and (paley := chi(n // 2 - 1)) is not None:
        paley[0] = paley[:, 0] = 1
        np.fill_diagonal(paley, 0)
        return np.kron(paley, OTHER) + np.kron(np.eye(n // 2, dtype="i1"), SAME)
    for f in [2, *range(4, math.isqrt(n) + 1, 4)] if n % 4 == 0 else []:
        if n % f == 0 and (a := hadamard(f)) is not None and (b := hadamard(n // f)) is not None:
            return np.kron(a, b)
    return None


def head(rows: int, columns: int) -> Array:
    """The rows of a hadamard source with scale 1, one after another (section 4)."""
    need(1 <= columns <= 8192 and (columns > 63 or rows <= 2**columns), "hadamard")
    n = columns
    while (matrix := hadamard(n)) is None:
        n += 1
    found: dict[bytes, None] = {}
    for turn in range(4 + 4 * rows // n):
        flips = (
            stream("sign", columns, 0, f"hadamard-{turn}", "head") if turn else -np.ones(columns)
        )
        found.update((row.tobytes(), None) for row in matrix[:, :columns] * -flips.astype("i1"))
        if len(found) >= rows:
            return np.frombuffer(b"".join(list(found)[:rows]), "i1")
    raise ValueError("refused: too few rows of hadamard")


def unpacked(packed: Array, size: int) -> Array:
    """Bits, lowest first, whose padding is 0 (sections 4 and 5)."""
    bits = np.unpackbits(packed, bitorder="little").astype(bool)
    need(len(packed) == -(-size // 8) and not bits[size:].any(), "padding bits")
    return bits[:size]


def mask(payload: Array, overlay: dict[str, Any], size: int) -> Array:
    """The bits of a mask or scatter (section 5)."""
    count, gaps = overlay["count"], overlay["encoding"] == "gaps"
    need(gaps or overlay["encoding"] == "bits", "encoding")
    need(type(count) is int and 0 <= count <= size and payload.ndim == 1, "count")
    rare = min(count, size - count)
    limit = rare + size // 255 if gaps else -(-size // 8)
    inflater = zlib.decompressobj(-15)
    data = np.frombuffer(inflater.decompress(payload.tobytes(), limit + 1), "u1")
    need(inflater.eof and not inflater.unused_data and len(data) <= limit, "deflate stream")
    if gaps:
        marking = data != 255
        need(marking.sum() == rare and marking[-1:].all(), "gaps")
        bits = np.full(size, 2 * count > size)
        bits[(np.cumsum(data + marking.astype(int)) - 1)[marking]] ^= True
    else:
        bits = unpacked(data, size)
    need(bits.sum() == count, "number of ones")
    return bits


def made(
    name: str, entry: dict[str, Any], payload: Payload, base: Callable[[str], Tensors]
) -> Array:
    """The source of an entry (section 4)."""
    dtype, shape, source = entry["dtype"], entry["shape"], entry["source"]
    need(len(shape) < 17 and all(type(n) is int and 0 <= n < 2**48 for n in shape), name)
    need(math.prod(n or 1 for n in shape) * NUMPY[dtype].itemsize < MOST, name)
    size = math.prod(shape)
    match source:
        case {"kind": "stored", "digest": want, **rest} if not rest:
            return payload("source", want, dtype, shape)
        case {"kind": "base", "base": key, "tensor": tensor, **rest} if not rest:
            found, array = base(key)[tensor]
            need((found, list(array.shape)) == (dtype, shape), f"base tensor {tensor}")
            return array
        case {"kind": "constant", "value": text, **rest} if not rest and dtype[:2] != "F8":
            one = narrow(np.array([number(text)]), dtype)
            need(wide(one, dtype).item() == number(text), f"{text} as {dtype}")
            return np.full(shape, one)
        case {"kind": "random", "distribution": kind, "seed": seed, "scale": text, **rest}:
            need(type(seed) is int and 0 <= seed < 2**63 and rest.keys() <= {"stream"}, source)
            key = rest.get("stream")
            values = stream(kind, size, seed, name if key is None else key, "weight")
        case {"kind": "hadamard", "scale": text, **rest} if not rest:
            values = head(*shape)
        case {"kind": "signs", "scale": text, "digest": want, **rest} if not rest:
            bits = unpacked(payload("source", want, "U8", [-(-size // 8)]), size)
            values = np.where(bits, 1, -1)
        case _:
            raise ValueError(f"refused: {source}")
    result: Array = scaled(values, text, dtype).reshape(shape)
    return result


def changed(array: Array, dtype: str, overlay: dict[str, Any], payload: Payload) -> Array:
    """A tensor under one overlay (section 5)."""
    array = np.array(array, order="C")
    flat, shape = array.reshape(-1), list(array.shape)
    match overlay:
        case {"kind": "mask", "encoding": _, "count": _, "digest": want, **rest} if not rest:
            flat[~mask(payload("mask", want, "U8", None), overlay, flat.size)] = 0
        case {"kind": "scatter", "encoding": _, "count": count, "digest": want, **rest}:
            only(rest, "values_digest")
            bits = mask(payload("mask", want, "U8", None), overlay, flat.size)
            flat[bits] = payload("values", rest["values_digest"], dtype, [count])
        case {"kind": "slice", "dim": dim, "count": count, "digest": want, **rest} if not rest:
            need(type(dim) is type(count) is int and dim >= 0 and 0 <= count <= shape[dim], overlay)
            shape[dim] = count
            array[(slice(None),) * dim + (slice(count),)] = payload("slice", want, dtype, shape)
        case {"kind": "replace", "digest": want, **rest} if not rest:
            array = payload("tensor", want, dtype, shape)
        case {"kind": "scale", "factor": text, **rest} if not rest:
            array = scaled(wide(flat, dtype), text, dtype).reshape(shape)
        case _:
            raise ValueError(f"refused: {overlay}")
    return array


def members(path: Path, bases: dict[str, Tensors]) -> dict[str, Tensors]:
    """The tensors of every member of a file (section 2)."""
    files, metadata = load(path)
    recipe = parse(metadata["randsurgery"])
    only(recipe, "format version", "model input tensors members bases backbone_id notes")
    need(json.dumps([recipe["format"], recipe["version"]]) == '["randsurgery", 0]', "version")
    entries, unused = recipe.get("tensors", {}), set(files)

    def payload(name: str, want: str, dtype: str, shape: list[int] | None) -> Array:
        unused.discard(name)
        found, array = files[name]
        need(found == dtype and shape in (None, list(array.shape)), f"payload {name}")
        need(digest(array.tobytes()) == want, f"digest of payload {name}")
        return array

    @cache
    def base(key: str) -> Tensors:
        about = recipe["bases"][key]
        only(about, "identity", "file origin revision")
        found = bases.get(key)
        if found is None:
            need(not re.search(r"[/\\:\x00-\x1f]|\.\.", about["file"]), about)
            beside = path.parent / about["file"]
            need(beside.is_file(), about)
            found = load(beside)[0]
        rows = (([n, d, a.shape], b"\0", a.tobytes()) for n, (d, a) in sorted(found.items()))
        need(digest(*(part for row in rows for part in row)) == about["identity"], about)
        return found

    def finish(
        owner: str, name: str, own: Any, before: tuple[str, Array] | None
    ) -> tuple[str, Array]:
        def at(prefix: str) -> Payload:
            return lambda slot, *what: payload(f"{owner}/{name}/{prefix}{slot}", *what)

        only(
            own, *(("overlays", "digest") if before else ("dtype shape source", "overlays digest"))
        )
        dtype, array = before or (own["dtype"], made(name, own, at(""), base))
        for index, overlay in enumerate(own.get("overlays", [])):
            array = changed(array, dtype, overlay, at(f"{index}."))
        need(own.get("digest") in (None, finished(dtype, array)), f"finished digest of {name}")
        return dtype, array

    for key in recipe.get("bases", {}):
        base(key)
    shared = {name: finish("shared", name, entry, None) for name, entry in entries.items()}
    result: dict[str, Tensors] = {}
    for member in recipe.get("members", [{}]):
        only(member, "", "name tensors scores head classes dataset provenance")
        owner = member.get("name", "main")
        need(re.fullmatch(r"(?!shared$)(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,63}", owner), owner)
        need(owner not in result, f"two members {owner}")
        result[owner] = dict(shared)
        for name, own in member.get("tensors", {}).items():
            if "entry" in own:
                only(own, "entry")
            before = None if "entry" in own else shared[name]
            result[owner][name] = finish(owner, name, own.get("entry", own), before)
        for name, want in member.get("scores", {}).items():
            payload(f"{owner}/{name}/scores", want, "F32", list(result[owner][name][1].shape))
    need(result and not unused, f"tensors that no member needs: {sorted(unused)}")
    return result


def read(
    path: str | Path, member: str | None = None, bases: dict[str, Tensors] | None = None
) -> Tensors:
    """The tensors of a member, or of the only one; ValueError where a reader must refuse."""
    try:
        with np.errstate(all="ignore"):
            found = members(Path(path), bases or {})
    except FAULTS as error:
        raise ValueError(f"refused: {error!r}") from error
    need(member in found or (member is None and len(found) == 1), f"members: {sorted(found)}")
    return found[member or next(iter(found))]


if __name__ == "__main__":
    for name, (dtype, array) in sorted(read(sys.argv[1], (*sys.argv, None)[2]).items()):
        print(name, dtype, list(array.shape), finished(dtype, array))
