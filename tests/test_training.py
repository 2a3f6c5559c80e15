"""Data and the training loop: what a run depends on, and what it leaves alone."""

from __future__ import annotations

import gzip
import hashlib
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from surgery_helpers import assert_same_state, attach, conv2, quick, same_bits, write_images
from torch import nn

from randsurgery.errors import (
    DataError,
    DivergedError,
    FileFormatError,
    IncompatibleError,
    UsageError,
)
from randsurgery.format.canonical import canonical_json
from randsurgery.format.container import pack
from randsurgery.format.specs import DatasetSpec, InputSpec
from randsurgery.format.writing import write_checkpoint
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.modules import build, harvest
from randsurgery.training.augmentation import augment, moves
from randsurgery.training.catalogue import DATASETS, input_for, recipe, recipe_name
from randsurgery.training.data import Data, Resident, normalisation
from randsurgery.training.datasets import folder_data, open_data
from randsurgery.training.evaluate import evaluate
from randsurgery.training.folders import read_folder
from randsurgery.training.loop import Hooks, channels_last, fit, start
from randsurgery.training.settings import TrainSettings
from randsurgery.training.state import RunState, read_state, write_state

pytestmark = pytest.mark.slow

DIGITS = DatasetSpec(name="digits")


def look(size: int = 32, channels: int = 3) -> InputSpec:
    return InputSpec(
        size=(size, size), channels=channels, mean=((0.5).hex(),) * channels,
        std=((0.25).hex(),) * channels, interpolation="bilinear", crop=(1.0).hex(),
    )  # fmt: skip


def digits(split: Any, **options: Any) -> Data:
    return open_data(DIGITS, look(**options), split)


def few(count: int = 64, split: Any = "train") -> Resident:
    whole = digits(split)
    assert isinstance(whole, Resident)
    return Resident(whole.images[:count], whole.targets[:count], whole.classes, whole.spec)


def popped(**options: Any) -> nn.Module:
    return attach(build(conv2()), Popup(**{"k": "0.5", **options}))


# --- augmentation and order ----------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 2])
def test_augmentation_equals_a_slow_twin(padding: int) -> None:
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(1, 256, (12, 3, 8, 7), dtype=np.uint8))
    drawn = draw.integers(0, 2 * padding + 1, (12, 3))
    drawn[:, 2] = draw.integers(0, 2, 12)
    found = augment(images, torch.from_numpy(drawn), padding)
    assert drawn[:, 2].any()
    for image, (row, column, flip), out in zip(images.numpy(), drawn, found.numpy(), strict=True):
        padded = np.zeros((3, 8 + 2 * padding, 7 + 2 * padding), dtype=np.uint8)
        padded[:, padding : padding + 8, padding : padding + 7] = image
        crop = padded[:, row : row + 8, column : column + 7]
        assert np.array_equal(out, crop[:, :, ::-1] if flip else crop)


def batches(data: Data, settings: TrainSettings, epoch: int = 0) -> list[Any]:
    return list(data.training(settings, epoch))


def whole_epoch(data: Data, settings: TrainSettings, epoch: int = 0) -> torch.Tensor:
    return torch.cat([images for images, _ in batches(data, settings, epoch)])


def test_order_and_augmentation_follow_seed_and_epoch_alone() -> None:
    data, settings = few(), quick(hflip=True)
    first = whole_epoch(data, settings)
    torch.manual_seed(99)
    assert torch.equal(whole_epoch(data, settings), first)
    assert torch.equal(whole_epoch(data, quick(hflip=True, batch_size=8)), first)
    assert not torch.equal(whole_epoch(data, settings, 1), first)
    assert not torch.equal(whole_epoch(data, quick(hflip=True, seed=1)), first)


def order(data: Data, epoch: int, **more: Any) -> list[int]:
    """The labels of an epoch without augmentation."""
    settings = quick(batch_size=8, crop_padding=0, hflip=False, **more)
    return [int(label) for _, part in data.training(settings, epoch) for label in part]


def test_order_alone_follows_seed_and_epoch(images: Path) -> None:
    for data in (few(), open_folder(images, "train")):
        assert order(data, 0) == order(data, 0)
        assert order(data, 0) != order(data, 1)
        assert order(data, 0) != order(data, 0, seed=1)


