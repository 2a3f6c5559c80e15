"""Augmentation: twins by hand, what it depends on, and what is refused."""

from __future__ import annotations

import hashlib
import math
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from surgery_helpers import same_bits
from timm.data import create_transform

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.generator import torch_seed
from randsurgery.format.specs import InputSpec
from randsurgery.training.augmentation import (
    AA_POLICIES,
    _operations,
    _posterize,
    augment,
    check_augmentation,
    check_policy,
    erase,
    evaluation_transform,
    mix,
    mixes,
    moves,
    plain,
    seeded,
    training_transform,
)
from randsurgery.training.settings import TrainSettings


def look(
    size: tuple[int, int] = (24, 24), channels: int = 3, mean: tuple[float, ...] = (), **more: Any
) -> InputSpec:
    mean = mean or (0.4, 0.5, 0.6)[:channels]
    return InputSpec(
        size=size, channels=channels, mean=tuple(m.hex() for m in mean),
        std=((0.25).hex(),) * len(mean), **{"interpolation": "bilinear", **more},
    )  # fmt: skip


def picture(size: tuple[int, int] = (40, 30), mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise, of a (width, height)."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    """(C, H, W)."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def shown(transform: Any, image: Image.Image, drawn: int = 0) -> torch.Tensor:
    with seeded(drawn):
        found: torch.Tensor = transform(image)
    return found


def global_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), *rest


@pytest.fixture(autouse=True)
def generators_are_left_as_they_were() -> Iterator[None]:
    """Whatever a test does."""
    before = global_states()
    yield
    assert global_states() == before


# --- seeded --------------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_one_number_seeds_all_generators() -> None:
    big = (1 << 63) - 1
    found = []
    for number in (big, big, big - 1, 0):
        with seeded(number):
            found.append(draws())
    assert found[0] == found[1]
    assert all(len(set(values)) == 3 for values in zip(*found[1:], strict=True))


def test_generators_are_given_back_after_an_error() -> None:
    before = global_states()

    def fail() -> None:
        draws()
        raise KeyError

    with pytest.raises(KeyError), seeded(3):
        fail()
    assert global_states() == before


def test_within_seeded_the_outer_draws_go_on() -> None:
    with seeded(3):
        whole = [draws() for _ in range(2)]
    with seeded(3):
        first = draws()
        with seeded(4):
            draws()
        assert [first, draws()] == whole


# --- a batch at a time ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, True),
        ({"crop_padding": 0, "reprob": 0.5, "mixup": 1.0}, True),
        ({"crop_padding": None}, False),
        ({"aa": "v0"}, False),
    ],
)
def test_pictures_are_needed_for_policies_and_resized_crops(
    more: dict[str, Any], expected: bool
) -> None:
    assert plain(TrainSettings(**more)) is expected


@pytest.mark.parametrize(
    ("more", "digest"),
    [({}, "ca3b570b4c8efbac"), ({"crop_padding": 2, "hflip": False}, "9867688fb24b35a4")],
)
def test_moves_are_the_same_for_ever(more: dict[str, Any], digest: str) -> None:
    found = moves(1000, TrainSettings(seed=7, **more), epoch=3).numpy().astype("<i8")
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == digest


def test_a_batch_is_augmented_as_its_images_are_one_by_one() -> None:
    settings = TrainSettings(crop_padding=3)
    images = torch.arange(1, 20 * 3 * 8 * 7 + 1).view(20, 3, 8, 7)
    drawn = moves(20, settings, epoch=0)
    found = augment(images, drawn, 3)
    for image, (row, column, flip), out in zip(images, drawn.tolist(), found, strict=True):
        padded = torch.zeros(3, 14, 13, dtype=torch.int64)
        padded[:, 3:11, 3:10] = image
        crop = padded[:, row : row + 8, column : column + 7]
        assert torch.equal(out, crop.flip(2) if flip else crop)
    assert set(drawn[:, 2].tolist()) == {0, 1}
    assert torch.equal(augment(images[5:9], drawn[5:9], 3), found[5:9])


# --- random erasing ------------------------------------------------------------------------------


def noise(count: int, size: tuple[int, int] = (12, 10), channels: int = 3) -> torch.Tensor:
    values = np.random.default_rng(1).normal(size=(count, channels, *size))
    return torch.from_numpy(values.astype(np.float32))


