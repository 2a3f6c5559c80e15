"""Reports as tables that fit 80 columns, and progress that is quiet in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from randsurgery.cli.common import clean, err, note, out, size, verbosity

if TYPE_CHECKING:
    from randsurgery.inspection.confusion import ClassRow
    from randsurgery.inspection.members import MembersReport
    from randsurgery.inspection.storage import StorageReport, TensorStorage
    from randsurgery.jobs.ensembles import Scored
    from randsurgery.jobs.inputs import Shown
    from randsurgery.surgery.plans import LayerCount
    from randsurgery.training.loop import Hooks


def table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    """A table without frame lines; the columns numbered in ``right`` hold figures."""
    made = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        if index in right:
            made.add_column(name, justify="right", no_wrap=True)
        else:
            made.add_column(name, overflow="fold")
    return made


def show(made: Table) -> None:
    """A table: folded to a terminal's width; in a pipe a row is a line, however long its names."""
    console = out()
    if sys.stdout.isatty():
        console.print(made)
        return
    console.width = 10_000
    with console.capture() as found:
        console.print(made)
    console.print("\n".join(line.rstrip() for line in found.get().splitlines()))


def many(count: int, what: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def show_storage(report: StorageReport, *, tensors: bool) -> None:
    """The breakdown of a file: by what makes the tensors, or tensor by tensor."""
    console = out()
    if tensors:
        from randsurgery.inspection.grouping import place

        made = table("tensor", "shape", "made of", "bytes", "dense", right=(3, 4))
        for row in sorted(report.tensors, key=lambda row: (row.member, place(row.name))):
            made.add_row(_tensor_name(row, report), _shape(row), row.made_of,
                         f"{row.bytes:,}", f"{row.dense_bytes:,}")  # fmt: skip
    else:
        made = table("made of", "tensors", "bytes", "dense", right=(1, 2, 3))
        for name, count, stored, dense in report.groups():
            made.add_row(name, f"{count:,}", f"{stored:,}", f"{dense:,}")
    blank = ("", "") if tensors else ("",)
    if report.score_bytes:
        made.add_row("popup scores", *blank, f"{report.score_bytes:,}", "")
    made.add_row("header", *blank, f"{report.header_bytes:,}", "")
    made.add_row("file", *blank, f"{report.bytes:,}", f"{report.dense_bytes:,}")
    show(made)
    console.print(
        f"{clean(report.file)}: {size(report.bytes)}, dense {size(report.dense_bytes)}, "
        f"{compared(report.ratio)}{_beside(report)}"
    )
    say_bases(report)


def _beside(report: StorageReport) -> str:
    """What the ratio counts of the bases."""
    if not report.bases:
        return ""
    known = report.base_bytes
    return " beside its base" if known is None else f" with its base of {size(known)}"


def say_bases(report: StorageReport) -> None:
    """Which dense files a file is nothing without, and where they must lie."""
    for base in report.bases:
        where = "lies beside it; keep the two together" if base.bytes is not None else (
            "must lie beside it, or be given as --base"
        )  # fmt: skip
        note(f"{clean(report.file)} builds on {clean(base.name)}, which {where}")


def compared(ratio: float) -> str:
    """Dense bytes over bytes, in words."""
    if not ratio:
        return "nothing to compare"
    return f"{ratio:.1f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x as large"


def _tensor_name(row: TensorStorage, report: StorageReport) -> str:
    several = len({tensor.member for tensor in report.tensors}) > 1
    return clean(f"{row.member}: {row.name}" if several else row.name)


def _shape(row: TensorStorage) -> str:
    return "x".join(str(dim) for dim in row.shape) or "scalar"


def show_layers(layers: Sequence[LayerCount]) -> None:
    """What is learned, layer by layer, and in all."""
    made = table("layer", "learned", "of", "", right=(1, 2, 3))
    for row in layers:
        share = f"{row.learned / row.total:.1%}" if row.learned else ""
        made.add_row(clean(row.layer), f"{row.learned:,}", f"{row.total:,}", share)
    learned, total = sum(r.learned for r in layers), sum(r.total for r in layers)
    made.add_row("all", f"{learned:,}", f"{total:,}", f"{learned / total:.1%}")
    show(made)


def show_members(report: MembersReport) -> None:
    """What each member adds, and what as many files of their own would take."""
    splits = {row.accuracy_on for row in report.members if row.accuracy is not None} or {"test"}
    one = splits.pop() if len(splits) == 1 else ""
    tags = {name: "" if one else f" ({name})" for name in ("test", "validation")}
    columns = ["member", "adds", "dense", "classes", "dataset", f"{one} accuracy".strip()]
    calibrated = any(row.temperature is not None for row in report.members)
    made = table(*columns, *["temperature"] * calibrated, right=(1, 2, 3, 5, 6))
    for row in report.members:
        cells = (
            clean(row.name) + (" (damaged)" if row.fault else ""),
            size(row.bytes),
            size(row.dense_bytes),
            "" if row.classes is None else str(row.classes),
            clean(row.dataset or ""),
            "" if row.accuracy is None else f"{row.accuracy:.4f}{tags[row.accuracy_on]}",
        )
        heat = "" if row.temperature is None else f"{row.temperature:.4f}"
        made.add_row(*cells, *[heat] * calibrated)
    console = out()
    show(made)
    beside = f", beside {clean(', '.join(report.bases))}" if report.bases else ""
    shared = f"of which {size(report.rest_bytes)} shared{beside}"
    console.print(f"{clean(report.file)}: {size(report.bytes)}, {shared}")
    count, ratio = len(report.members), report.dense_bytes / max(1, report.bytes)
    apart = f"{count} dense files" if count > 1 else "a dense file"
    console.print(f"as {apart}: {size(report.dense_bytes)}, {ratio:.1f}x as much")


SPLIT_WORDS = {
    "test": "test images", "validation": "validation images", "train": "training images"
}  # fmt: skip


def images_of(shown: Shown, count: int) -> str:
    """``folder, 120 test images (test/)``."""
    where = f" ({shown.data.where})" if shown.data.where else ""
    return clean(f"{shown.dataset.name}, {count:,} {SPLIT_WORDS[shown.split]}{where}")


def show_ensemble(found: Scored) -> None:
    """Each member's figures and the ensemble's, and the paper's row of them."""
    metrics, console = found.metrics, out()
    labelled = metrics.labelled > 0
    console.print(images_of(found.shown, metrics.images))
    columns = ("", "accuracy", "NLL", "Brier", "ECE", "AURC", "entropy")
    made = table(*columns, right=tuple(range(1, 7)))
    rows = [*metrics.members.items()]
    for name, one in [*rows, ("ensemble", metrics.ensemble)] if len(rows) > 1 else rows:
        figures = (one.accuracy, one.nll, one.brier, one.ece, one.aurc, one.entropy)
        made.add_row(clean(name), *(f"{figure:.4f}" for figure in figures))
    show(made)
    pairs = [
        ("disagreement", f"{metrics.disagreement:.4f} of the images, a pair of members"),
        ("mutual information", f"{metrics.mutual_information:.4f} nats"),
    ]
    show_pairs(pairs if len(rows) > 1 else [])
    if found.ood_dataset is not None:
        made = table(f"against {clean(found.ood_dataset)}", "AUROC", "FPR95", right=(1, 2))
        for name, apart in found.ood.items():
            made.add_row(name.replace("_", " "), f"{apart.auroc:.4f}", f"{apart.fpr95:.4f}")
        show(made)
    if labelled:
        made = table(
            "Model Type", "No. Params", "Mean Accuracy", "Ensemble Accuracy", right=(1, 2, 3)
        )
        made.add_row(
            clean(found.kind),
            params(found.learned),
            f"{100 * metrics.mean_accuracy:.1f}",
            f"{100 * metrics.ensemble.accuracy:.2f}",
        )
        show(made)


def show_classes(rows: Sequence[ClassRow]) -> None:
    """Each class's figures."""

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    made = table(
        "class", "images", "accuracy", "precision", "F1", "mistaken for", right=(1, 2, 3, 4)
    )
    for row in rows:
        made.add_row(
            clean(row.name), f"{row.images:,}", figure(row.accuracy), figure(row.precision),
            figure(row.f1), clean(row.mistaken_for or ""),
        )  # fmt: skip
    show(made)


def params(count: int) -> str:
    """A number of parameters as papers write it: 137K, 1.53M."""
    if count >= 1_000_000:
        return f"{count / 1e6:.2f}M"
    return f"{count / 1e3:.0f}K" if count >= 10_000 else f"{count:,}"


def plain(value: Any) -> str:
    """A value of a job's facts, for people."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def show_pairs(pairs: list[tuple[str, str]]) -> None:
    """Names and values, aligned."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        out().print(f"{name:<{width}}  {clean(value)}")


@contextmanager
def training_progress(epochs: int) -> Iterator[Hooks]:
    """Hooks that show a bar in a terminal and one line an epoch anywhere; nothing with -q."""
    from randsurgery.training.loop import Hooks

    console = err()
    shown = console.is_terminal and verbosity.level >= 1
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"), TimeRemainingColumn(),
        console=console, transient=True, disable=not shown,
    )  # fmt: skip
    task = bar.add_task("epoch 1", total=None, loss="")

    def on_epoch_start(epoch: int, steps: int) -> None:
        bar.reset(task, total=steps, description=f"epoch {epoch + 1}/{epochs}")

    def on_step(_: int, loss: float) -> None:
        bar.update(task, advance=1, loss=f"loss {loss:.3f}")

    def on_epoch(record: dict[str, Any]) -> None:
        flips = f", {record['flipped']:.2%} of the mask flipped" if "flipped" in record else ""
        flips += f", {record['kept']:.1%} kept" if "kept" in record else ""
        note(
            f"epoch {record['epoch']}/{epochs}: train loss {record['train_loss']:.3f}"
            f"{seen(record)}{flips}"
        )

    def on_end(record: dict[str, Any]) -> None:
        note(kept(record))

    with bar:
        yield Hooks(
            on_epoch_start=on_epoch_start, on_step=on_step, on_epoch=on_epoch, on_end=on_end,
            on_note=note,
        )  # fmt: skip


