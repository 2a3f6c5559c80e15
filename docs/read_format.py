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

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
Tensors = dict[Any, tuple[str, Array]]  # name -> dtype as in format.md, elements (BF16: bits)
NUMPY = {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "FIU" for n in (1, 2, 4, 8)}
NUMPY |= {"BF16": "<u2", "F8_E4M3": "<u1", "F8_E5M2": "<u1", "BOOL": "<u1"}
NORMAL = np.array([NormalDist().inv_cdf((j + 0.5) / 65536) for j in range(65536)], "<f4")


def need(good: object, what: object) -> None:
    """Refuse, as the head of format.md defines it."""
    if not good:
        raise ValueError(what)


def digest(*parts: Any) -> str:
    """D of section 6; parts that are not bytes stand for their canonical JSON (section 1)."""
    plain = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    joined = b"".join(p if isinstance(p, bytes) else plain(p).encode() for p in parts)
    return hashlib.sha256(joined).hexdigest()[:32]


def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object: refused if a key is there twice (section 1), without nulls (section 2)."""
    need(len(dict(items)) == len(items), "a key twice")
    return {key: value for key, value in items if value is not None}


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


def taken(files: Tensors, name: Any, dtype: str, shape: Any, want: str | None = None) -> Array:
    """A payload, of the digest `want`, or the tensor of a base (section 2)."""
    found, array = files[name]
    need(found == dtype and shape in (None, array.shape), f"dtype or shape of {name}")
    need(want in (None, digest(array.tobytes())), f"digest of payload {name}")
    return array


def stream(kind: str, size: int, *of: Any) -> Array:
    """Elements for a seed, stream key and role, with scale 1 (section 3)."""
    key = int.from_bytes(bytes.fromhex(digest(["randsurgery.philox.1", *of])), "little")
    words: Array = np.random.Philox(key=key, counter=0).random_raw(size // 2 + 1).astype("<u8")
    if kind == "sign":
        return np.where(np.unpackbits(words.view("u1"), count=size, bitorder="little"), 1, -1)
    if kind == "uniform":
        return np.asarray((words.view("<u4")[:size] // 256) / 2**23 - 1, "<f4")
    need(digest(NORMAL.tobytes()) == "1cfbba1e07e34386a57626f82aeb43e6", "the table made here")
    return NORMAL.take(words.view("<u2")[:size])


def scaled(values: Array, factor: str, dtype: str) -> Array:
    """Values, or the bits of BF16, times a float32, rounded to the dtype (sections 3 and 5)."""
    values = (values.astype("<u4") << 16).view("<f4") if values.dtype == "<u2" else values
    product: Array = values * np.array([float.fromhex(factor)], "<f4")
    product[np.isnan(product)] = np.nan
    bits: Array = product.astype("<f4").view("<u4")
    upper: Array = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return (upper if dtype == "BF16" else product).astype(NUMPY[dtype])


def hadamard(n: int) -> Array | None:
    """H(n) of section 4, if it exists."""
    two, same = np.array([[1, 1], [1, -1]], "i1"), np.array([[1, -1], [-1, -1]], "i1")
    if n <= 2 or n % 4:
        return two[:n, :n] if n <= 2 else None
    for q, edge, off, on in ((n - 1, -1, two[:1, :1], two[:1, :1]), (n // 2 - 1, 1, two, same)):
        i, fits = np.arange(q + 1), n & (n - 1) and q % 4 == 2 - edge
        if fits and all(q % p for p in range(2, math.isqrt(q) + 1)):
            chi = np.where(np.isin(i, i * i % q), 1, -1).astype("i1")[(i[:, None] - i) % q]
            chi[0], chi[1:, 0], chi[i, i] = 1, edge, 0
            return np.kron(chi, off) + np.kron(np.eye(q + 1, dtype="i1"), on)
    pairs = ((hadamard(f), hadamard(n // f)) for f in range(2, math.isqrt(n) + 1) if n % f == 0)
    return next((np.kron(a, b) for a, b in pairs if a is not None and b is not None), None)


def head(rows: int, columns: int) -> Array:
    """The rows of a hadamard source with scale 1, one after another (section 4)."""
    found, orders = dict[bytes, None](), range(columns, 2 * columns + 1)
    full = next(m for m in map(hadamard, orders) if m is not None)
    for turn in range(4 + 4 * rows // len(full)):
        if len(found) < rows:
            signs = -stream("sign", columns, 0, f"hadamard-{turn}", "head") if turn else np.ones(1)
            found |= dict.fromkeys(row.tobytes() for row in full[:, :columns] * signs.astype("i1"))
    return np.frombuffer(b"".join(list(found)[:rows]), "i1")


def mask(payload: Array, overlay: dict[str, Any], size: int) -> Array:
    """The bits of a mask or scatter (section 5)."""
    count, gaps, inflater = overlay["count"], overlay["encoding"] == "gaps", zlib.decompressobj(-15)
    limit = min(count, size - count) + size // 255 if gaps else -(-size // 8)
    data = np.frombuffer(inflater.decompress(payload.tobytes(), max(limit, 0) + 1), "u1")
    need(inflater.eof and not inflater.unused_data and len(data) <= limit, "deflate stream")
    bits = np.full(size, 2 * count > size) if gaps else np.unpackbits(data, bitorder="little") > 0
    if gaps:
        need((data[-1:] < 255).all(), "a last byte that marks nothing")
        bits[np.cumsum(data + (data < 255))[data < 255] - 1] ^= True
    need(bits.sum() == bits[:size].sum() == count and payload.ndim == 1, "number of ones")
    return bits[:size]


def changed(files: Tensors, slot: str, array: Array, dtype: str, step: Any) -> Array:
    """A tensor after its source (section 4) or an overlay (section 5), with payloads at `slot`."""
    kind, want, shape, values = step["kind"], step.get("digest", ""), array.shape, array
    if kind == "base":
        return taken(files, (step["base"], step["tensor"]), dtype, shape)
    if kind in ("stored", "replace"):
        return taken(files, slot + {"stored": "source"}.get(kind, "tensor"), dtype, shape, want)
    if kind == "slice":
        part = array[(slice(None),) * step["dim"] + (slice(step["count"]),)]
        need(part.shape[step["dim"]] == step["count"], "count of a slice")
        part[...] = taken(files, slot + "slice", dtype, part.shape, want)
        return array
    if kind in ("mask", "scatter"):
        bits = mask(taken(files, slot + "mask", "U8", None, want), step, array.size).reshape(shape)
        if kind == "mask":
            return np.where(bits, array, np.zeros_like(array))
        array[bits] = taken(files, slot + "values", dtype, (step["count"],), step["values_digest"])
        return array
    if kind == "constant":
        return scaled(np.full(array.size, float.fromhex(step["value"])), "1", dtype).reshape(shape)
    if kind == "random":
        values = stream(step["distribution"], array.size, step["seed"], step["stream"], "weight")
    elif kind == "hadamard":
        values = head(*shape)
    elif kind == "signs":
        packed = taken(files, slot + "source", "U8", (-(-array.size // 8),), want)
        values = np.where(np.unpackbits(packed, count=array.size, bitorder="little"), 1, -1)
    return scaled(values, step["factor" if kind == "scale" else "scale"], dtype).reshape(shape)


def rebuilt(path: Path, chosen: str | None, bases: dict[str, Tensors]) -> Tensors:
    """The tensors of a member (section 2)."""
    files, metadata = load(path)
    recipe = json.loads(metadata["randsurgery"], object_pairs_hook=unique)
    need((recipe["format"], repr(recipe["version"])) == ("randsurgery", "1"), "version")
    for key, about in recipe.get("bases", {}).items():
        base = bases.get(key) or load(path.parent / Path(about["file"]).name)[0]
        rows = (([n, d, a.shape], b"\0", a.tobytes()) for n, (d, a) in sorted(base.items()))
        need(digest(*(part for row in rows for part in row)) == about["identity"], "base identity")
        files |= {(key, name): tensor for name, tensor in base.items()}
    members = {each.get("name", "main"): each for each in recipe.get("members", [{}])}
    need(chosen in members or (chosen is None and len(members) == 1), f"one of {sorted(members)}")
    member, tensors = chosen or next(iter(members)), Tensors()
    for owner, part in (("shared", recipe), (member, members[member])):
        for name, own in part.get("tensors", {}).items():
            entry, slot = own.get("entry", own), f"{owner}/{name}/"
            dtype, array = tensors.get(name, ("", np.empty(0)))
            if "source" in entry:
                dtype, array = entry["dtype"], np.empty(entry["shape"], NUMPY[entry["dtype"]])
                array = changed(files, slot, array, dtype, {"stream": name, **entry["source"]})
            for index, overlay in enumerate(entry.get("overlays", [])):
                array = changed(files, f"{slot}{index}.", array.copy(), dtype, overlay)
            found = digest([dtype, array.shape], b"\0", array.tobytes())
            need(entry.get("digest", found) == found, f"finished digest of {name}")
            tensors[name] = dtype, array
    return tensors


def read(path: str | Path, member: str | None = None, bases: Any = None) -> Tensors:
    """The tensors of a member, or of the only one; ValueError where the file is refused."""
    try:
        with np.errstate(all="ignore"):
            return rebuilt(Path(path), member, bases or {})
    except Exception as error:
        raise ValueError(f"refused: {error}") from error


if __name__ == "__main__":
    for name, (dtype, array) in sorted(read(sys.argv[1], (*sys.argv, None)[2]).items()):
        print(name, dtype, [*array.shape], digest([dtype, array.shape], b"\0", array.tobytes()))
