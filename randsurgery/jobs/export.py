"""``export``: dense safetensors, timm folders, ONNX files, self-contained files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from randsurgery.errors import FileFormatError, IncompatibleError, OutputError, UsageError
from randsurgery.format.canonical import digest
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.container import (
    Container,
    check_network,
    check_output,
    pack,
    write_atomically,
)
from randsurgery.format.derivation import payload_name, payload_names
from randsurgery.format.fields import as_given
from randsurgery.format.recipe import BaseSource, Member, MemberTensor, Recipe, StoredSource
from randsurgery.format.shards import check_not_input
from randsurgery.format.writing import write_checkpoint
from randsurgery.jobs.hub import PREFIX
from randsurgery.jobs.inputs import DataOptions
from randsurgery.jobs.networks import open_network
from randsurgery.jobs.onnx import Graph, plan_graph, write_graph
from randsurgery.jobs.sources import SourceSpec
from randsurgery.surgery.zoo import zoo_names

KINDS = ("dense", "timm", "onnx", "self-contained")


@dataclass(frozen=True)
class Export:
    """An export, checked and ready to run."""

    checkpoint: Checkpoint
    member: Member
    kind: str
    target: Path
    how_to_load: str
    force: bool
    graph: Graph | None = None  # of an ONNX file
    notes: tuple[str, ...] = ()  # of how dense weights were read


def prepare(
    network: SourceSpec,
    output: str | None,
    *,
    kind: str,
    member: str | None,
    force: bool,
    options: DataOptions | None = None,
) -> Export:
    """Check input and target. Raises RandsurgeryError; writes nothing.

    The export's checkpoint is to be closed by the caller.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown --format {kind!r}, expected dense, timm or onnx")
    with contextlib.ExitStack() as stack:
        notes: list[str] = []
        checkpoint = stack.enter_context(open_network(network, options, notes))
        who = checkpoint.member(member)
        if kind != "self-contained":
            checkpoint = replace(checkpoint, recipe=checkpoint.recipe.seen_by(who))
        graph = plan_graph(checkpoint.recipe, who) if kind == "onnx" else None
        target = _target(checkpoint, output, _stem(network.name), kind, force)
        check_not_input(target, network.inputs)
        if kind in ("dense", "timm") and who.head is not None and who.head.kind != "linear":
            raise IncompatibleError(
                f"the classifier is fixed ({who.head.kind}): it normalises its input, which no "
                "architecture of timm's does; randsurgery.load and --format onnx serve it"
            )
        load = _how_to_load(checkpoint.recipe, who, kind, target)
        stack.pop_all()
    return Export(checkpoint, who, kind, target, load, force, graph, tuple(notes))


def _stem(file: str) -> str:
    """What names the default output: the file's stem, or the repository's name."""
    return file.partition("@")[0].rpartition("/")[2] if file.startswith(PREFIX) else Path(file).stem


def _target(checkpoint: Checkpoint, output: str | None, stem: str, kind: str, force: bool) -> Path:
    if kind == "onnx":
        return check_output(output or f"{stem}.onnx", force=force)
    if kind != "timm":
        return check_network(output or f"{stem}-{kind}.safetensors", force=force)
    target = Path(output or f"{stem}-timm")
    if checkpoint.recipe.model is None:
        raise IncompatibleError("the file names no architecture, so there is no timm export")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file, a folder is needed")
    if target.exists() and any(target.iterdir()) and not force:
        raise OutputError(f"{target}: exists already; choose another --output or pass --force")
    check_output(target.with_name(target.name + ".tmp"), force=True)
    return target


def _how_to_load(recipe: Recipe, member: Member, kind: str, target: Path) -> str:
    if kind == "self-contained":
        return f"randsurgery.load({str(target)!r})"
    if kind == "onnx":
        session = f"onnxruntime.InferenceSession({str(target)!r})"
        return f"{session}.run(None, {{'input': images}})"
    if recipe.model is None:
        return f"safetensors.torch.load_file({str(target)!r})"
    ours = recipe.model.name in zoo_names()
    first = "import randsurgery.surgery.zoo; " if ours else ""
    if kind == "timm":
        return f"{first}timm.create_model({'local-dir:' + str(target)!r}, pretrained=True)"
    args: dict[str, Any] = dict(recipe.model.args)
    if "num_classes" not in args and member.head is not None:
        args["num_classes"] = member.head.classes
    given = "".join(f", {key}={as_given(value)!r}" for key, value in sorted(args.items()))
    call = f"timm.create_model({recipe.model.name!r}, checkpoint_path={str(target)!r}{given})"
    return first + call


