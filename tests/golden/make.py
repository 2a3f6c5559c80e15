"""Makes the golden files: small files of format version 1, one of each kind, that never change.

    cd tests && python -m golden.make [FOLDER]

A file that exists is left alone, and so is what digests.json says of it; only files of new kinds
are added. Nothing is trained: what training would change is drawn from the generator instead, and
what is stored was never computed by torch. On another machine the files come out alike, but for the
deflated bytes of masks (zlib's release) and the orthonormal head (linear algebra), which is why
they are kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from format_helpers import gap_bytes, pack_bits, raw_file, tensor_header
from test_checkpoint import Builder, assemble, constant, entry, hexf, random_source, tiny
from torch import nn

import randsurgery as rs
from randsurgery.format.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    Memory,
    identity,
    read_checkpoint,
)
from randsurgery.format.container import Container, pack, write_atomically
from randsurgery.format.generator import generate
from randsurgery.format.members import graft, renamed, with_own
from randsurgery.format.specs import Calibration, DatasetSpec, InputSpec
from randsurgery.format.tensors import DTYPES, STORAGE, RawTensor, from_f32
from randsurgery.format.writing import finish, write_checkpoint
from randsurgery.surgery import plans
from randsurgery.surgery.bases import Base
from randsurgery.surgery.differences import on_base
from randsurgery.surgery.foreign import fit
from randsurgery.surgery.hidden_networks import Reading, make_checkpoint, read_masks
from randsurgery.surgery.initialisers import INITS
from randsurgery.surgery.recipes import make_recipe_on_base

HERE = Path(__file__).parent
DIGESTS = "digests.json"
BASE = "base.safetensors"
SMALL = {"width": 0.05, "img_size": 8, "num_classes": 10}  # conv2 with 1,002 weights
Json = dict[str, Any]


def drawn(name: str, shape: tuple[int, ...], dtype: str = "F32", scale: float = 1.0) -> RawTensor:
    """Normal values that depend on a name alone."""
    values = generate("normal", int(np.prod(shape)), scale, seed=1, stream=f"golden {name}")
    return RawTensor(dtype, from_f32(dtype, values).reshape(shape))


# --- networks -------------------------------------------------------------------------------------


def conv2(init: Any = "signed-constant", seed: int = 7, **more: Any) -> Checkpoint:
    scaled_for = more.pop("scaled_for", None)
    return rs.make_recipe("conv2", init, seed=seed, scaled_for=scaled_for, args={**SMALL, **more})


def learn(model: nn.Module, turn: str = "") -> nn.Module:
    """What is learned, drawn."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                raw = drawn(f"{turn} {name}", tuple(parameter.shape), scale=0.125)
                parameter.copy_(torch.from_numpy(raw.array))
    return model


def learned(
    start: Checkpoint, what: Any = None, turn: str = "", scores: bool = False
) -> Checkpoint:
    model = rs.attach(rs.build(start), start if what is None else what)
    return rs.harvest(start, learn(model, turn), scores=scores)


def popup(seed: int = 7, **more: Any) -> Checkpoint:
    wish = rs.Popup(k="0.5", k_for=(("fc1", "0.01"), ("fc2", "0.98")))
    return learned(conv2(seed=seed), wish, **more)


def random_mask() -> Checkpoint:
    start = conv2()
    return rs.harvest(start, rs.attach(rs.build(start), rs.Popup(k="0.3", seed=5, mask="random")))


def supermask() -> Checkpoint:
    return learned(conv2("xavier-normal"), rs.Supermask(rescale=True), scores=True)


def slices(zero: bool = False, **wish: Any) -> Checkpoint:
    return rs.freeze(conv2("kaiming-uniform"), rs.Freeze(fraction="0.5", **wish), zero=zero)


def survivors() -> Checkpoint:
    masked = popup()
    shell = rs.build(masked)
    names = [name for name in masked.recipe.tensors if name != "fc.weight"]
    return learned(plans.with_plan(masked, plans.survivors(shell, names)))


def fixed_head(kind: Any, **more: Any) -> Checkpoint:
    start = rs.fix_head(conv2(), kind, **more)
    return learned(rs.freeze(start, rs.Freeze(only=("features.0",), head="learned")))


# --- foreign and dense checkpoints ----------------------------------------------------------------