def erased_by_hand(image: torch.Tensor, drawn: int) -> torch.Tensor:
    """Zhong et al., Algorithm 1, with timm's bounds and order of draws."""
    _, height, width = image.shape
    image = image.clone()
    with seeded(drawn):
        random.random()  # timm's own chance, of 1
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top, left = random.randint(0, height - rows), random.randint(0, width - columns)
                box = torch.empty(image.shape[0], rows, columns).normal_()
                image[:, top : top + rows, left : left + columns] = box
                break
    return image


def test_erasing_equals_a_twin_by_hand_and_leaves_the_others() -> None:
    images, settings = noise(40), TrainSettings(seed=5, reprob=0.4)
    before = images.clone()
    found = erase(images, range(40), settings, epoch=2)
    chosen = [torch_seed(5, f"epoch-2-erase-{index}") / 2**63 < 0.4 for index in range(40)]
    assert 8 <= sum(chosen) <= 24
    for index, one in enumerate(chosen):
        drawn = torch_seed(5, f"epoch-2-erase-{index}")
        expected = erased_by_hand(images[index], drawn) if one else images[index]
        assert same_bits(found[index], expected), index
        assert torch.equal(found[index], images[index]) is not one
    assert same_bits(images, before)


def test_erasing_follows_seed_epoch_and_image_alone() -> None:
    images, settings = noise(16), TrainSettings(reprob=0.5)
    found = erase(images, range(16), settings, epoch=0)
    order = [11, 3, 15, 0, 7]
    assert same_bits(erase(images[order], order, settings, epoch=0), found[order])
    with seeded(99):
        assert same_bits(erase(images, range(16), settings, epoch=0), found)
    assert not torch.equal(erase(images, range(16), settings, epoch=1), found)
    assert not torch.equal(erase(images, range(1, 17), settings, epoch=0), found)
    other = TrainSettings(reprob=0.5, seed=1)
    assert not torch.equal(erase(images, range(16), other, epoch=0), found)


def test_none_or_all_are_erased() -> None:
    images = noise(30, channels=1)
    assert erase(images, range(30), TrainSettings(), epoch=0) is images
    found = erase(images, range(30), TrainSettings(reprob=1.0), epoch=0)
    assert all(not torch.equal(a, b) for a, b in zip(found, images, strict=True))


def test_erasing_keeps_layout_and_takes_the_smallest_images() -> None:
    images = noise(4).contiguous(memory_format=torch.channels_last)
    found = erase(images, range(4), TrainSettings(reprob=1.0), epoch=0)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(found, erase(images.contiguous(), range(4), TrainSettings(reprob=1.0), 0))
    one = noise(8, (1, 1))
    assert same_bits(erase(one, range(8), TrainSettings(reprob=1.0), epoch=0), one)


# --- mixup and cutmix ----------------------------------------------------------------------------

LABELS = torch.tensor([0, 3, 1, 1, 2, 0])


