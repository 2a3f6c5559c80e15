"""ONNX files: one network with its weights, for runtimes without torch.

torch's own exporter translates the plain module. What it notes down beside the graph (source
paths, torch's names) is left out, so that a file exported twice has the same bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.layers import set_exportable
from torch import nn
from torch.torch_version import TorchVersion

from randsurgery._version import __version__
from randsurgery.errors import IncompatibleError, UsageError, reason
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import write_atomically
from randsurgery.format.generator import generate
from randsurgery.format.rebuild import check_affordable
from randsurgery.format.recipe import Member, Recipe
from randsurgery.format.specs import ModelSpec
from randsurgery.surgery.architectures import check_name
from randsurgery.surgery.modules import build

OPSET = 18
"""The operator set torch's exporter is written in; any other goes through a converter."""

TORCH = "2.9"
"""The first release whose exporter by torch.export is the default. That of 2.6 fails on ResNets."""

TOLERANCE = 1e-4
"""How far a logit may be from torch's, as a share of the largest. Measured: below 5e-5, unless the
network amplifies rounding (docs/log.md, "ONNX")."""

NUDGE = 2.0**-16
"""A change of images of deviation 1, somewhat above rounding. A deep random network may amplify
that until nothing else is left."""

ROOM = 4
"""So many times what the nudge changes is allowed beside ``TOLERANCE``."""

TRIALS = (1, 3)
"""Images in the batches that are compared; the example for the exporter is a batch of 2."""

MAX_BYTES = (1 << 31) - 1
"""No ONNX file is larger: it is one message of protobuf's."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Graph:
    """What is known of an ONNX file before it is made."""

    shape: tuple[int, int, int]  # of an image: channels, height, width
    recorded: bool  # the file records this shape; otherwise it is the architecture's own
    compared: bool  # onnxruntime is here to run the file

    def note(self) -> str:
        """The input, for people."""
        whose = (
            ", as the file records"
            if self.recorded
            else " (the architecture's size; the file records none)"
        )
        return f"input: {'x'.join(map(str, self.shape))} images{whose}"

    def verdict(self, difference: float | None) -> str:
        """What is known of the written file, given what ``write_graph`` found, for people."""
        if difference is None:
            return "written and checked; onnxruntime is not installed, so no logits were compared"
        away = f"logits differ from torch's by {difference:.0e} of the largest"
        if difference <= TOLERANCE:
            return f"written and verified: {away}"
        return f"written: {away}, but this network turns rounding into as much"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"opset": OPSET, "input": list(self.shape)}


def plan_graph(recipe: Recipe, member: Member) -> Graph:
    """Check that there can be an ONNX file. Raises UsageError if a package is missing,
    IncompatibleError if the file names no (known) architecture or the network is too large."""
    if recipe.model is None:
        raise IncompatibleError("the file names no architecture, so there is no onnx export")
    check_name(recipe.model.name, IncompatibleError)
    if missing := [name for name in ("onnx", "onnxscript") if not _present(name)]:
        raise UsageError(
            f"--format onnx needs {' and '.join(missing)}: pip install 'randsurgery[onnx]'"
        )
    if TorchVersion(torch.__version__) < TORCH:
        raise UsageError(
            f"--format onnx needs torch {TORCH} or newer, found torch {torch.__version__}"
        )
    shapes = (recipe.resolved(member, name).shape for name in recipe.tensor_names(member))
    if (needed := 4 * sum(math.prod(shape) for shape in shapes)) > MAX_BYTES:
        raise IncompatibleError(
            f"an ONNX file holds at most {MAX_BYTES / 1e9:.2f} GB, the network needs "
            f"{needed / 1e9:,.2f} GB; --format dense has no such limit"
        )
    look = recipe.input
    shape = (look.channels, *look.size) if look else _native_shape(recipe.model)
    check_affordable(4 * max(TRIALS) * math.prod(shape), "the recorded size of images")
    # since 1.29 the runtime reports to its makers and leaves files, unless told before its import
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return Graph(shape, look is not None, _present("onnxruntime"))


def _native_shape(model: ModelSpec) -> tuple[int, int, int]:
    """The images an architecture was built for: by its arguments, else by timm's description."""
    cfg = timm.get_pretrained_cfg(model.name, allow_unregistered=True)
    channels, *size = cfg.input_size if cfg else (3, 224, 224)
    if isinstance(given := model.args.get("img_size"), int):
        size = [given, given]
    if isinstance(given := model.args.get("in_chans"), int):
        channels = given
    return (channels, *size)