def held(tensors: dict[str, RawTensor], file: str, **more: Any) -> Base:
    memory = Memory(tensors)
    return Base(memory, tuple(sorted(memory)), identity(memory, memory), file, **more)


def dense() -> Memory:
    """The base's tensors: a conv2 under its own names."""
    recipe = conv2().recipe
    return Memory({name: drawn(name, entry.shape) for name, entry in recipe.tensors.items()})


def converted() -> Checkpoint:
    """As hidden-networks names and saves them: signs of one magnitude, and scores beside them."""
    names = {
        "features.0": "convs.0", "features.2": "convs.2",
        "fc1": "linear.0", "fc2": "linear.2", "fc": "linear.4",
    }  # fmt: skip
    tensors: dict[str, RawTensor] = {}
    for ours, theirs in names.items():
        shape = conv2().recipe.tensors[f"{ours}.weight"].shape
        shape = shape if len(shape) == 4 else (*shape, 1, 1)
        scores = drawn(f"scores {ours}", shape)
        signs = np.where(drawn(f"signs {ours}", shape).array > 0, 0.25, -0.25).astype("<f4")
        tensors[f"module.{theirs}.weight"] = RawTensor("F32", signs)
        tensors[f"module.{theirs}.scores"] = scores
    found = fit(held(tensors, "model_best.pth"), "conv2", SMALL)
    wish = Reading(k="0.4", save_scores=True)
    return make_checkpoint(found, read_masks(found, wish, 0.4), wish)


def finetuned() -> Checkpoint:
    """A dense checkpoint on a base, a tensor for each way in which two can differ."""
    after = {name: RawTensor("F32", raw.array.copy()) for name, raw in dense().items()}
    after["features.2.weight"].array.reshape(-1)[::3] = 0  # a mask
    after["fc1.weight"].array[:2] *= 2  # a slice
    after["fc2.weight"].array.reshape(-1)[::23] = 0.5  # a scatter
    after["fc.weight"] = drawn("another fc", (10, 12))  # a replacement
    return on_base(fit(held(after, "tuned.pth"), "conv2", SMALL), held(dense(), BASE))


def on_a_base() -> Checkpoint:
    """Masks on a base's weights, under a classifier of its own."""
    base = held(dense(), BASE, origin="hf-hub:example/conv2", revision="0123abc")
    start = make_recipe_on_base("conv2", base, seed=3, args={**SMALL, "num_classes": 4})
    return learned(start, rs.Popup(k="0.5"))


# --- any module -----------------------------------------------------------------------------------


def some_bits(name: str, size: int, share: float) -> list[int]:
    """About that share of ones."""
    values = generate("uniform", size, 1.0, seed=2, stream=f"golden bits {name}")
    return [int(value < 2 * share - 1) for value in values]


def random(distribution: str, scale: float, **more: Any) -> Json:
    return random_source(distribution, scale, seed=2**63 - 1, **more)


def signs(b: Builder, name: str, size: int, scale: float) -> Json:
    packed = RawTensor("U8", np.packbits(some_bits(name, size, 0.5), bitorder="little"))
    found = b.put("shared", name, "source", packed)
    return {"kind": "signs", "scale": hexf(scale), "digest": found}


def times(factor: float) -> Json:
    return {"kind": "scale", "factor": hexf(factor)}


def words(dtype: str, shape: tuple[int, ...]) -> RawTensor:
    """Any bits at all, NaNs among them; BOOL has 0 and 1 only."""
    storage = STORAGE[dtype]
    size = int(np.prod(shape)) * storage.itemsize
    values = generate("uniform", size, 128.0, seed=3, stream=f"golden words {dtype}")
    raw = values.astype("i1").view("u1") & (1 if dtype == "BOOL" else 255)
    return RawTensor(dtype, raw.astype("u1").view(storage).reshape(shape))


