"""Files as training programs write them, one writer a row of docs/checkpoints.md."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn
from torch.nn.utils import prune

State = dict[str, torch.Tensor]
ARCH = "test_resnet"
CLASSES = 10


def dense(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """A small network whose every tensor is far from any start value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(ARCH, num_classes=classes)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                nn.init.normal_(tensor, mean=float("var" in name), std=0.1)
            else:
                tensor.fill_(7)
    return model


def plain(folder: Path, model: nn.Module) -> Path:
    """A state dict alone."""
    torch.save(model.state_dict(), folder / "model.pth")
    return folder / "model.pth"


def under(key: str, name: str = "model.pth") -> Callable[[Path, nn.Module], Path]:
    """A state dict under a key, beside what tutorials keep."""

    def write(folder: Path, model: nn.Module) -> Path:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        beside = {"epoch": 3, "best_acc1": torch.tensor(0.5), "optimizer": optimizer.state_dict()}
        torch.save({**beside, key: model.state_dict()}, folder / name)
        return folder / name

    return write


def prefixed(prefix: str) -> Callable[[Path, nn.Module], Path]:
    """All names behind a prefix."""

    def write(folder: Path, model: nn.Module) -> Path:
        state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state}, folder / "wrapped.pth")
        return folder / "wrapped.pth"

    return write


def old_torch(folder: Path, model: nn.Module) -> Path:
    """What torch wrote before 1.6."""
    torch.save(model.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def without_counts(folder: Path, model: nn.Module) -> Path:
    """What torch wrote before 0.4.1: no counts of batches."""
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, folder / "nocount.pth")
    return folder / "nocount.pth"


def timm_train(folder: Path, model: nn.Module, *, ema: nn.Module | None = None) -> Path:
    """What timm's train.py writes, by timm's own saver."""
    args = argparse.Namespace(model=ARCH, lr=0.1, opt_kwargs={"a": 1}, data_dir=Path("data"))
    average = None
    if ema is not None:
        average = ModelEmaV3(model)
        average.module.load_state_dict(ema.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saver = CheckpointSaver(
        model, optimizer, args=args, model_ema=average, amp_scaler=NativeScaler(device="cpu"),
        checkpoint_dir=str(folder), recovery_dir=str(folder),
    )  # fmt: skip
    saver.save_checkpoint(epoch=3, metric=0.5)
    return folder / "model_best.pth.tar"


def lightning(folder: Path, model: nn.Module) -> Path:
    """What Lightning writes of a module that keeps its network in ``model``, and a loss."""
    state: dict[str, Any] = {f"model.{n}": t for n, t in model.state_dict().items()}
    state["criterion.weight"] = torch.ones(CLASSES)
    found = {
        "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.5.0", "state_dict": state,
        "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": [],
        "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1, "where": Path("x")},
    }  # fmt: skip
    torch.save(found, folder / "lightning.ckpt")
    return folder / "lightning.ckpt"


def averaged_model(folder: Path, model: nn.Module) -> Path:
    """The state dict of torch.optim.swa_utils.AveragedModel."""
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), folder / "swa.pth")
    return folder / "swa.pth"


def compiled_block(folder: Path, model: nn.Module) -> Path:
    """One block compiled: the wrapper stands within the names."""
    state = OrderedDict(
        (n.replace("stages.", "stages._orig_mod.").replace("layer1.", "layer1._orig_mod."), t)
        for n, t in model.state_dict().items()
    )
    assert any("_orig_mod" in name for name in state)
    torch.save(state, folder / "block.pth")
    return folder / "block.pth"


def safetensors(folder: Path, model: nn.Module) -> Path:
    """A safetensors file."""
    save_file(model.state_dict(), folder / "dense.safetensors")
    return folder / "dense.safetensors"


def halves(state: State) -> tuple[State, State]:
    """The tensors in two parts."""
    names = sorted(state)
    middle = len(names) // 2
    return {n: state[n] for n in names[:middle]}, {n: state[n] for n in names[middle:]}