@dataclass(frozen=True)
class Written:
    """What was written: its bytes and, of an ONNX file that was run, how far its logits are from
    torch's, as a share of the largest."""

    bytes: int
    difference: float | None = None


def run(plan: Export) -> Written:
    """Write the export. Raises OutputError, IncompatibleError."""
    if plan.kind == "dense":
        tensors = plan.checkpoint.tensors(plan.member.name)

        def verify(written: Path) -> None:
            with Container(written) as again:
                for name, raw in tensors.items():
                    if not again.read(name).same_bits(raw):
                        raise FileFormatError(f"{written}: {name} read back differs")

        return Written(write_atomically(plan.target, pack(tensors, {"format": "pt"}), verify))
    if plan.kind == "self-contained":
        whole = self_contained(plan.checkpoint)
        return Written(write_checkpoint(plan.target, whole, force=plan.force))
    if plan.graph is not None:
        return Written(*write_graph(plan.checkpoint, plan.member, plan.graph, plan.target))
    return Written(_timm_folder(plan))


def self_contained(checkpoint: Checkpoint) -> Checkpoint:
    """The same file with the base's tensors stored in it. Raises IncompatibleError if a plan is yet
    to start from the base."""
    recipe = checkpoint.recipe
    for member in recipe.members:
        for name, part in (member.plan.tensors if member.plan else {}).items():
            if isinstance(part.start, BaseSource):
                raise IncompatibleError(
                    f"the plan starts {name} from its base; train it first, then embed the base"
                )
    payloads = Memory({n: checkpoint.payloads.read(n) for n in payload_names(recipe)})

    def embedded(owner: str, name: str, entry: Any) -> Any:
        if not isinstance(entry.source, BaseSource):
            return entry
        raw = checkpoint.bases[entry.source.base].read(entry.source.tensor)
        payloads[payload_name(owner, name, "source")] = raw
        return entry.model_copy(update={"source": StoredSource(digest=digest(raw.array))})

    tensors = {name: embedded("shared", name, entry) for name, entry in recipe.tensors.items()}
    members = []
    for member in recipe.members:
        own = {
            name: part
            if part.entry is None
            else MemberTensor(entry=embedded(member.name, name, part.entry))
            for name, part in member.tensors.items()
        }
        members.append(member.model_copy(update={"tensors": own}))
    update = {"tensors": tensors, "members": tuple(members), "bases": {}}
    return Checkpoint(recipe.model_copy(update=update), payloads)


def _timm_folder(plan: Export) -> int:
    """model.safetensors and config.json as timm's hub layout has them, moved into place whole."""
    from timm.models import save_for_hf

    from randsurgery.surgery.modules import build

    model = build(plan.checkpoint, plan.member.name, dtype=None)  # as it is in the file
    model.pretrained_cfg = _own_cfg(model.pretrained_cfg, plan.checkpoint.recipe)  # type: ignore[assignment]
    target = plan.target
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            save_for_hf(
                model,
                folder,
                model_config=_model_config(plan.member),
                data_config=_data_config(plan.checkpoint.recipe),
                safe_serialization=True,
            )
            _move_whole(Path(folder), target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from None
    return sum(part.stat().st_size for part in target.iterdir())


def _move_whole(folder: Path, target: Path) -> None:
    """The folder in the place of a missing or empty one; its files, one by one, in a full one."""
    mask = _umask()
    folder.chmod(0o777 & ~mask)
    for made in folder.iterdir():
        made.chmod(0o666 & ~mask)
    if not target.exists() or not any(target.iterdir()):
        folder.replace(target)
        folder.mkdir()  # for whoever cleans up
        return
    for made in sorted(folder.iterdir()):
        made.replace(target / made.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_OF_THEIRS = ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes")


def _own_cfg(cfg: Any, recipe: Recipe) -> dict[str, Any]:
    """timm's description of an architecture without what it says of timm's weights, unless these
    weights descend from dense ones."""
    return {key: cfg[key] for key in cfg if recipe.bases or key not in _OF_THEIRS}


def _model_config(member: Member) -> dict[str, Any]:
    return {"label_names": list(member.classes)} if member.classes else {}


def _data_config(recipe: Recipe) -> dict[str, Any]:
    look = recipe.input
    if look is None:
        return {}
    return {
        "input_size": (look.channels, *look.size),
        "mean": tuple(float.fromhex(m) for m in look.mean),
        "std": tuple(float.fromhex(s) for s in look.std),
        "interpolation": look.interpolation,
        "crop_pct": float.fromhex(look.crop),
        "crop_mode": look.crop_mode,
    }
