"""Networks of thirty families in half precision as bases: written, evaluated, masked, exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from ensemble_helpers import one_thread, said, succeed
from PIL import Image
from safetensors.torch import load_file
from surgery_helpers import bits, save_dense

import randsurgery as rs

pytestmark = pytest.mark.slow

# name: image size in pixels
FAMILIES = {
    "resnet10t": 64, "mobilenetv3_small_050": 64, "mobilenetv2_035": 64, "lcnet_035": 64,
    "tinynet_e": 64, "mnasnet_small": 64, "ghostnet_100": 64, "regnetx_002": 64, "regnety_002": 64,
    "densenet121": 64, "dpn48b": 64, "ese_vovnet19b_dw": 64, "rexnet_100": 64, "fastvit_t8": 64,
    "edgenext_xx_small": 64, "mobilevit_xxs": 64, "test_byobnet": 64, "fasternet_t0": 64,
    "repvit_m0_9": 64, "starnet_s1": 64, "efficientvit_b0": 64, "test_mambaout": 64,
    "test_convnext": 64, "test_efficientnet": 64, "hgnetv2_b0": 64, "cs3darknet_s": 64,
    "pvt_v2_b0": 64, "test_vit": 160, "test_maxvit": 160, "xcit_nano_12_p16_224": 224,
    "pit_ti_224": 224, "levit_128s": 224,
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield tmp_path


def images(size: int) -> torch.Tensor:
    """A folder of images, four to train on and two to test with; the latter, as they are seen."""
    drawn = np.random.default_rng(0).integers(0, 256, (6, size, size, 3), dtype=np.uint8)
    for at, pixels in enumerate(drawn):
        folder = Path("data", "train" if at < 4 else "test", "ab"[at % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{at}.png")
    return torch.from_numpy(drawn[4:]).permute(0, 3, 1, 2) / 255


@pytest.mark.filterwarnings("ignore:neither masked nor learned:randsurgery.RandsurgeryWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_a_family_in_half_precision(arch: str, dtype: torch.dtype) -> None:
    size = FAMILIES[arch]
    shown = images(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = timm.create_model(arch, num_classes=2).eval()
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in plain.state_dict().items()}
    save_dense(Path("dense.safetensors"), state)
    plain.load_state_dict(state)  # in single precision, as networks compute

    succeed("init", arch, "--checkpoint", "dense.safetensors", "--img-size", size,
            "-o", "net.safetensors")  # fmt: skip
    seen = ("--data-dir", "data", "--img-size", size)
    found = said("eval", "net.safetensors", *seen, "--crop-pct", 1)
    cfg = timm.get_pretrained_cfg(arch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.mean, cfg.std))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(plain((shown - mean) / std), torch.tensor([0, 1]))
    assert found["loss"] == pytest.approx(float(loss), rel=1e-4)

    succeed("popup", arch, "--checkpoint", "dense.safetensors", *seen, "--epochs", 1, "-b", 4,
            "--k", "0.5", "-o", "mask.safetensors")  # fmt: skip
    masked = rs.load("mask.safetensors", dtype=None).state_dict()
    halved = 0
    for name, tensor in masked.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue  # what a step moves
        assert tensor.dtype == state[name].dtype, name
        kept = tensor != 0
        assert torch.equal(bits(tensor[kept]), bits(state[name][kept])), name
        halved += int(kept.sum()) == tensor.numel() // 2
    assert halved > 5

    succeed("export", "net.safetensors", "-o", "again.safetensors")
    again = load_file("again.safetensors")
    assert sorted(again) == sorted(state)
    for name, tensor in state.items():
        assert torch.equal(bits(again[name]), bits(tensor)), name