def test_each_image_comes_once_an_epoch_and_labels_stay_with_images() -> None:
    data = few(70)
    settings = quick(crop_padding=0, hflip=False)
    seen = batches(data, settings)
    assert [len(labels) for _, labels in seen] == [16] * 4  # a last, smaller batch is left out
    plain = {image.numpy().tobytes(): int(label) for image, label in _pairs(data)}
    shown = [
        (image.numpy().tobytes(), int(label))
        for images, labels in seen
        for image, label in zip(images, labels, strict=True)
    ]
    assert all(plain[image] == label for image, label in shown)
    assert max(Counter(image for image, _ in shown).values()) <= 2  # digits holds some twins
    assert [image for image, _ in shown] != [image.numpy().tobytes() for image, _ in _pairs(data)][
        :64
    ]


def _pairs(data: Data) -> list[Any]:
    return [pair for batch in data.evaluation(16) for pair in zip(*batch, strict=True)]


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    assert [len(labels) for _, labels in batches(few(5), quick())] == [5]
    assert few(5).steps(16) == 1


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_last_reaches_the_convolutions(channels: int) -> None:
    """torch takes an image of one channel to be in either layout, by its strides."""
    images = torch.randn(2, channels, 5, 4)
    found = channels_last(images)
    assert torch.equal(found, images)
    assert found.stride() == (20 * channels, 1, 4 * channels, channels)
    output = nn.Conv2d(channels, 8, 3)(found)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not output.is_contiguous()