def _present(package: str) -> bool:
    try:
        with _silence():
            importlib.import_module(package)
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No word of other libraries: exporter and runtime print, warn and log, from Python and below
    it. What matters of it comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _native_silence(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _native_silence() -> Iterator[None]:
    """The same for what writes to file descriptor 2 itself, such as onnxruntime's warning, on
    import, of graphics cards without a vendor (its issue 26763)."""
    try:
        kept = os.dup(2)
    except OSError:  # closed: nobody hears it anyway
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def write_graph(
    checkpoint: Checkpoint, member: Member, graph: Graph, target: Path
) -> tuple[int, float | None]:
    """Write one member as an ONNX file. Its bytes, and how far its logits were from torch's, as a
    share of the largest; None without onnxruntime.

    The file is checked, and run on batches of 1 and 3 images of noise, before it gets its name.
    Raises IncompatibleError if the architecture cannot be translated or the logits differ,
    OutputError; then nothing is written.
    """
    recipe = checkpoint.recipe
    assert recipe.model is not None
    name = recipe.model.name
    trials = _trials(build(checkpoint, member.name).float(), name, graph.shape)
    # as timm wants it: attention in single operations, which the exporter knows how to reshape
    with set_exportable(True):
        model = build(checkpoint, member.name).float()
    data = _translate(model, name, graph.shape, metadata(recipe, member))
    del model
    differences: list[float] = []

    def verify(written: Path) -> None:
        run = trials if graph.compared else []
        with _silence():
            found = _run_file(written, name, [trial.images for trial in run])
        differences.extend(t.compare(logits, name) for t, logits in zip(run, found, strict=True))

    size = write_atomically(target, iter([data]), verify)
    return size, max(differences, default=None)


@dataclass(frozen=True)
class _Trial:
    """Images, torch's logits, and how far these move under the nudge."""

    images: Array
    logits: Array
    unrest: float

    def compare(self, theirs: Array, name: str) -> float:
        """The largest difference as a share of the largest logit. Raises IncompatibleError."""
        if theirs.shape != self.logits.shape:
            raise IncompatibleError(
                f"{name} as ONNX gives logits of shape {list(theirs.shape)}, torch "
                f"{list(self.logits.shape)}; nothing was written"
            )
        largest = float(np.abs(self.logits).max())
        difference = float(np.abs(theirs - self.logits).max())
        if not difference <= TOLERANCE * largest + ROOM * self.unrest:  # NaN is not
            raise IncompatibleError(
                f"{name} as ONNX gives logits {difference:.3g} away from torch's, whose largest "
                f"is {largest:.3g}; nothing was written"
            )
        return difference / largest if largest else difference


def _trials(model: nn.Module, name: str, shape: tuple[int, int, int]) -> list[_Trial]:
    found = []
    for count in TRIALS:
        images, nudge = _noise(2 * count, shape).reshape(2, count, *shape)
        logits = _run_module(model, name, images)
        if not np.isfinite(logits).all():
            raise IncompatibleError(
                f"{name} gives infinite logits or NaN for images of noise, so that no export of it "
                "can be verified"
            )
        moved = _run_module(model, name, images + np.float32(NUDGE) * nudge)
        found.append(_Trial(images, logits, float(np.abs(moved - logits).max())))
    return found


def _noise(count: int, shape: tuple[int, int, int]) -> Array:
    size = count * math.prod(shape)
    images = generate("normal", size, 1.0, seed=0, stream="onnx-images", role="augment")
    return images.reshape(count, *shape)


def _run_module(model: nn.Module, name: str, images: Array) -> Array:
    try:
        with _silence(), torch.inference_mode():
            logits = model(torch.from_numpy(images))
    except Exception as error:  # whatever the architecture's own code raises
        size = "x".join(map(str, images.shape[1:]))
        raise IncompatibleError(f"{name} cannot take images of {size}: {reason(error)}") from None
    if not isinstance(logits, torch.Tensor):
        raise IncompatibleError(f"{name} gives several outputs, an ONNX export is of one: logits")
    found: Array = logits.numpy()
    return found


def _translate(
    model: nn.Module, name: str, shape: tuple[int, int, int], said: Mapping[str, str]
) -> bytes:
    """The module as an ONNX file's bytes, with this metadata instead of the exporter's notes."""
    try:
        with _silence():
            program: Any = torch.onnx.export(
                model,
                (torch.zeros(2, *shape),),
                dynamo=True,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
            proto = program.model_proto
            _forget_notes(proto)
            for key, value in sorted(said.items()):
                proto.metadata_props.add(key=key, value=value)
            data: bytes = proto.SerializeToString(deterministic=True)
            return data
    except Exception as error:  # the exporter's own errors, and those of what it uses
        root: BaseException = error
        while root.__cause__ is not None:  # the exporter wraps what went wrong, twice
            root = root.__cause__
        raise IncompatibleError(
            f"torch's exporter cannot express {name} in ONNX ({reason(root)}); randsurgery.load "
            "serves it"
        ) from None


def _forget_notes(message: Any) -> None:
    """Drop, at every depth, what the exporter notes beside the graph: stack traces with paths."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _forget_notes(part)


def metadata(recipe: Recipe, member: Member) -> dict[str, str]:
    """What a user of the ONNX file needs beside the graph, as the file records it. Lists are JSON;
    the names are timm's where timm has one."""
    assert recipe.model is not None
    found = {
        "architecture": recipe.model.name,
        "member": member.name,
        "randsurgery_version": __version__,
    }
    if recipe.backbone_id is not None:
        found["backbone_id"] = recipe.backbone_id
    if member.classes:
        found["label_names"] = json.dumps(member.classes)
    if (look := recipe.input) is not None:
        found["input_size"] = json.dumps([look.channels, *look.size])
        found["mean"] = json.dumps([float.fromhex(number) for number in look.mean])
        found["std"] = json.dumps([float.fromhex(number) for number in look.std])
        found["interpolation"] = look.interpolation
        found["crop_pct"] = json.dumps(float.fromhex(look.crop))
        found["crop_mode"] = look.crop_mode
    return found


def _run_file(path: Path, name: str, batches: list[Array]) -> list[Array]:
    """What onnxruntime makes of the batches, after onnx's own check of the file."""
    onnx = importlib.import_module("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
        if not batches:
            return []
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [session.run(["logits"], {"input": images})[0] for images in batches]
    except Exception as error:  # whatever the checker and the runtime raise
        raise IncompatibleError(
            f"{name} as ONNX cannot be run: {reason(error)}; nothing was written"
        ) from None