def every_dtype() -> Checkpoint:
    """Each dtype stored, masked, sliced, scattered, replaced and constant; of no architecture."""
    b, tensors, own = Builder(), {}, {}
    for dtype in DTYPES:
        name, bits, whole = (
            f"layers/{dtype} of all",
            some_bits(dtype, 15, 0.6),
            words(dtype, (3, 5)),
        )
        tensors[name] = entry(
            dtype, (3, 5), b.stored("shared", name, whole),
            b.mask("shared", name, 0, bits),
            b.slice("shared", name, 1, 1, RawTensor(dtype, whole.array[:, 1:3].copy())),
        )  # fmt: skip
        values = RawTensor(dtype, whole.array.reshape(-1)[: sum(bits)].copy())
        own[name] = {"overlays": [b.scatter("b", name, 0, bits, values)]}
    for dtype, value in (
        ("F64", 0.1), ("F32", -0.0), ("F16", 65504.0), ("BF16", -1.5), ("I64", -(2.0**63)),
        ("I32", 2.0**31 - 1), ("I16", -32768.0), ("I8", -128.0), ("U64", 2.0**63),
        ("U32", 2.0**32 - 1), ("U16", 65535.0), ("U8", 255.0), ("BOOL", 1.0),
    ):  # fmt: skip
        name = f"constant.{dtype}"
        tensors[name] = entry(dtype, (2,), constant(value))
        own[name] = {"overlays": [b.replace("b", name, 0, words(dtype, (2,)))]}
    empty = words("F8_E4M3", (2, 0, 3))
    own["new"] = {"entry": entry(empty.dtype, empty.shape, b.stored("b", "new", empty))}
    members = [{"name": "a"}, {"name": "b", "tensors": own}]
    return assemble(tiny(tensors=tensors, members=members), b.payloads)


def every_source() -> Checkpoint:
    """The sources and overlays with the numbers that are hard to get right."""
    b, tensors = Builder(), {}
    for dtype in ("F32", "F16", "BF16"):
        for kind in ("sign", "normal", "uniform"):
            for name, size in (("plain", 0.3), ("tiny", -1e-41), ("large", 3e38)):
                full = f"{dtype}.{kind}.{name}"
                tensors[full] = entry(dtype, (7, 9), random(kind, size), times(1.7))
        name = f"{dtype}.signs"
        tensors[name] = entry(dtype, (5, 7), signs(b, name, 35, -0.125))
        hard = np.array([np.inf, -np.inf, np.nan, 3.3e38, 40000.0, 1.00390625], dtype="<f4")
        top = 65504 if dtype == "F16" else np.inf
        raw = RawTensor(dtype, from_f32(dtype, np.clip(hard, -top, top)))
        for name, factor in (("zero", -0.0), ("two", 2.0), ("third", 1 / 3)):
            full = f"{dtype}.hard.{name}"
            tensors[full] = entry(dtype, (6,), b.stored("shared", full, raw), times(factor))
    orders = ((13, 12), (28, 28), (30, 5), (40, 9), (2, 92), (70, 28))
    for index, (rows, columns) in enumerate(orders):  # both Paley's, products, more rows than H has
        made = {"kind": "hadamard", "scale": hexf(-0.3)}
        dtype = ("F32", "BF16", "F16")[index % 3]
        tensors[f"hadamard.{rows}x{columns}"] = entry(dtype, (rows, columns), made)
    for size, share in ((0, 0.5), (1, 1.0), (8, 0.0), (511, 0.5), (3000, 0.002), (3000, 0.998)):
        name = f"mask.{size}.{share}"
        mask = b.mask("shared", name, 0, some_bits(name, size, share))
        tensors[name] = entry("F32", (size,), random("normal", 1.0), mask)
    tensors["scalar"] = entry("F32", (), random("uniform", 2.0), times(0.5))
    for index, stream in enumerate(("", "scalar", 'é\U0001f600\x7f\n"\\')):
        tensors[f"stream.{index}"] = entry("F32", (33,), random("normal", 1.0, stream=stream))
    tensors["covered"] = entry(
        "F32", (4,), random("sign", 1.0),
        b.mask("shared", "covered", 0, [1, 0, 1, 1]),
        b.replace("shared", "covered", 1, drawn("covered", (4,))),
        times(3.0),
    )  # fmt: skip
    notes = {"free": [1, 2.5, None, {"deep": "é"}]}
    return assemble(tiny(tensors=tensors, notes=notes), b.payloads)


# --- ensembles ------------------------------------------------------------------------------------


def member(checkpoint: Checkpoint, name: str, **more: Any) -> Checkpoint:
    """A finished file's worth, its member renamed and described."""
    who = checkpoint.member().model_copy(update=more)
    described = replace(checkpoint, recipe=checkpoint.recipe.with_member(who))
    return renamed(finish(described), {who.name: name})


