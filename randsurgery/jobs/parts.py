"""The folder beside a build's output, in which its members lie until all are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from randsurgery.errors import FileFormatError, IncompatibleError, OutputError
from randsurgery.format.checkpoint import read_checkpoint
from randsurgery.format.container import write_atomically
from randsurgery.format.members import first_fault
from randsurgery.jobs.records import metrics_path
from randsurgery.training.state import first_difference

ABOUT = "build.json"
"""In the folder of the parts: which build they are of."""
RECORDS = (".metrics.jsonl", ".metrics.jsonl.part", ".settings.yaml")


def parts_folder(output: Path) -> Path:
    """Where the members of a build lie until all are trained: beside the output."""
    return output.with_name(f"{output.stem}.parts")


def check_folder(folder: Path, *, resume: bool, force: bool) -> None:
    """Raises OutputError for a folder that is in the way."""
    ours = (folder / ABOUT).is_file() or (folder.is_dir() and not any(folder.iterdir()))
    if folder.exists() and not ours:
        raise OutputError(
            f"{folder}: is where the members are kept, but is not a build's; choose another "
            "--output, or move it away"
        )
    if folder.exists() and not resume and not force:
        raise OutputError(
            f"{folder}: holds the members of a build that was stopped; --resume auto goes on with "
            "it, --force begins anew"
        )


def clear(folder: Path) -> None:
    """Remove what a build keeps in its folder, and the folder if nothing else is in it."""
    for path in folder.iterdir():
        # names that start with a dot are of files that were not finished
        ours = path.name == ABOUT or path.name.endswith((".safetensors", *RECORDS))
        ours = ours or path.name.startswith(".")
        if ours and path.is_file():
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _about(path: Path) -> dict[str, Any]:
    """Which build a folder is of. Raises FileFormatError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FileFormatError(f"{path}: is damaged; --force, without --resume, begins anew")
    return found


def open_folder(folder: Path, build: dict[str, Any], *, resume: bool) -> None:
    """Make the folder, empty, or with the parts of the same build, which ``build`` tells from
    others. Raises IncompatibleError naming the first difference if they are another's."""
    ours = json.loads(json.dumps(build))
    about = folder / ABOUT
    if folder.exists() and not resume:
        clear(folder)
    if about.is_file():
        theirs = _about(about)
        if (word := first_difference(ours, theirs)) is not None:
            raise IncompatibleError(f"{folder}: holds the members of another build: {word}")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror or error})") from None
    write_atomically(about, iter([json.dumps(ours, sort_keys=True).encode()]))


def is_done(path: Path) -> bool:
    """True if a stage was trained to its end before the build was stopped. Raises FileFormatError
    if its file has been damaged since."""
    if not path.exists() or not metrics_path(path).exists():
        return False
    with read_checkpoint(path, need_bases=False) as part:
        if (found := first_fault(part)) is not None:
            raise FileFormatError(
                f"{path} is damaged: {found[1]}; delete it, and --resume auto trains it again"
            )
    return True
