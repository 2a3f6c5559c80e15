"""What the commands that predict share: their options, and the CSV on its way out."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING, Annotated

import typer

from randsurgery.cli import common
from randsurgery.cli.common import clean, note, print_json
from randsurgery.errors import DataError, OutputError, UsageError

if TYPE_CHECKING:
    from randsurgery.jobs.predict import PredictPlan, Tally

Images = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT",
        help="Images, and folders that are searched with all below. None: a dataset's test split.",
    ),
]
CsvOutput = Annotated[
    str | None,
    typer.Option(
        "-o", "--output", metavar="FILE.csv", help="CSV to write; stdout without it.",
        rich_help_panel=common.OUTPUT,
    ),
]  # fmt: skip
Top = Annotated[
    int, typer.Option(min=1, metavar="N", help="How many of the likeliest classes to list.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at the first unreadable image, write nothing.")
]


def check_json(json: bool, output: str | None) -> None:
    """Raises UsageError if there is no place for both the CSV and the JSON."""
    if json and output is None:
        raise UsageError("--json needs -o FILE.csv: without it the CSV goes to stdout")


def work(plan: PredictPlan, file: str, output: str | None, *, json: bool) -> None:
    """Write the CSV, say what came of it, and close the file. Raises DataError if an image
    failed."""
    with contextlib.closing(plan):
        _work(plan, file, output, json=json)


def _work(plan: PredictPlan, file: str, output: str | None, *, json: bool) -> None:
    from randsurgery.jobs import predict as job
    from randsurgery.jobs.inputs import look_text

    for line in plan.notes:
        note(clean(line))
    common.detail(f"{len(plan.data):,} images, shown as {look_text(plan.data.spec)}")
    tally = job.Tally()
    if output is None:
        _to_stdout(plan, tally)
    else:
        _to_file(plan, tally)
    if json:
        print_json({"file": file, "dataset": plan.dataset, "output": output, **tally.to_json()})
    elif output is not None:
        unit = "image" if tally.images == 1 else "images"
        common.out().print(f"{clean(output)}: {tally.images:,} {unit}")
    if tally.failures:
        raise DataError(
            f"{len(tally.failures):,} of {len(plan.data):,} images failed, named above; the "
            "others are done"
        )


def _say(path: str, why: str | None) -> None:
    if why is not None:
        common.err().print(f"{clean(path)}: {clean(why)}")


def _to_file(plan: PredictPlan, tally: Tally) -> None:
    from randsurgery.cli import render
    from randsurgery.jobs.predict import run

    with render.image_progress(len(plan.data)) as on_image:

        def on_result(path: str, why: str | None) -> None:
            _say(path, why)
            on_image()

        run(plan, tally, on_result)


def _to_stdout(plan: PredictPlan, tally: Tally) -> None:
    """The CSV as it comes; with --strict not before it is whole."""
    from randsurgery.jobs.predict import lines

    # fields reach a terminal escaped, a pipe as they are
    shown = clean if sys.stdout.isatty() else str
    made = lines(plan, tally, _say, shown)
    stdout = sys.stdout.buffer
    try:
        if plan.strict:
            with tempfile.TemporaryFile() as whole:
                whole.writelines(made)
                whole.seek(0)
                shutil.copyfileobj(whole, stdout)
                stdout.flush()
            return
        for line in made:
            stdout.write(line)
            stdout.flush()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the CSV is not whole") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        common.drop_stdout()
        raise OutputError(f"the CSV cannot be written ({error.strerror or error})") from None
