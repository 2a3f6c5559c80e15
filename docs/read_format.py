"""A reader of the checkpoint format in NumPy, written from format.md alone.

It rebuilds the tensors of one member and compares the layout of the file, every payload it uses,
the identities of the bases and the finished digests. It is no validator: most fields of the recipe
it takes at their word, and it does not look at what this member does not need (scores, others).
`python docs/read_format.py FILE [MEMBER]` lists name, dtype, shape and finished digest.
"""

import hashlib
import json
import math
import sys
import zlib
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = dict[str, tuple[str, Array]]  # name -> dtype as in format.md, elements (BF16: bits)
NUMPY = {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "FIU" for n in (1, 2, 4, 8)}
NUMPY |= {"BF16": "<u2", "F8_E4M3": "<u1", "F8_E5M2": "<u1", "BOOL": "<u1"}
NORMAL = np.array([NormalDist().inv_cdf((j + 0.5) / 65536) for j in range(65536)], "<f4")


def need(good: object, what: object) -> None:
    """Refuse, as the head of format.md defines it."""
    if not good:
        raise ValueError(f"refused: {what}")


def digest(*parts: Any) -> str:
    """D of section 6; parts that are not bytes stand for their canonical JSON (section 1)."""
    plain = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    joined = b"".join(p if isinstance(p, bytes) else plain(p).encode() for p in parts)
    return hashlib.sha256(joined).hexdigest()[:32]


def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if it has a key twice (section 1)."""
    need(len(dict(items)) == len(items), "a key twice")
    return dict(items)


def load(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a safetensors file (section 1)."""
    raw, tensors = path.read_bytes(), {}
    end = begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin].decode(), object_pairs_hook=unique)
    metadata = header.pop("__metadata__", {})
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, (start, stop) = about["dtype"], about["data_offsets"]
        array: Array = np.ndarray(about["shape"], NUMPY[dtype], raw, end)
        need(len(about) == 3 and (begin + start, stop - start) == (end, array.nbytes), name)
        need(dtype != "BOOL" or array.max(initial=0) < 2, f"elements of {name}")
        tensors[name], end = (dtype, array), begin + stop
    need(end == len(raw) and all(isinstance(text, str) for text in metadata.values()), "layout")
    return tensors, metadata


def taken(files: Tensors, name: str, dtype: str, shape: Any, want: str | None = None) -> Array:
    """A tensor of a file: a payload has a digest to compare, a base's has none (section 2)."""
    found, array = files[name]
    need(found == dtype and shape in (None, array.shape), f"dtype or shape of {name}")
    need(want in (None, digest(array.tobytes())), f"digest of payload {name}")
    return array