def mixed_by_hand(
    images: torch.Tensor, settings: TrainSettings, epoch: int, step: int, classes: int
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Each image with its mirror in the batch: the formulas of both papers, and which was used."""
    height, width = images.shape[2:]
    draw = np.random
    kind, alpha = ("mixup", settings.mixup) if settings.mixup else ("cutmix", settings.cutmix)
    with seeded(torch_seed(settings.seed, f"epoch-{epoch}-mix-{step}")):
        draw.rand()  # timm's chance that a batch is mixed at all, of 1
        if settings.mixup and settings.cutmix and draw.rand() < 0.5:
            kind, alpha = "cutmix", settings.cutmix
        share = draw.beta(alpha, alpha)
        if kind == "cutmix":
            side = math.sqrt(1 - share)
            rows, columns = int(height * side), int(width * side)
            y, x = draw.randint(0, height), draw.randint(0, width)
    images, partners = images.clone(), images.flip(0)
    if kind == "cutmix":
        top, bottom = max(0, y - rows // 2), min(height, y + (rows + 1) // 2)
        left, right = max(0, x - columns // 2), min(width, x + (columns + 1) // 2)
        images[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = images * share + partners * (1 - share)
    smooth = torch.full((len(LABELS), classes), settings.smoothing / classes)
    smooth[torch.arange(len(LABELS)), LABELS] += 1 - settings.smoothing
    return images, smooth * share + smooth.flip(0) * (1 - share), kind


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("alphas", "kinds"),
    [
        ({"mixup": 0.2}, {"mixup"}),
        ({"cutmix": 1.0}, {"cutmix"}),
        ({"mixup": 0.8, "cutmix": 1.0}, {"mixup", "cutmix"}),
    ],
)
def test_mixing_equals_the_formulas(
    alphas: dict[str, Any], kinds: set[str], smoothing: float
) -> None:
    settings = TrainSettings(seed=2, smoothing=smoothing, **alphas)
    assert mixes(settings)
    images, used = noise(6), set()
    before = images.clone()
    for step in range(12):
        found, targets = mix(images, LABELS, settings, 1, step, 5)
        expected, wanted, kind = mixed_by_hand(images, settings, 1, step, 5)
        used.add(kind)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(targets, wanted)
        assert targets.shape == (6, 5)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert used == kinds
    assert same_bits(images, before)


def test_mixing_follows_seed_epoch_and_step_alone() -> None:
    images, settings = noise(6), TrainSettings(mixup=0.8)

    def mixed(epoch: int = 0, step: int = 0, **more: Any) -> torch.Tensor:
        return mix(images, LABELS, settings.updated(**more), epoch, step, 4)[0]

    found = mixed()
    with seeded(99):
        assert same_bits(mixed(workers=3), found)
    for other in (mixed(epoch=1), mixed(step=1), mixed(seed=1)):
        assert not torch.equal(other, found)


def test_an_odd_batch_cannot_be_mixed() -> None:
    with pytest.raises(UsageError, match="even number of images a batch, found 5;"):
        mix(noise(5), LABELS[:5], TrainSettings(mixup=0.2), 0, 0, 4)
    assert not mixes(TrainSettings())


# --- pictures in training ------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"hflip": False},
        {"scale": (0.3, 0.6), "ratio": (0.5, 1.0)},
        {"aa": "rand-m9-mstd0.5-inc1"},
        {"aa": "3a"},
    ],
)
def test_random_resized_crops_are_timms(channels: int, more: dict[str, Any]) -> None:
    seen, settings = look((24, 20), channels), TrainSettings(crop_padding=None, **more)
    timms = create_transform(
        (channels, 24, 20),
        is_training=True,
        use_prefetcher=True,
        hflip=0.5 if settings.hflip else 0.0,
        color_jitter=None,
        interpolation="bilinear",
        auto_augment=settings.aa,
        scale=settings.scale,
        ratio=settings.ratio,
        mean=(0.4, 0.5, 0.6)[:channels],
    )
    ours = training_transform(seen, settings)
    image = picture(mode="L" if channels == 1 else "RGB")
    for drawn in range(12):
        found = shown(ours, image, drawn)
        assert found.shape == (channels, 24, 20)
        assert same_bits(found, shown(timms, image, drawn))


@pytest.mark.parametrize("padding", [0, 3, 30])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
@pytest.mark.parametrize("size", [(24, 24), (20, 32)])
def test_a_padded_crop_of_a_picture_equals_one_by_hand(
    padding: int, mode: str, channels: int, size: tuple[int, int]
) -> None:
    seen, image = look(size, channels, crop=(0.875).hex()), picture(mode=mode)
    transform = training_transform(seen, TrainSettings(crop_padding=padding))
    height, width = size
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=np.uint8)
    inside = np.s_[:, padding : padding + height, padding : padding + width]
    padded[inside] = evaluation_transform(seen)(image).numpy()
    flips = set()
    for drawn in range(10):
        with seeded(drawn):
            reach = 2 * padding + 1
            row, column = (int(torch.randint(0, reach, (1,))) if padding else 0 for _ in range(2))
            flip = bool(torch.rand(1) < 0.5)
        expected = padded[:, row : row + height, column : column + width]
        expected = expected[:, :, ::-1] if flip else expected
        flips.add(flip)
        assert np.array_equal(shown(transform, image, drawn).numpy(), expected)
    assert flips == {False, True}


def test_pictures_follow_their_seed_alone() -> None:
    for settings in (TrainSettings(aa="rand-m9-p1"), TrainSettings(crop_padding=None)):
        transform = training_transform(look(), settings)
        found = shown(transform, picture(), 7)
        draws_before = [shown(transform, picture(seed=1), seed) for seed in range(3)]
        assert same_bits(shown(transform, picture(), 7), found)
        assert same_bits(shown(pickle.loads(pickle.dumps(transform)), picture(), 7), found)
        assert len({one.numpy().tobytes() for one in draws_before}) > 1
        assert not torch.equal(shown(transform, picture(), 8), found)


class Numbered(torch.utils.data.Dataset[torch.Tensor]):
    """Pictures that are augmented by their index."""

    def __init__(self, settings: TrainSettings) -> None:
        self.transform = training_transform(look(), settings)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return shown(self.transform, picture(seed=index), torch_seed(0, f"image-{index}"))


@pytest.mark.parametrize("settings", [TrainSettings(aa="augmix"), TrainSettings(crop_padding=None)])
def test_workers_and_batches_do_not_matter(settings: TrainSettings) -> None:
    found = []
    for workers, batch in ((0, 6), (0, 2), (1, 3)):
        loader = torch.utils.data.DataLoader(
            Numbered(settings), batch, num_workers=workers, generator=torch.Generator()
        )
        found.append(torch.cat(list(loader)))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.mark.parametrize("padding", [0, None])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 2), (1, 50), (50, 1), (3, 3)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_very_small_pictures_are_seen(
    padding: int | None, size: tuple[int, int], mode: str
) -> None:
    """timm's crops of them can be empty, which it shows black."""
    seen = look(channels=1 if mode == "L" else 3)
    transform = training_transform(seen, TrainSettings(crop_padding=padding, scale=(0.01, 1.0)))
    for drawn in range(20):
        found = shown(transform, Image.new(mode, size, "white"), drawn)
        assert found.shape == (seen.channels, 24, 24)
        assert (found == 255).all()


# --- pictures in evaluation ----------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop"), [((24, 24), 1.0), ((24, 24), 0.875), ((16, 36), 0.9)])
def test_evaluation_is_timms(
    channels: int, crop_mode: Any, interpolation: Any, size: tuple[int, int], crop: float
) -> None:
    seen = look(size, channels, crop_mode=crop_mode, interpolation=interpolation, crop=crop.hex())
    timms = create_transform(
        (channels, *size),
        use_prefetcher=True,
        interpolation=interpolation,
        crop_pct=crop,
        crop_mode=crop_mode,
    )
    image = picture(mode="L" if channels == 1 else "RGB")
    found = evaluation_transform(seen)(image)
    assert found.dtype == torch.uint8
    assert same_bits(found, timms(image))


@pytest.mark.parametrize(("mode", "mean"), [("L", (0.2,)), ("RGB", (0.2, 0.4, 0.6))])
def test_a_border_has_the_networks_mean(mode: str, mean: tuple[float, ...]) -> None:
    seen = look(channels=len(mean), mean=mean, crop_mode="border")
    found = evaluation_transform(seen)(Image.new(mode, (10, 20), "white"))
    assert found.shape == (len(mean), 24, 24)
    assert (found[:, :, 8:16] == 255).all()
    border = torch.tensor([round(255 * value) for value in mean]).view(-1, 1, 1)
    assert (found[:, :, :4] == border).all()
    assert (found[:, :, -4:] == border).all()


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    for mode, channels in (("L", 1), ("RGB", 3)):
        image = picture((20, 24), mode)
        seen = look((24, 20), channels, interpolation="bicubic")
        still = TrainSettings(crop_padding=0, hflip=False)
        assert same_bits(evaluation_transform(seen)(image), pixels(image))
        assert same_bits(shown(training_transform(seen, still), image), pixels(image))


@pytest.mark.parametrize("padding", [2, None])
def test_pictures_come_in_the_networks_channels(padding: int | None) -> None:
    """As torchvision's sets yield them: CIFAR's in colours, MNIST's in grey."""
    settings = TrainSettings(crop_padding=padding, aa="rand-m9-p1")
    for mode, channels, wanted in (("RGB", 1, "L"), ("L", 3, "RGB")):
        image, seen = picture(mode=mode), look(channels=channels)
        for transform in (training_transform(seen, settings), evaluation_transform(seen)):
            found = shown(transform, image)
            assert found.shape == (channels, 24, 24)
            assert same_bits(found, shown(transform, image.convert(wanted)))


# --- policies ------------------------------------------------------------------------------------

POLICIES = (
    "rand", "rand-m9-mstd0.5", "rand-m9-mstd0.5-inc1", "rand-m15-n3-p0.7-mmax20", "rand-mstd101",
    "rand-mstd1-tweights", "rand-m6-t3a-inc1", "rand-n14-t3aw", "rand-m0", "rand-m100-mmax100-inc1",
    "v0", "v0r", "original", "originalr-mstd0.5", "3a", "3a-mstd2",
    "augmix", "augmix-m5-w4-d2", "augmix-b1", "augmix-a0.1-mstd0",
)  # fmt: skip


@pytest.mark.parametrize("aa", POLICIES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_policies_run_on_grey_and_coloured_pictures(aa: str, mode: str) -> None:
    channels, interpolation = (1, "nearest") if mode == "L" else (3, "bicubic")
    seen, image = look(channels=channels, interpolation=interpolation), picture((24, 24), mode)
    settings = TrainSettings(crop_padding=0, hflip=False, aa=aa)
    check_augmentation(settings, seen, resident=True)
    transform = training_transform(seen, settings)
    found = [shown(transform, image, drawn) for drawn in range(12)]
    assert {one.shape for one in found} == {(seen.channels, 24, 24)}
    assert {one.dtype for one in found} == {torch.uint8}
    assert len({one.numpy().tobytes() for one in found}) > 2  # it does something
    policy = transform.transforms[-2]  # type: ignore[attr-defined]
    for operation in _operations(policy):
        operation.prob = 1.0
        with seeded(1):
            changed = operation(image)
        assert (changed.mode, changed.size) == (image.mode, image.size), operation


def test_every_policy_is_tried() -> None:
    assert {aa.partition("-")[0] for aa in POLICIES} == set(AA_POLICIES)


def test_rand_means_what_its_parts_say() -> None:
    check_policy("rand-m7-n3-p0.3-mstd2.5-mmax20-inc1")
    settings = TrainSettings(crop_padding=0, aa="rand-m7-n3-p0.3-mstd2.5-mmax20-inc1")
    policy = training_transform(look(), settings).transforms[-2]  # type: ignore[attr-defined]
    assert policy.transforms[0].num_layers == 3
    for operation in _operations(policy):
        assert (operation.magnitude, operation.prob) == (7, 0.3)
        assert (operation.magnitude_std, operation.magnitude_max) == (2.5, 20)
    assert "ColorIncreasing" in {operation.name for operation in _operations(policy)}


def test_posterize_keeps_the_highest_bits() -> None:
    for mode in ("L", "RGB"):
        image = picture(mode=mode)
        for bits in range(-3, 11):
            mask = 0xFF00 >> min(max(bits, 0), 8) & 0xFF
            found = _posterize(image, bits, resample=2)
            assert found.mode == mode
            assert np.array_equal(np.array(found), np.array(image) & mask), bits


@pytest.mark.parametrize(
    ("aa", "said"),
    [
        ("foo", "unknown --aa policy 'foo', expected rand, augmix, v0, v0r, original"),
        ("", "unknown --aa policy ''"),
        ("none", "unknown --aa policy 'none'"),
        ("random-m9", "near: rand"),
        ("orignal", "near: original"),
        ("RAND-m9", "unknown --aa policy"),
        ("rand_m9", "unknown --aa policy"),
        ("rand-m9-foo", "unknown part 'foo', expected a number after m, n, p, mstd, mmax, inc, or"),
        ("rand-foo9", "inc, or tweights, or t3a, or t3aw"),
        ("rand-tfoo", "unknown part 'tfoo'"),
        ("rand-t", "unknown part 't'"),
        ("rand-w0", "unknown part 'w0'"),
        ("rand-", "unknown part ''"),
        ("rand--m9", "unknown part ''"),
        ("rand-9", "unknown part '9'"),
        ("rand-M9", "unknown part 'M9'"),
        ("rand-m9 ", "m takes a whole number from 0 to 100, found 'm9 '"),
        ("rand-m9\n", "m takes a whole number from 0 to 100"),
        ("rand-m9.5", "m takes a whole number from 0 to 100, found 'm9.5'"),
        ("rand-m", "found 'm'"),
        ("rand-m٩", "found 'm٩'"),
        ("rand-m101", "found 'm101'"),
        ("rand-n0", "n takes a whole number from 1 to 100"),
        ("rand-p1.5", "p takes a number from 0 to 1, found 'p1.5'"),
        ("rand-p.5", "found 'p.5'"),
        ("rand-mstdinf", "unknown part 'mstdinf', expected a number after m"),
        ("rand-mmax0", "mmax takes a whole number from 1 to 100"),
        ("rand-inc2", "inc takes a whole number from 0 to 1"),
        ("rand-m9-m8", "m is given twice; give it once"),
        ("rand-t3a-tweights", "t is given twice"),
        ("rand-inc0-t3a", "the operations of t3a are increasing; leave inc0 out"),
        ("rand-n16-tweights", "tweights has 15 operations; give a smaller n"),
        ("rand-n15-t3aw", "t3aw has 14 operations"),
        ("augmix-z3", "unknown part 'z3', expected a number after m, w, d, a, b, mstd"),
        ("augmix-foo", "unknown part 'foo'"),
        ("augmix-t3a", "unknown part 't3a'"),
        ("augmix-w0", "w takes a whole number from 1 to 100"),
        ("augmix-d0", "d takes a whole number from 1 to 100"),
        ("augmix-a0", "a takes a number from 0.1 to 100"),
        ("augmix-b2", "b takes a whole number from 0 to 1"),
        ("v0-m9", "unknown part 'm9', expected a number after mstd"),
        ("3a-mstd", "mstd takes a number"),
    ],
)  # fmt: skip
def test_what_timm_would_refuse_or_pass_over_is_refused(aa: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_policy(aa)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    settings = TrainSettings(aa=aa)
    for refused in (
        lambda: check_augmentation(settings, look(), resident=True),
        lambda: training_transform(look(), settings),
    ):
        with pytest.raises(UsageError):
            refused()


# --- other refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "channels", "said"),
    [
        ({"aa": "v0"}, 2, "--aa v0 takes images of 1 or 3 channels, the network sees 2; leave it"),
        ({"crop_padding": None}, 4, "a random resized crop takes images of 1 or 3 channels"),
        ({"crop_padding": -1}, 3, "--crop-padding must lie in [0, 20], at most an image's size"),
        ({"crop_padding": 21}, 3, "found 21"),
        ({"crop_padding": None, "scale": (0.0, 1.0)}, 3, "--scale must be two numbers, 0 < low"),
        ({"crop_padding": None, "scale": (0.5, 0.2)}, 3, "<= high <= 1, found 0.5 and 0.2"),
        ({"crop_padding": None, "scale": (0.5, 1.5)}, 3, "--scale"),
        ({"crop_padding": None, "scale": (0.5, math.nan)}, 3, "--scale"),
        ({"crop_padding": None, "ratio": (0.0, 1.0)}, 3, "--ratio"),
        ({"crop_padding": None, "ratio": (2.0, 1.0)}, 3, "--ratio must be two numbers, 0 < low"),
        ({"crop_padding": None, "ratio": (1.0, math.inf)}, 3, "--ratio"),
        ({"reprob": 1.5}, 3, "--reprob must lie in [0, 1], found 1.5"),
        ({"reprob": -0.1}, 3, "--reprob"),
        ({"reprob": math.nan}, 3, "--reprob"),
        ({"mixup": -1.0}, 3, "--mixup must be a number from 0 on, found -1.0"),
        ({"mixup": math.inf}, 3, "--mixup"),
        ({"cutmix": math.nan}, 3, "--cutmix"),
        ({"mixup": 0.2, "batch_size": 33}, 3, "found 33; change --batch-size"),
        ({"cutmix": 0.2, "batch_size": 100}, 3, "found 77; change --batch-size"),
    ],
)
def test_what_cannot_be_done_is_refused(more: dict[str, Any], channels: int, said: str) -> None:
    seen = look((20, 24), channels, (0.5,) * channels)
    with pytest.raises(UsageError) as caught:
        check_augmentation(TrainSettings(**more), seen, resident=True, size=77)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_can_be_done_is_not_refused() -> None:
    for more in (
        {},
        {"crop_padding": 24},
        {"crop_padding": None, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)},
        {"reprob": 1.0, "mixup": 0.8, "cutmix": 1.0},
        {"batch_size": 33},
        {"scale": (5.0, 0.0), "ratio": (0.0, 0.0)},  # of no meaning beside a padded crop
    ):
        for resident in (True, False):
            check_augmentation(TrainSettings(**more), look(), resident=resident, size=500)
    two = look(channels=2, mean=(0.5, 0.5))
    check_augmentation(TrainSettings(reprob=0.5), two, resident=True)
    # an odd batch size is never reached, the whole set being one batch
    check_augmentation(TrainSettings(mixup=1.0, batch_size=129), look(), resident=True, size=128)


def test_pictures_have_one_or_three_channels() -> None:
    two = look(channels=2, mean=(0.5, 0.5))
    with pytest.raises(IncompatibleError, match="2 channels"):
        check_augmentation(TrainSettings(), two, resident=False)
    with pytest.raises(IncompatibleError, match="2 channels"):
        evaluation_transform(two)
