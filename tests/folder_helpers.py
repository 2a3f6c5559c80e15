"""One small set of images, written to disk in every layout that other programs write."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

Part = Literal["train", "validation", "test"]

CLASSES = ("n2 ant", "n9 bee", "n10 cat")  # in natural order, which is not that of letters
COUNTS: Mapping[Part, tuple[int, ...]] = {
    "train": (6, 5, 4), "validation": (2, 2, 2), "test": (3, 3, 3),
}  # fmt: skip
"""Images of each class."""


def image(part: Part, label: str, index: int, kind: str = "PNG", size: int = 16) -> bytes:
    """The bytes of one image, unlike those of every other."""
    seed = [list(COUNTS).index(part), CLASSES.index(label), index]
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def every_image() -> Iterator[tuple[Part, str, int]]:
    """(split, class, index) of the whole set."""
    for part, counts in COUNTS.items():
        for label, count in zip(CLASSES, counts, strict=True):
            for index in range(count):
                yield part, label, index


def truth() -> dict[bytes, tuple[Part, str]]:
    """Split and class of an image by its bytes."""
    return {
        image(part, label, index, kind): (part, label)
        for part, label, index in every_image()
        for kind in ("PNG", "JPEG")
    }


def put(path: Path, content: bytes | str = b"") -> Path:
    """A file, and the folders around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write(root: Path, where: str, kind: str = "PNG", parts: tuple[Part, ...] = ()) -> None:
    """The images at ``where``, in which {part}, {label}, {i} (within its split and class) and {n}
    (within its split) are filled in. All splits, unless ``parts`` are named."""
    numbers = {part: iter(range(100)) for part in COUNTS}
    for part, label, index in every_image():
        place = where.format(part=part, label=label, i=index, n=next(numbers[part]))
        if not parts or part in parts:
            put(root / place, image(part, label, index, kind))


def lines(
    form: str, parts: tuple[Part, ...] = ("train", "validation", "test"), header: str = ""
) -> str:
    """A line an image, filled in as by ``write``, below a header."""
    numbers = {part: iter(range(100)) for part in COUNTS}
    found = [header] if header else []
    for part, label, index in every_image():
        line = form.format(part=part, label=label, i=index, n=next(numbers[part]))
        if part in parts:
            found.append(line)
    return "".join(f"{line}\n" for line in found)


# --- class folders -------------------------------------------------------------------------------


def class_folders(root: Path) -> None:
    write(root, "{part}/{label}/{i}.png")


def other_names(root: Path) -> None:
    write(root, "Training/{label}/{i}.png", parts=("train",))
    write(root, "VALID/{label}/{i}.PNG", parts=("validation",))
    write(root, "testing/{label}/{i}.png", parts=("test",))


def imagenet(root: Path) -> None:
    """As ImageNet is unpacked: train and val, the latter by a script that sorts it."""
    write(root, "train/{label}/{label}_{i}.JPEG", "JPEG", ("train",))
    write(root, "val/{label}/ILSVRC2012_val_{n:08}.JPEG", "JPEG", ("validation",))


def one_level_more(root: Path) -> None:
    write(root, "train/{label}/images/{i}.png", parts=("train",))
    write(root, "val/{label}/a/b/{i}.png", parts=("validation",))
    write(root, "test/{label}/{i}.png", parts=("test",))


def links(root: Path) -> None:
    """Splits made of links: of files, of class folders, and of a whole split."""
    store = root.resolve().parent / f"{root.name} store"
    write(store, "{part}/{label}/{i}.png")
    for path in sorted(store.glob("train/*/*")):
        link = root / path.relative_to(store)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (root / "val").mkdir()
    for path in store.glob("validation/*"):
        (root / "val" / path.name).symlink_to(path)
    (root / "test").symlink_to(store / "test")


def repeated_by_a_table(root: Path) -> None:
    """As fastai's MNIST_SAMPLE: class folders, and a labels.csv that repeats them."""
    write(root, "train/{label}/{i}.png", parts=("train",))
    write(root, "valid/{label}/{i}.png", parts=("validation",))
    table = lines("train/{label}/{i}.png,{label}", ("train",), "name,label")
    table += lines("valid/{label}/{i}.png,{label}", ("validation",))
    for number, label in enumerate(CLASSES):
        table = table.replace(f",{label}", f",{number}")
    put(root / "labels.csv", table)


# --- Tiny-ImageNet -------------------------------------------------------------------------------