def test_images_are_normalised_in_byte_units() -> None:
    mean, std = normalisation(look(), torch.device("cpu"))
    assert mean.shape == std.shape == (1, 3, 1, 1)
    images, _ = next(few().evaluation(4))
    expected = (few().images[:4].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(images, expected)


def test_crops_and_flips_are_spread_evenly() -> None:
    drawn = moves(20_000, quick(crop_padding=2, hflip=True), 0)
    for column, high in ((0, 5), (1, 5), (2, 2)):
        counts = torch.bincount(drawn[:, column], minlength=high)
        assert len(counts) == high
        assert int(counts.min()) > 20_000 / high * 0.9
    assert not moves(100, quick(hflip=False), 0)[:, 2].any()


# --- data ----------------------------------------------------------------------------------------


def test_the_digits_split_is_fixed() -> None:
    train, test = digits("train"), digits("test")
    assert isinstance(train, Resident)
    assert isinstance(test, Resident)
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (3, 32, 32)
    assert train.classes == tuple("0123456789")
    found = hashlib.sha256(np.concatenate([train.labels, test.labels]).tobytes()).hexdigest()
    assert found[:16] == "8b3abe30dac121a4"
    pixels = hashlib.sha256(test.images.numpy().tobytes()).hexdigest()
    assert pixels[:16] == "24cf982c4616192e"
    from sklearn.datasets import load_digits

    source = load_digits().images
    together = torch.cat([train.images, test.images])[:, 0, ::4, ::4].numpy()
    expected = np.rint(source * (255 / 16)).astype(np.uint8)
    rows = [Counter(image.tobytes() for image in images) for images in (together, expected)]
    assert rows[0] == rows[1]  # every image is in one split, none in both


@pytest.mark.parametrize(("size", "channels"), [(28, 3), (48, 1), (32, 1)])
def test_digits_come_in_any_size_and_number_of_channels(size: int, channels: int) -> None:
    data = digits("test", size=size, channels=channels)
    images, _ = next(data.evaluation(3))
    assert images.shape == (3, channels, size, size)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "near: digits"),
        ("torch/fashion_mnst", "near: torch/fashion_mnist"),
        ("tfds/mnist", "expected digits, torch/NAME"),
        ("torch/cifar10", "needs --data-dir"),
    ],
)
def test_unknown_datasets_are_named_with_near_ones(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(DatasetSpec(name=name), look(), "train")


def write_idx(folder: Path, split: str, count: int, seed: int) -> np.ndarray[Any, Any]:
    """An MNIST-like split; returns the images."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array, magic in (("images-idx3", images, 0x803), ("labels-idx1", labels, 0x801)):
        head = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
        (folder / f"{split}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return images


def test_fashion_mnist_is_read_from_its_folder(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    train = write_idx(raw, "train", 40, 0)
    write_idx(raw, "t10k", 20, 1)
    spec = DatasetSpec(name="torch/fashion_mnist")
    found = open_data(spec, look(28), "train", data_dir=str(tmp_path))
    assert isinstance(found, Resident)
    assert torch.equal(found.images, torch.from_numpy(train)[:, None].expand(-1, 3, -1, -1))
    assert found.labels.tolist() == [i % 10 for i in range(40)]
    assert found.classes[0] == "T-shirt/top"
    grey = open_data(spec, look(32, 1), "test", data_dir=str(tmp_path))
    assert len(grey) == 20
    assert next(grey.evaluation(8))[0].shape == (8, 1, 32, 32)
    with pytest.raises(DataError, match="--dataset-download"):
        open_data(DatasetSpec(name="torch/mnist"), look(28), "train", data_dir=str(tmp_path))
    with gzip.open(tmp_path / "x.gz", "wb") as file:
        file.write(b"not used")
    with pytest.raises(DataError, match="no such folder"):
        open_data(spec, look(28), "train", data_dir=str(tmp_path / "none"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "train", {"bee": 9, "ant": 7, "cat": 8})
    write_images(tmp_path / "val", {"cat": 4, "ant": 3}, seed=1)
    return tmp_path


def open_folder(
    root: Path, split: Any, workers: int = 0, classes: tuple[str, ...] | None = None
) -> Data:
    folder = read_folder(str(root))
    part = "train" if split == "train" else "validation"
    return folder_data(folder, part, look(16), classes or folder.classes, workers=workers)


def test_a_folder_of_images_is_read_with_the_train_splits_labels(images: Path) -> None:
    train = open_folder(images, "train")
    assert train.classes == ("ant", "bee", "cat")
    assert len(train) == 24
    test = open_folder(images, "test", classes=train.classes)
    assert test.classes == train.classes
    labels = [int(label) for _, batch in test.evaluation(3) for label in batch]
    assert labels == [0] * 3 + [2] * 4
    with pytest.raises(DataError, match="'cat' is not one of the 2 known classes"):
        open_folder(images, "test", classes=("ant", "bee"))


def test_a_folder_without_a_train_split_is_refused(images: Path) -> None:
    with pytest.raises(DataError, match="train/"):
        open_folder(images / "val", "train")
    (images / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no images"):
        open_folder(images / "empty", "train")


def test_a_folder_run_does_not_depend_on_its_workers(images: Path) -> None:
    states = []
    for workers in (0, 1):
        train = open_folder(images, "train", workers)
        test = open_folder(images, "test", workers, classes=train.classes)
        model = attach(build(conv2(num_classes=3, img_size=16)), Popup(k="0.5"))
        records = fit(model, train, test, quick(batch_size=8, hflip=True, workers=workers))
        states.append((records, model.state_dict()))
    assert states[0][0] == states[1][0]
    assert_same_state(states[0][1], states[1][1])
    assert 0 <= states[0][0][-1]["test_accuracy"] <= 1


def test_folder_images_are_augmented_by_seed_and_epoch(images: Path) -> None:
    train, settings = open_folder(images, "train"), quick(batch_size=24, hflip=True)
    first = whole_epoch(train, settings)
    assert first.shape == (24, 3, 16, 16)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert torch.equal(whole_epoch(train, settings), first)
    assert not torch.equal(whole_epoch(train, settings, 1), first)
    assert not torch.equal(whole_epoch(train, quick(batch_size=24, hflip=True, seed=1)), first)


# --- the loop ------------------------------------------------------------------------------------


def global_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), *rest


def test_global_generators_are_neither_read_nor_set(images: Path) -> None:
    def run(source: Data, test: Data) -> dict[str, torch.Tensor]:
        model = timm.create_model("test_vit", num_classes=10, img_size=16, drop_rate=0.3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        fit(attach(model, Popup(k="0.5")), source, test, quick(batch_size=8))
        return model.state_dict()

    small = Resident(few().images[..., ::2, ::2], few().targets, few().classes, look(16))
    folder = open_folder(images, "train")
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        before = global_states()
        states = []
        for source in (small, folder):
            timm_model = run(source, source)
            states.append(timm_model)
        after = global_states()
        assert after[1:] == before[1:]
        found.append(states)
    for first, second in zip(*found, strict=True):
        assert_same_state(first, second)


def test_a_run_leaves_torchs_generator_as_it_was(images: Path) -> None:
    model = popped()
    torch.manual_seed(3)
    before = global_states()
    fit(model, few(), few(32, "test"), quick())
    evaluate(model, few(32, "test"))
    folder = open_folder(images, "train")
    small = attach(build(conv2(num_classes=3, img_size=16)), Popup(k="0.5"))
    fit(small, folder, folder, quick(batch_size=8))
    assert global_states() == before


def test_the_same_run_twice_gives_identical_bytes(tmp_path: Path) -> None:
    files = []
    for turn in range(2):
        torch.manual_seed(turn)
        model = popped()
        fit(model, few(), few(32, "test"), quick(epochs=2))
        path = tmp_path / f"{turn}.safetensors"
        write_checkpoint(path, harvest(conv2(), model))
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_dropout_follows_the_runs_seed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.drop = build(conv2()), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(self.drop(x))

    def run(seed: int, noise: int) -> float:
        model = attach(Net(), Popup(k="0.5"))
        torch.manual_seed(noise)
        return float(fit(model, few(32), few(32), quick(seed=seed, batch_size=32))[0]["train_loss"])

    assert run(0, 1) == run(0, 2)
    assert run(0, 1) != run(1, 1)


RUN = {"command": "popup", "lr": 0.01}


def interrupted(step: int, path: Path, **hooks: Any) -> Hooks:
    """Hooks that write the state after every step and stop the run at one of them."""

    def on_state(state: RunState) -> None:
        write_state(path, state, RUN)
        if state.step == step:
            raise KeyboardInterrupt

    return Hooks(on_state=on_state, state_every=1, **hooks)


@pytest.mark.parametrize("opt", ["momentum", "adamw", "lamb"])  # lamb has tensors in its groups
@pytest.mark.parametrize("stop", [1, 4, 6, 11])  # within the first epoch, at its end, later
def test_a_run_that_goes_on_from_its_state_ends_with_the_same_bits(
    opt: str, stop: int, tmp_path: Path
) -> None:
    settings = quick(epochs=3, opt=opt, lr=0.01, batch_size=16)
    train, test = few(), few(32, "test")

    def fresh() -> nn.Module:
        model = popped(learn=("@head",))
        model.fc1.register_forward_hook(
            lambda m, _, out: nn.functional.dropout(out, 0.5, m.training)
        )
        return model

    model = fresh()
    records = fit(model, train, test, settings)
    cut = fresh()
    with pytest.raises(KeyboardInterrupt):
        fit(cut, train, test, settings, interrupted(stop, tmp_path / "state"))
    again = fresh()
    state = read_state(tmp_path / "state", RUN)
    assert (state.epoch, state.step) == (stop // 4, stop)
    assert fit(again, train, test, settings, resume=state) == records
    assert_same_state(again.state_dict(), model.state_dict())


def test_what_the_caller_remembers_comes_back(tmp_path: Path) -> None:
    kept: list[torch.Tensor] = []
    hooks = interrupted(2, tmp_path / "state", memory=lambda: {"a": torch.arange(3)})
    with pytest.raises(KeyboardInterrupt):
        fit(popped(), few(), few(), quick(batch_size=16), hooks)
    state = read_state(tmp_path / "state", RUN)
    recall = Hooks(recall=lambda tensors: kept.append(tensors["a"]))
    fit(popped(), few(), few(), quick(batch_size=16), recall, resume=state)
    assert kept[0].tolist() == [0, 1, 2]


def test_a_state_of_another_run_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    run = start(popped(), few(), quick())
    write_state(tmp_path / "state", run.state(), RUN)
    with pytest.raises(IncompatibleError, match=r"its lr is 0.01, here it is 0.02"):
        read_state(tmp_path / "state", {**RUN, "lr": 0.02})
    (tmp_path / "other.safetensors").write_bytes(b"".join(pack({}, {"format": "pt"})))
    with pytest.raises(FileFormatError, match="no state"):
        read_state(tmp_path / "other.safetensors", RUN)
    other = popped(learn=("@head",))
    with pytest.raises(IncompatibleError, match="learns other tensors"):
        fit(other, few(), few(), quick(), resume=read_state(tmp_path / "state", RUN))


def test_a_state_holds_only_what_changes() -> None:
    model = popped()
    names = set(start(model, few(), quick()).state().part("model/"))
    assert all(name.endswith("scores") for name in names)


def test_a_state_is_a_copy() -> None:
    model = popped()
    run = start(model, few(), quick())
    state = run.state()
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    fit(model, few(), few(), quick())
    assert_same_state(state.tensors, before)


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    model = popped(learn=("@head",))
    with torch.no_grad():
        model.fc.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"step 1 \(epoch 1\).*--lr") as caught:
        fit(model, few(), few(), quick())
    assert caught.value.exit_code == 7


def test_a_last_step_that_ruins_the_weights_ends_the_run() -> None:
    model = popped(learn=("@head",))
    states: list[RunState] = []

    def ruin(step: int, loss: float) -> None:
        with torch.no_grad():
            model.fc.weight[0, 0] = float("inf")

    hooks = Hooks(on_state=states.append, on_step=ruin)
    with pytest.raises(DivergedError, match="not finite after step 1"):
        fit(model, few(), few(), quick(batch_size=64), hooks)
    assert not states


def test_a_test_loss_that_is_no_number_is_recorded_as_none() -> None:
    model = build(conv2())
    with torch.no_grad():
        model.fc.weight.fill_(float("inf"))
    found = evaluate(model, few(16)).to_json()
    assert found["loss"] is None
    canonical_json(found)


def test_with_nothing_to_learn_running_statistics_settle_and_weights_stay() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    attach(model, Popup(k="0.5", mask="random"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, few(), few(16), quick())
    moved = {n for n, t in model.state_dict().items() if not same_bits(t, before[n])}
    assert moved
    assert all("running" in name or "tracked" in name for name in moved)


def learned_scores(**settings: Any) -> torch.Tensor:
    model = popped()
    fit(model, few(), few(16), quick(**settings))
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_settings_reach_the_run() -> None:
    plain = learned_scores()
    assert torch.isfinite(plain).all()
    for change in (
        {"smoothing": 0.1}, {"clip_grad": 1e-3}, {"weight_decay": 0.5}, {"momentum": 0.1},
        {"opt": "sgd"}, {"opt": "adamw", "lr": 0.01}, {"sched": "step", "epochs": 2},
        {"sched": "constant"}, {"amp": True}, {"seed": 1}, {"lr": 0.05},
    ):  # fmt: skip
        changed = learned_scores(**change)
        assert torch.isfinite(changed).all(), change
        assert not torch.equal(changed, plain), change


def test_channels_last_and_no_schedule_run() -> None:
    assert torch.isfinite(learned_scores(channels_last=True)).all()
    assert torch.isfinite(learned_scores(sched="none")).all()


def test_weight_decay_reaches_one_dimensional_parameters() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    attach(model, Popup(k="0.5", learn=("@norm",)))
    run = start(model, few(), quick(weight_decay=0.25))
    assert run.optimizer is not None
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.25}


def test_the_learning_rate_warms_up_and_decays_by_step() -> None:
    rates: list[float] = []
    model = popped()
    run = start(model, few(), quick(epochs=4, warmup_epochs=1, lr=0.1, batch_size=16))
    assert run.optimizer is not None
    for step in range(16):
        run.scheduler.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[:4] == sorted(rates[:4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert max(rates) <= 0.1
    assert rates[-1] < 0.01


@pytest.mark.parametrize("change", [{"opt": "momentun"}, {"sched": "cosin"}])
def test_unknown_names_of_timms_are_usage_errors(change: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"near: (momentum|cosine)"):
        start(popped(), few(), quick(**change))


def test_a_network_with_too_few_classes_or_no_logits_is_a_data_error() -> None:
    with pytest.raises(DataError, match="label 9, the network 5"):
        evaluate(build(conv2(num_classes=5)), few(64))
    with pytest.raises(DataError, match="expected \\(batch, classes\\)"):
        fit(attach(nn.Conv2d(3, 10, 3), Popup(k="0.5")), few(), few(), quick())


def test_evaluation_gives_shares_and_keeps_the_mode() -> None:
    model = build(conv2()).train()
    found = evaluate(model, few(50, "test"), batch_size=7)
    assert model.training
    assert found.images == 50
    logits = torch.cat([model.eval()(images) for images, _ in few(50, "test").evaluation(7)])
    right = float((logits.argmax(1) == few(50, "test").targets).double().mean())
    assert found.accuracy == pytest.approx(right)
    assert found.accuracy <= found.top5_accuracy <= 1


def test_defaults_follow_the_dataset() -> None:
    defaults = {name: recipe(recipe_name(name)) for name in (*DATASETS, "torch/CIFAR10", "hfds/a")}
    assert defaults["digits"].batch_size == 32
    assert defaults["torch/imagenet"].lr == 0.256
    assert defaults["torch/CIFAR10"] == TrainSettings()
    assert defaults["hfds/a"] == recipe("folder") == TrainSettings(crop_padding=None)
    assert {input_for(f"torch/{name}mnist", {}).size for name in ("", "k", "q")} == {(28, 28)}
    with pytest.raises(UsageError, match="near: imagenet"):
        recipe("imagnet")
    assert quick().updated(lr=None, epochs=7) == quick(epochs=7)
    assert "workers" not in quick().to_json()
    assert input_for("digits", {}).size == (32, 32)
    grey = input_for("torch/cifar10", {}, in_chans=1)
    assert grey.channels == len(grey.mean) == 1
    assert input_for("folder", {"input_size": (3, 96, 96), "crop_pct": 0.9}).size == (96, 96)
