"""A reader of the checkpoint format that shares no code with the package: format.md in NumPy.

`python docs/read_format.py FILE [MEMBER]` lists name, dtype, shape and digest of every tensor. It
compares every digest it meets; the checks of a hostile file (format.md, section 1) it keeps short.
"""

import hashlib
import json
import math
import statistics
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = dict[str, tuple[str, Array]]  # name -> dtype name, elements (BF16, F8 as unsigned bits)
NUMPY = dict(F64="<f8", F32="<f4", F16="<f2", BF16="<u2", F8_E4M3="u1", F8_E5M2="u1", I64="<i8",
             I32="<i4", I16="<i2", I8="i1", U64="<u8", U32="<u4", U16="<u2", U8="u1", BOOL="u1")  # fmt: skip  # noqa: C408
INVERSE = statistics.NormalDist().inv_cdf


def need(truth: Any, fault: str) -> None:
    """Refuse a file."""
    if not truth:
        raise ValueError(f"refused: {fault}")


def digest(*parts: Any) -> str:
    """Section 6: bytes as they are, other values as canonical JSON."""
    texts = (p if isinstance(p, bytes) else json.dumps(p, sort_keys=True, separators=(",", ":"))
             .encode() for p in parts)  # fmt: skip
    return hashlib.sha256(b"".join(texts)).hexdigest()[:32]


def load(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Section 1: the tensors and the metadata of a safetensors file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(pairs)) == len(pairs), "a key twice")
        return dict(pairs)

    raw, tensors = path.read_bytes(), {}
    begin = end = 8 + int.from_bytes(raw[:8], "little")
    need(8 < begin <= len(raw), "header")
    header = json.loads(raw[8:begin].decode(), object_pairs_hook=unique)
    metadata = header.pop("__metadata__", {})
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (begin + offset for offset in info["data_offsets"])
        kind, shape = np.dtype(NUMPY[info["dtype"]]), info["shape"]
        need(len(info) == 3 and ".." not in name and start == end <= stop <= len(raw), name)
        need(stop - start == math.prod(shape) * kind.itemsize, f"bytes of {name}")
        tensors[name], end = (
            (info["dtype"], np.frombuffer(raw[start:stop], kind).reshape(shape)),
            stop,
        )
        need(info["dtype"] != "BOOL" or (tensors[name][1] < 2).all(), name)
    need(end == len(raw) and all(isinstance(v, str) for v in metadata.values()), "container")
    return tensors, metadata