def ensemble_of_masks() -> Checkpoint:
    three = [member(popup(turn=str(turn)), f"seed-{turn}") for turn in range(3)]
    return graft(graft(three[2], three[0]), three[1])


def look(size: int, value: float) -> InputSpec:
    third = (value.hex(),) * 3
    return InputSpec(
        size=(size, size), channels=3, mean=third, std=third, crop=(0.875).hex(), crop_mode="squash"
    )


def ensemble_of_tasks() -> Checkpoint:
    """Two tasks on one random network, each with its own classifier."""
    digits, pets = popup(), learned(conv2(num_classes=3), rs.Popup(k="0.5"), "pets")
    first = member(
        digits, "digits",
        classes=tuple("0123456789"),
        dataset=DatasetSpec(name="digits", test_split="test"),
        calibration=Calibration(temperature=(1.25).hex(), dataset="digits", share="0.2"),
        provenance={"command": "popup", "metrics": {"accuracy": 0.5, "epoch": 3}},
    )  # fmt: skip
    second = member(
        pets, "pets",
        classes=("cat", "dög", "fish"),
        dataset=DatasetSpec(name="folder"),
        calibration=Calibration(
            temperature=(0.5).hex(), dataset="folder", share="1", seed=2**63 - 1
        ),
    )  # fmt: skip
    looked = [
        replace(c, recipe=c.recipe.model_copy(update={"input": look(8, value)}))
        for c, value in ((first, 0.5), (second, 0.25))
    ]
    return graft(*(with_own(c, ["fc.weight"]) for c in looked))


def ensemble_of_slices() -> Checkpoint:
    """Two networks of partial training: slices, replaced norms, counts of batches as constants."""
    args = {"depth": 10, "growth_rate": 2}
    start = rs.make_recipe("densenet_bc_100_12", "kaiming-normal", seed=9, args=args)
    wish = rs.Freeze(fraction="0.5", only=("conv1", "block1.0.*"), norms=False)
    start = rs.freeze(start, wish)
    found = []
    for turn in ("one", "two"):
        model = learn(rs.attach(rs.build(start), start), turn)
        norm = model.get_submodule("block1.0.bn2")
        with torch.no_grad():
            for name, tensor in norm.state_dict().items():
                value = np.abs(drawn(f"{turn} {name}", tuple(tensor.shape)).array)
                tensor.copy_(torch.from_numpy(value) if tensor.dim() else torch.tensor(96))
        found.append(member(rs.harvest(start, model), turn))
    return graft(*found)


# --- all of them ----------------------------------------------------------------------------------

SEEDS: dict[str, Callable[[], Checkpoint]] = {
    **{f"init-{init}": (lambda init=init: conv2(init)) for init in INITS},
    "init-scaled": lambda: conv2("kaiming-normal", scaled_for="0.3"),
}
"""Files of seeds alone, which every release makes alike."""

MAKERS: dict[str, Callable[[], Checkpoint]] = {
    **SEEDS,
    "popup": popup,
    "popup-scores": lambda: popup(scores=True),
    "popup-random": random_mask,
    "supermask": supermask,
    "plan": slices,
    "plan-zero": lambda: slices(zero=True),
    "slices-out": lambda: learned(slices()),
    "slices-in": lambda: learned(slices(dim="in")),
    "slices-zero": lambda: learned(slices(zero=True)),
    "survivors": survivors,
    "head-hadamard": lambda: fixed_head("hadamard"),
    "head-orthonormal": lambda: fixed_head("orthonormal", seed=4, scale=3.0),
    "converted": converted,
    "on-base": finetuned,
    "on-base-popup": on_a_base,
    "dtypes": every_dtype,
    "sources": every_source,
    "ensemble-masks": ensemble_of_masks,
    "ensemble-tasks": ensemble_of_tasks,
    "ensemble-slices": ensemble_of_slices,
}

OTHERWISE = "written-otherwise"


def deflated(data: bytes, level: int) -> RawTensor:
    """In several blocks, by zlib's usual strategy."""
    stream = zlib.compressobj(level, zlib.DEFLATED, -15)
    half = len(data) // 2
    parts = (
        stream.compress(data[:half]),
        stream.flush(zlib.Z_FULL_FLUSH),
        stream.compress(data[half:]),
    )
    return RawTensor("U8", np.frombuffer(b"".join((*parts, stream.flush())), dtype="u1"))