def _tiny_train(root: Path) -> None:
    write(root, "train/{label}/images/{label}_{i}.JPEG", "JPEG", ("train",))
    for label in CLASSES:
        put(root / "train" / label / f"{label}_boxes.txt", f"{label}_0.JPEG\t0\t0\t9\t9\n")
    write(root, "test/images/test_{n}.JPEG", "JPEG", ("test",))
    put(root / "wnids.txt", "".join(f"{label}\n" for label in reversed(CLASSES)))
    put(root / "words.txt", "".join(f"{label}\tword\n" for label in CLASSES))


def tiny_imagenet(root: Path) -> None:
    _tiny_train(root)
    write(root, "val/images/val_{n}.JPEG", "JPEG", ("validation",))
    table = lines("val_{n}.JPEG\t{label}\t0\t32\t44\t62", ("validation",))
    put(root / "val" / "val_annotations.txt", table)


def tiny_imagenet_sorted(root: Path) -> None:
    """As most scripts that sort it leave it: an empty folder, the table, the test images."""
    _tiny_train(root)
    write(root, "val/{label}/val_{n}.JPEG", "JPEG", ("validation",))
    (root / "val" / "images").mkdir()
    put(root / "val" / "val_annotations.txt", "val_0.JPEG\tn2 ant\t0\t32\t44\t62\n")


def tiny_imagenet_sorted_deeper(root: Path) -> None:
    _tiny_train(root)
    write(root, "val/{label}/images/val_{n}.JPEG", "JPEG", ("validation",))


# --- labels.csv ----------------------------------------------------------------------------------


def table_in_each_split(root: Path) -> None:
    write(root, "{part}/{n}.png")
    for part in COUNTS:
        put(root / part / "labels.csv", lines("{n}.png,{label}", (part,), "path,class"))


def table_in_each_split_of_subfolders(root: Path) -> None:
    """Images in numbered folders, which are no classes, or in one folder."""
    write(root, "train/{i}/{n}.png", parts=("train",))
    write(root, "val/images/{n}.png", parts=("validation",))
    put(root / "train/Labels.csv", lines("{i}/{n}.png,{label}", ("train",), "file,label"))
    put(root / "val/labels.csv", lines("images/{n}.png;{label}", ("validation",), "File;Label"))


def table_in_root(root: Path) -> None:
    write(root, "{part}/{n}.png")
    put(root / "labels.csv", lines("{part}/{n}.png,{label}", header="path,class"))


def table_of_splits(root: Path) -> None:
    write(root, "images/{part}-{n}.png")
    form = "images/{part}-{n}.png\t{label}\t{part}"
    put(root / "labels.csv", lines(form, header="Image Path\tCategory\tSubset"))


def table_without_splits(root: Path) -> None:
    write(root, "{n}.png", parts=("train",))
    put(root / "labels.csv", lines("{n}.png,{label}", ("train",), "filename,target"))


def table_without_header(root: Path) -> None:
    write(root, "all/{n}.png", parts=("train",))
    put(root / "labels.csv", lines("all/{n}.png,{label}", ("train",)))


def hugging_face(root: Path) -> None:
    write(root, "train/{n}.png", parts=("train",))
    write(root, "test/{n}.png", parts=("test",))
    for part in ("train", "test"):
        table = lines("{n}.png,{label}", (part,), "file_name,label")  # type: ignore[arg-type]
        put(root / part / "metadata.csv", table)


def from_windows(root: Path) -> None:
    """As a spreadsheet there saves it: a mark, semicolons, backslashes, blank lines, an index."""
    write(root, "{part}/some images/{n}.png")
    form = '1;"{part}\\some images\\{n}.png";{label} ;'
    table = lines(form, header='"";Path;Class;').replace("\n", "\r\n")
    put(root / "labels.csv", b"\xef\xbb\xbf" + table.encode() + b"\r\n;;;\r\n")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "class folders": class_folders,
    "class folders of other names": other_names,
    "ImageNet": imagenet,
    "class folders one level more": one_level_more,
    "class folders of links": links,
    "class folders with labels.csv": repeated_by_a_table,
    "Tiny-ImageNet": tiny_imagenet,
    "Tiny-ImageNet sorted": tiny_imagenet_sorted,
    "Tiny-ImageNet sorted deeper": tiny_imagenet_sorted_deeper,
    "labels.csv in splits": table_in_each_split,
    "labels.csv in splits of subfolders": table_in_each_split_of_subfolders,
    "labels.csv in the root": table_in_root,
    "labels.csv with splits": table_of_splits,
    "labels.csv without splits": table_without_splits,
    "labels.csv without header": table_without_header,
    "metadata.csv": hugging_face,
    "labels.csv from Windows": from_windows,
}
"""Writers of the set into a folder. Class names, labels and images are those above; which splits
have labels is what the layout can say."""
