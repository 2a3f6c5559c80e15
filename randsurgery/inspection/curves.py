"""Learning curves: the records of a run as a picture."""

from __future__ import annotations

import os
from typing import Any

from randsurgery.inspection.pictures import save


def plot_curves(records: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Loss and accuracy by epoch, and what else a technique records (flipped mask bits, the scale
    of a fixed classifier), to a .png, .svg or .pdf file. The last record of a run that was
    validated, that of what was kept, is a point, not an epoch. Raises OutputError."""
    from matplotlib.figure import Figure

    kept = next((record for record in records if "kept" in record), None)
    records = [record for record in records if "kept" not in record]
    validated = any("val_accuracy" in record for record in records)
    which, words = ("val", "validation") if validated else ("test", "test")
    epochs = [record["epoch"] for record in records]
    panels: list[tuple[str, list[tuple[str, str]]]] = [
        ("cross entropy", [("train_loss", "training"), (f"{which}_loss", words)]),
        ("accuracy", [("train_accuracy", "training"), (f"{which}_accuracy", words)]),
    ]
    for key, title in (
        ("flipped", "share of mask bits flipped"),
        ("kept", "share of weights kept"),
        ("head_scale", "head scale"),
    ):
        if any(key in record for record in records):
            panels.append((title, [(key, "")]))
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for key, label in lines:
            style = "--" if label == "training" else "-"  # not by colour alone
            values = [record.get(key) for record in records]
            shown = [float("nan") if value is None else value for value in values]
            axes.plot(epochs, shown, style, marker="o", markersize=3, label=label)
        tested = lines[-1][0].replace("val_", "test_")
        if kept is not None and tested.startswith("test_") and kept.get(tested) is not None:
            axes.plot(
                [kept["epoch"]], [kept[tested]], "D", color="black", label="test (kept epoch)"
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if lines[0][1]:
            axes.legend(frameon=False)
    save(figure, path)