def written_otherwise() -> tuple[Json, Memory]:
    """A recipe with all that may be left out written out, and masks as no release writes them."""
    b, tensors = Builder(), {}
    for name, encoding, level in (("plain", "bits", 0), ("small", "gaps", 9)):
        bits = some_bits(name, 400, 0.2)
        data = pack_bits(bits) if encoding == "bits" else gap_bytes(bits)
        found = b.put("shared", name, "0.mask", deflated(data, level))
        mask = {"kind": "mask", "encoding": encoding, "count": sum(bits), "digest": found}
        tensors[name] = entry("F16", (20, 20), random("normal", 0.5), mask)
    source = b.stored("z", "plain", drawn("otherwise", (3,)))
    members = [{"name": "z", "tensors": {"plain": {"entry": entry("F32", (3,), source)}}}]
    notes = {"naïve": "é\U0001f600", "large": 1e300}
    whole = tiny(tensors=tensors, members=[*members, {"name": "a"}], notes=notes)
    recipe = finish(assemble(whole, b.payloads)).recipe.to_json()
    absent = ("head", "input", "classes", "dataset", "calibration", "plan")
    usual = {"scores": {}, "algorithm": "edge-popup", "rescaled": False, "provenance": {}}
    recipe |= {"model": None, "input": None, "bases": {}}
    recipe["members"] = [{**dict.fromkeys(absent), **usual, **each} for each in recipe["members"]]
    recipe["members"][0]["tensors"]["plain"] |= {"overlays": [], "digest": None}
    recipe["members"][0]["tensors"]["plain"]["entry"]["overlays"] = []
    recipe["members"][1]["tensors"] = {}
    for each in recipe["tensors"].values():
        each["source"]["stream"] = None
    return recipe, b.payloads


def write_otherwise(path: Path) -> None:
    """A file as another program may write it: keys and data in another order, spaces, UTF-8."""
    recipe, payloads = written_otherwise()
    text = json.dumps(backwards(recipe), indent=1, ensure_ascii=False)
    header: Json = {"__metadata__": {"another": "é", METADATA_KEY: text}}
    data = b""
    for name in sorted(payloads, reverse=True):
        raw, start = payloads[name], len(data)
        data += raw.array.tobytes()
        header[name] = tensor_header(raw.dtype, list(raw.shape), start, len(data))
    spaced = json.dumps(backwards(header), indent=0, ensure_ascii=False).encode() + b"   "
    path.write_bytes(raw_file(spaced, data))


def backwards(value: Any) -> Any:
    """The same JSON, the keys of objects in falling order."""
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in sorted(value, reverse=True)}
    return value


def described(raw: RawTensor) -> str:
    """Dtype, shape and SHA-256 of the bytes of a tensor."""
    return f"{raw.dtype} {list(raw.shape)} {hashlib.sha256(raw.array.tobytes()).hexdigest()}"


def recorded(path: Path) -> Json:
    """What digests.json says of a file."""
    whole: Json = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if path.name == BASE:
        with Container(path) as container:
            names = sorted(container.infos)
            return whole | {"tensors": {name: described(container.read(name)) for name in names}}
    with read_checkpoint(path) as checkpoint:
        whole["members"] = {}
        for each in checkpoint.recipe.members:
            tensors = checkpoint.tensors(each.name)
            about = {"tensors": {name: described(raw) for name, raw in tensors.items()}}
            for name in sorted(each.scores):
                raw = RawTensor("F32", checkpoint.scores(name, each.name))
                about.setdefault("scores", {})[name] = described(raw)
            whole["members"][each.name] = about
    return whole


def make(folder: Path) -> None:
    """Write the files that the folder lacks, and what digests.json says of them."""
    book = folder / DIGESTS
    known = json.loads(book.read_text("utf-8")) if book.exists() else {}
    if not (folder / BASE).exists():
        write_atomically(folder / BASE, pack(dense(), {"format": "pt"}))
    for name, maker in MAKERS.items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            made = maker()
            write_checkpoint(path, made, finished=made.recipe.backbone_id is not None)
    if not (path := folder / f"{OTHERWISE}.safetensors").exists():
        write_otherwise(path)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in known:
            known[path.name] = recorded(path)
    book.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