def accuracy_of(record: dict[str, Any], *, first: str) -> str:
    """An accuracy, and on which images it is: those of ``first`` ("val", "test") if there are some,
    else the others; empty if it was taken on neither."""
    for which in (first, "test", "val"):
        if (found := record.get(f"{which}_accuracy")) is not None:
            return f"{'validation' if which == 'val' else which} accuracy {found:.2%}"
    return ""


def seen(record: dict[str, Any]) -> str:
    """An epoch's accuracy."""
    found = accuracy_of(record, first="val")
    return f", {found}" if found else ""


def kept(record: dict[str, Any]) -> str:
    """Which epoch was kept, and why the run ended."""
    ran, epochs = record["epochs_run"], record["epochs"]
    early = f"stopped after {ran} of {epochs} epochs; " if ran < epochs else ""
    why = "the best by validation accuracy" if record["kept"] == "best" else "the last"
    return f"{early}kept: epoch {record['epoch']}, {why}"


def final_accuracy(record: dict[str, Any]) -> str:
    """The accuracy of what a job wrote: on the test images, if there are some."""
    return accuracy_of(record, first="test") or "no test or validation images: no accuracy"


@contextmanager
def stages_progress(epochs: int) -> Iterator[Callable[[str], Hooks]]:
    """Hooks for each stage of a build, by its name, as ``training_progress`` gives them."""
    with training_progress(epochs) as hooks:

        def stage(name: str) -> Hooks:
            return replace(
                hooks,
                on_epoch=lambda record: note(
                    f"{name}: epoch {record['epoch']}, train loss {record['train_loss']:.3f}"
                    f"{seen(record)}"
                ),
                on_end=lambda record: note(f"{name}: {kept(record)}; {final_accuracy(record)}"),
            )

        yield stage


@contextmanager
def image_progress(images: int | None) -> Iterator[Callable[..., None]]:
    """A function to call after each image, or with a number of them; it moves a bar in a terminal,
    unless -q was given. ``images``: how many there are, None if that is not known."""
    console = err()
    shown = console.is_terminal and verbosity.level >= 1
    bar = Progress(
        TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not shown,
    )  # fmt: skip
    task = bar.add_task("images", total=images)
    with bar:
        yield lambda count=1: bar.update(task, advance=count)