def sharded(folder: Path, model: nn.Module) -> Path:
    """A sharded safetensors file with its index."""
    return write_parts(folder, model, "model", "safetensors", lambda s, p: save_file(s, p))


def sharded_bin(folder: Path, model: nn.Module) -> Path:
    """The same with parts of torch.save."""
    return write_parts(folder, model, "pytorch_model", "bin", torch.save)


def write_parts(
    folder: Path, model: nn.Module, stem: str, ending: str, save: Callable[[Any, Path], Any]
) -> Path:
    """Two parts and their index."""
    places = {}
    for number, part in enumerate(halves(model.state_dict()), 1):
        name = f"{stem}-{number:05}-of-00002.{ending}"
        save(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def folder_of(
    write: Callable[[Path, nn.Module], Path], name: str | None = None
) -> Callable[[Path, nn.Module], Path]:
    """A folder as the Hugging Face Hub has it, with timm's config.json."""

    def whole(folder: Path, model: nn.Module) -> Path:
        place = folder / "hf"
        place.mkdir()
        file = write(place, model)
        if name is not None:
            file.rename(place / name)
        cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "input_size": [3, 32, 32]}
        config = {"architecture": ARCH, "num_classes": CLASSES, "pretrained_cfg": cfg}
        (place / "config.json").write_text(json.dumps(config))
        return place

    return whole


def pruned(folder: Path, model: nn.Module) -> Path:
    """Two layers pruned by torch.nn.utils.prune, a half of each."""
    for name in PRUNED:
        prune.l1_unstructured(model.get_submodule(name), "weight", amount=0.5)
    torch.save(model.state_dict(), folder / "pruned.pth")
    for name in PRUNED:
        prune.remove(model.get_submodule(name), "weight")
    return folder / "pruned.pth"


PRUNED = ("conv1.0", "fc")

LAYOUTS: dict[str, Callable[[Path, nn.Module], Path]] = {
    "`torch.save(model.state_dict(), ...)`": plain,
    "`state_dict`, as the ImageNet example of torch": under("state_dict", "model.pth.tar"),
    "`model_state_dict`, as torch's tutorials": under("model_state_dict"),
    "`model`": under("model"),
    "`net`": under("net"),
    "`network`": under("network"),
    "`weights`": under("weights"),
    "`params`": under("params"),
    "`module`": under("module"),
    "another name, if it is the only state dict": under("backbone_weights"),
    "timm's train.py, `model_best.pth.tar`": timm_train,
    "Lightning, `model.` and a loss": lightning,
    "DataParallel, DDP: `module.`": prefixed("module."),
    "torch.compile: `_orig_mod.`": prefixed("_orig_mod."),
    "both: `_orig_mod.module.`": prefixed("_orig_mod.module."),
    "both: `module._orig_mod.`": prefixed("module._orig_mod."),
    "`model.`": prefixed("model."),
    "`net.`": prefixed("net."),
    "`network.`": prefixed("network."),
    "`backbone.`": prefixed("backbone."),
    "FSDP: `_fsdp_wrapped_module.`": prefixed("_fsdp_wrapped_module."),
    "a compiled block: `_orig_mod.` within names": compiled_block,
    "swa_utils.AveragedModel: `n_averaged`, `module.`": averaged_model,
    "torch before 1.6": old_torch,
    "torch before 0.4.1: no `num_batches_tracked`": without_counts,
    "torch.nn.utils.prune: `weight_orig`, `weight_mask`": pruned,
    "safetensors": safetensors,
    "`model.safetensors.index.json`": sharded,
    "`pytorch_model.bin.index.json`": sharded_bin,
    "a folder with `model.safetensors`": folder_of(safetensors, "model.safetensors"),
    "a folder with `model.safetensors.index.json`": folder_of(sharded),
    "a folder with `pytorch_model.bin`": folder_of(plain, "pytorch_model.bin"),
    "a folder with `pytorch_model.bin.index.json`": folder_of(sharded_bin),
}
"""Every row of the table in docs/checkpoints.md by its first column."""