def stream(kind: str, size: int, *of: Any) -> Array:
    """Elements for a seed, stream key and role, with scale 1 (section 3)."""
    key = int.from_bytes(bytes.fromhex(digest(["randsurgery.philox.1", *of])), "little")
    words: Array = np.random.Philox(key=key, counter=0).random_raw(size // 2 + 1).astype("<u8")
    if kind == "sign":
        return np.unpackbits(words.view("u1"), count=size, bitorder="little") * np.float32(2) - 1
    if kind == "uniform":
        return (words.view("<u4")[:size] // 256).astype("<f4") / np.float32(2**23) - 1
    need(digest(NORMAL.tobytes()) == "1cfbba1e07e34386a57626f82aeb43e6", "the table made here")
    return NORMAL[words.view("<u2")[:size]]


def scaled(values: Array, factor: str, dtype: str) -> Array:
    """Values, or the bits of BF16, times a float32, rounded to the dtype (sections 3 and 5)."""
    values = (values.astype("<u4") << 16).view("<f4") if values.dtype == "<u2" else values
    product: Array = values * np.array([float.fromhex(factor)], "<f4")
    product[np.isnan(product)] = np.nan
    if dtype == "BF16":
        bits = product.astype("<f4").view("<u4")
        product = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return product.astype(NUMPY[dtype])


def hadamard(n: int) -> Array | None:
    """H(n) of section 4, if it exists."""
    two = np.array([[1, 1], [1, -1]], "i1")
    if n <= 2:
        return two[:n, :n]
    paley = ((n % 4 == 0, n, -1, two[:1, :1]), (n % 8 == 4, n // 2, 1, two))
    for fits, m, edge, block in paley if n & (n - 1) else ():
        if fits and all((m - 1) % p for p in range(2, math.isqrt(m - 1) + 1)):
            i, q = np.arange(m), m - 1
            chi = np.where(np.isin(i, i[1:q] ** 2 % q), 1, -1).astype("i1")[(i[:, None] - i) % q]
            chi[0], chi[1:, 0], chi[i, i] = 1, edge, 0
            return np.kron(chi, block) + np.kron(
                np.eye(m, dtype="i1"), abs(block) * -block[::-1, ::-1]
            )
    for f in (2, *range(4, math.isqrt(n) + 1, 4)):
        if n % f == 0 and (a := hadamard(f)) is not None and (b := hadamard(n // f)) is not None:
            return np.kron(a, b)
    return None


def head(rows: int, columns: int) -> Array:
    """The rows of a hadamard source with scale 1, one after another (section 4)."""
    found, orders = dict[bytes, None](), range(columns, 2 * columns + 1)
    matrix = next(m for m in map(hadamard, orders) if m is not None)
    for turn in range(4 + 4 * rows // len(matrix)):
        flips = (
            stream("sign", columns, 0, f"hadamard-{turn}", "head") if turn else -np.ones(columns)
        )
        found |= dict.fromkeys(row.tobytes() for row in matrix[:, :columns] * -flips.astype("i1"))
        if len(found) >= rows:
            return np.frombuffer(b"".join(list(found)[:rows]), "i1")
    raise ValueError("refused: too few rows of hadamard")


def mask(payload: Array, overlay: dict[str, Any], size: int) -> Array:
    """The bits of a mask or scatter (section 5)."""
    count, gaps, inflater = overlay["count"], overlay["encoding"] == "gaps", zlib.decompressobj(-15)
    need(0 <= count <= size and payload.ndim == 1, "count")
    limit = min(count, size - count) + size // 255 if gaps else -(-size // 8)
    data = np.frombuffer(inflater.decompress(payload.tobytes(), limit + 1), "u1")
    need(inflater.eof and not inflater.unused_data and len(data) <= limit, "deflate stream")
    bits = np.unpackbits(data, bitorder="little").astype(bool)
    if gaps:
        marks, bits = data != 255, np.full(size, 2 * count > size)
        need(marks[-1:].all(), "gaps")
        bits[(np.cumsum(data + marks.astype(int)) - 1)[marks]] ^= True
    need(bits.sum() == bits[:size].sum() == count, "number of ones")
    return bits[:size]


def made(files: Tensors, bases: dict[str, Tensors], owner: str, name: str, entry: Any) -> Array:
    """The source of an entry (section 4)."""
    dtype, shape, source = entry["dtype"], tuple(entry["shape"]), entry["source"]
    kind, size, key = source["kind"], math.prod(shape), source.get("stream")
    if kind == "base":
        return taken(bases[source["base"]], source["tensor"], dtype, shape)
    if kind == "stored":
        return taken(files, f"{owner}/{name}/source", dtype, shape, source["digest"])
    if kind == "constant":
        values = np.full(size, float.fromhex(source["value"]))
    elif kind == "random":
        key = name if key is None else key
        values = stream(source["distribution"], size, source["seed"], key, "weight")
    elif kind == "hadamard":
        values = head(*shape)
    else:
        packed = taken(files, f"{owner}/{name}/source", "U8", (-(-size // 8),), source["digest"])
        values = np.unpackbits(packed, count=size, bitorder="little") * 2.0 - 1
    return scaled(values, source.get("scale", "1"), dtype).reshape(shape)


def changed(files: Tensors, array: Array, dtype: str, slot: str, overlay: Any) -> Array:
    """A tensor under one overlay (section 5); `slot` begins the names of its payloads."""
    kind, want, array = overlay["kind"], overlay.get("digest"), array.copy()
    if kind == "scale":
        array = scaled(array.reshape(-1), overlay["factor"], dtype).reshape(array.shape)
    elif kind == "replace":
        array = taken(files, f"{slot}.tensor", dtype, array.shape, want)
    elif kind == "slice":
        part = array[(slice(None),) * overlay["dim"] + (slice(overlay["count"]),)]
        need(part.shape[overlay["dim"]] == overlay["count"], "count of a slice")
        part[...] = taken(files, f"{slot}.slice", dtype, part.shape, want)
    else:
        packed = taken(files, f"{slot}.mask", "U8", None, want)
        bits = mask(packed, overlay, array.size).reshape(array.shape)
        if kind == "mask":
            array[~bits] = 0
        else:
            want, shape = overlay["values_digest"], (overlay["count"],)
            array[bits] = taken(files, f"{slot}.values", dtype, shape, want)
    return array


def rebuilt(path: Path, chosen: str | None, bases: dict[str, Tensors]) -> Tensors:
    """The tensors of a member (section 2)."""
    files, metadata = load(path)
    recipe = json.loads(metadata["randsurgery"], object_pairs_hook=unique)
    need((recipe["format"], recipe["version"]) == ("randsurgery", 0), "version")
    for key, about in (recipe.get("bases") or {}).items():
        bases[key] = bases.get(key) or load(path.parent / Path(about["file"]).name)[0]
        rows = (([n, d, a.shape], b"\0", a.tobytes()) for n, (d, a) in sorted(bases[key].items()))
        need(
            digest(*(part for row in rows for part in row)) == about["identity"],
            f"identity {about}",
        )
    members = {each.get("name") or "main": each for each in recipe.get("members") or [{}]}
    need(chosen in members or (chosen is None and len(members) == 1), f"one of {sorted(members)}")
    owner = chosen or next(iter(members))
    todo = [("shared", *item) for item in (recipe.get("tensors") or {}).items()]
    todo += [(owner, *item) for item in (members[owner].get("tensors") or {}).items()]
    tensors: Tensors = {}
    for owner, name, own in todo:
        entry = own.get("entry") or own
        if "source" in entry:
            tensors[name] = entry["dtype"], made(files, bases, owner, name, entry)
        dtype, array = tensors[name]
        for index, overlay in enumerate(entry.get("overlays") or []):
            array = changed(files, array, dtype, f"{owner}/{name}/{index}", overlay)
        found = digest([dtype, array.shape], b"\0", array.tobytes())
        need(entry.get("digest") in (None, found), f"finished digest of {name}")
        tensors[name] = dtype, array
    return tensors


def read(
    path: str | Path, member: str | None = None, bases: dict[str, Tensors] | None = None
) -> Tensors:
    """The tensors of a member, or of the only one; ValueError where the file is refused."""
    try:
        with np.errstate(all="ignore"):
            return rebuilt(Path(path), member, dict(bases or {}))
    except Exception as error:
        raise ValueError(f"refused: {error!r}") from error


if __name__ == "__main__":
    for name, (dtype, array) in sorted(read(sys.argv[1], (*sys.argv, None)[2]).items()):
        found = digest([dtype, array.shape], b"\0", array.tobytes())
        print(name, dtype, list(array.shape), found)