def draw(kind: str, size: int, seed: int, key: str, role: str) -> Array:
    """Section 3: float32 elements of a stream, for scale 1."""
    name = bytes.fromhex(digest(["randsurgery.philox.1", seed, key, role]))
    philox = np.random.Philox(key=int.from_bytes(name, "little"), counter=0)
    words: Array = philox.random_raw(size // 2 + 1).astype("<u8")
    if kind == "sign":
        return 2 * np.unpackbits(words.view("u1"), count=size, bitorder="little").astype("f4") - 1
    if kind == "normal":
        table = np.array([INVERSE((j + 0.5) / 65536) for j in range(65536)], "<f4")
        check = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
        need(hashlib.sha256(table.tobytes()).hexdigest() == check, "the normal table made here")
        return table[words.view("<u2")[:size]]
    return (words.view("<u4")[:size] // 256).astype("f4") / np.float32(2**23) - np.float32(1)


def hadamard(n: int) -> Array | None:
    """Section 4: H(n), if it exists."""
    if n <= 2:
        return np.array([[1, 1], [1, -1]], "i1")[:n, :n]
    q = n - 1 if n & (n - 1) else 0
    for q in (q, n // 2 - 1 if n % 8 == 4 and n & (n - 1) else 0):
        if n % 4 == 0 and q > 1 and all(q % p for p in range(2, math.isqrt(q) + 1)):
            squares, i = np.arange(1, q) ** 2 % q, np.arange(q + 1)
            chi = np.where(np.isin((i[:, None] - i) % q, squares), 1, -1).astype("i1")
            if q == n - 1:
                chi[:, 0] = -1
                chi[0] = chi[i, i] = 1
                return chi
            chi[0] = chi[:, 0] = 1
            chi[i, i] = 0
            same = np.kron(np.eye(n // 2, dtype="i1"), np.array([[1, -1], [-1, -1]], "i1"))
            return same + np.kron(chi, np.array([[1, 1], [1, -1]], "i1"))
    for f in (2, *range(4, math.isqrt(n) + 1, 4)) if n % 4 == 0 else ():
        if n % f == 0 and (a := hadamard(f)) is not None and (b := hadamard(n // f)) is not None:
            return np.kron(a, b)
    return None


def head(rows: int, columns: int) -> Array:
    """Section 4: distinct sign vectors, shape (rows, columns)."""
    order = next(n for n in range(columns, 2 * columns + 1) if hadamard(n) is not None)
    matrix, found = hadamard(order), dict[bytes, None]()
    assert matrix is not None
    for turn in range(4 + 4 * rows // order):
        flips = -draw("sign", columns, 0, f"hadamard-{turn}", "head") if turn else np.ones(columns)
        found |= dict.fromkeys(row.tobytes() for row in matrix[:, :columns] * flips.astype("i1"))
    need(len(found) >= rows, "rows of hadamard")
    return np.frombuffer(b"".join(list(found)[:rows]), "i1").reshape(rows, columns)


def mask(payload: Array, overlay: dict[str, Any], size: int) -> Array:
    """Section 5: the bits of a mask."""
    count, gaps, stream = overlay["count"], overlay["encoding"] == "gaps", zlib.decompressobj(-15)
    limit = min(count, size - count) + size // 255 if gaps else -(-size // 8)
    data = np.frombuffer(stream.decompress(payload.tobytes(), limit + 1), "u1")
    need(stream.eof and not stream.unused_data and len(data) <= limit, "deflate stream")
    if gaps:
        marks, bits = data != 255, np.full(size, 2 * count > size)
        bits[(np.cumsum(data + marks.astype(int)) - 1)[marks]] ^= True
        need(marks.sum() == min(count, size - count) and marks[-1:].all(), "gaps")
    else:
        need(len(data) == limit and not np.unpackbits(data, bitorder="little")[size:].any(), "bits")
        bits = np.unpackbits(data, count=size, bitorder="little").astype(bool)
    need(bits.sum() == count, "number of ones")
    return bits


def wide(array: Array, dtype: str) -> Array:
    """The values of a tensor."""
    return (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array


def times(values: Array, scale: str, dtype: str) -> Array:
    """Section 3: float32 values times a float32, rounded to the dtype, ties to even."""
    product: Array = values.astype("f4") * np.float32(float.fromhex(scale))
    product[np.isnan(product)] = np.nan
    return narrow(product, dtype)


def narrow(values: Array, dtype: str) -> Array:
    """Values in a dtype."""
    bits = values.astype("f4").view("u4") if dtype == "BF16" else values
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if dtype == "BF16" else bits).astype(
        NUMPY[dtype]
    )


class Reader:
    """One file: `tensor(member, name)` speaks its sentence, source first, then the overlays."""

    def __init__(self, path: Path, bases: dict[str, Tensors] | None = None) -> None:
        self.files, metadata = load(path)
        self.recipe = json.loads(metadata["randsurgery"])
        need((self.recipe["format"], self.recipe["version"]) == ("randsurgery", 0), "version")
        self.bases = dict(bases or {})
        for key, about in self.recipe.get("bases", {}).items():
            beside = path.parent / about.get("file", "")
            need(key in self.bases or beside.is_file(), f"the base {about}")
            found = self.bases.setdefault(key, {}) or load(beside)[0]
            rows = [([n, d, a.shape], b"\0", a.tobytes()) for n, (d, a) in sorted(found.items())]
            need(
                digest(*(p for row in rows for p in row)) == about["identity"], f"identity: {about}"
            )
            self.bases[key] = found

    def payload(self, name: str, want: str) -> Array:
        need(name in self.files, f"payload {name} is missing")
        need(digest(self.files[name][1].tobytes()) == want, f"digest of payload {name}")
        return self.files[name][1]

    def source(self, owner: str, name: str, entry: dict[str, Any]) -> Array:
        """Section 4."""
        dtype, shape, source = entry["dtype"], entry["shape"], entry["source"]
        kind, size = source["kind"], math.prod(shape)
        if kind == "base":
            return self.bases[source["base"]][source["tensor"]][1]
        if kind == "stored":
            return self.payload(f"{owner}/{name}/source", source["digest"])
        if kind == "constant":
            return np.full(shape, narrow(np.array([float.fromhex(source["value"])]), dtype))
        if kind == "random":
            key = source.get("stream")
            key = name if key is None else key
            values = draw(source["distribution"], size, source["seed"], key, "weight")
        elif kind == "hadamard":
            values = head(*shape)
        else:
            packed = self.payload(f"{owner}/{name}/source", source["digest"])
            values = 2 * np.unpackbits(packed, count=size, bitorder="little").astype("f4") - 1
        return times(values, source["scale"], dtype).reshape(shape)

    def overlay(self, array: Array, dtype: str, slot: str, overlay: dict[str, Any]) -> Array:
        """Section 5. `slot` is OWNER/TENSOR/N."""
        array, kind = np.array(array, order="C"), overlay["kind"]
        flat = array.reshape(-1)
        if kind == "scale":
            return times(wide(flat, dtype), overlay["factor"], dtype).reshape(array.shape)
        if kind == "replace":
            return self.payload(f"{slot}.tensor", overlay["digest"])
        if kind == "slice":
            part = self.payload(f"{slot}.slice", overlay["digest"])
            array[(slice(None),) * overlay["dim"] + (slice(overlay["count"]),)] = part
            return array
        bits = mask(self.payload(f"{slot}.mask", overlay["digest"]), overlay, flat.size)
        if kind == "mask":
            flat[~bits] = 0
        else:
            flat[bits] = self.payload(f"{slot}.values", overlay["values_digest"])
        return array

    def tensor(self, member: dict[str, Any], name: str) -> tuple[str, Array]:
        """Section 2: a member's own entry, or the shared one under the member's overlays."""
        own = member.get("tensors", {}).get(name, {})
        owner = member.get("name", "main") if "entry" in own else "shared"
        entry = own.get("entry") or self.recipe["tensors"][name]
        dtype, array = entry["dtype"], self.source(owner, name, entry)
        for who, part in ((owner, entry), (member.get("name", "main"), own)):
            for index, overlay in enumerate(part.get("overlays", ())):
                array = self.overlay(array, dtype, f"{who}/{name}/{index}", overlay)
        want = (
            own.get("digest") or entry.get("digest")
            if not own or own.get("digest") or "entry" in own
            else None
        )
        need(
            want in (None, digest([dtype, array.shape], b"\0", array.tobytes())),
            f"digest of {name}",
        )
        need(list(array.shape) == entry["shape"], f"shape of {name}")
        return dtype, array


def read(
    path: str | Path, member: str | None = None, bases: dict[str, Tensors] | None = None
) -> Tensors:
    """The tensors of a member, or of the only one. Raises ValueError for a file to be refused."""
    try:
        with np.errstate(all="ignore"):
            reader = Reader(Path(path), bases)
            members = {m.get("name", "main"): m for m in reader.recipe.get("members", [{}])}
            need(
                member in members or (member is None and len(members) == 1),
                f"one of {list(members)}",
            )
            chosen = members[member or next(iter(members))]
            names = {*reader.recipe.get("tensors", {}), *chosen.get("tensors", {})}
            return {name: reader.tensor(chosen, name) for name in sorted(names)}
    except (KeyError, TypeError, IndexError, AttributeError, zlib.error) as error:
        raise ValueError(f"refused: {error!r}") from error


if __name__ == "__main__":
    for name, (dtype, array) in read(sys.argv[1], (*sys.argv, None)[2]).items():
        print(name, dtype, list(array.shape), digest([dtype, array.shape], b"\0", array.tobytes()))
