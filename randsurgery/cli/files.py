"""What ``inspect`` is given: files of any origin, and architectures by name. torch is imported for
an architecture and for another program's pickle, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from randsurgery.cli.common import clean, note
from randsurgery.errors import FileFormatError, UsageError

if TYPE_CHECKING:
    from randsurgery.format.checkpoint import Checkpoint
    from randsurgery.format.recipe import BaseRef

PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
"""What programs call what torch.save writes."""

ANY_FILE = (
    "A safetensors file, the index of a sharded one, a folder of weights, or a .pth (which imports "
    "torch)."
)

File = Annotated[str, typer.Argument(metavar="FILE", help=ANY_FILE)]
FileOrName = Annotated[
    str, typer.Argument(metavar="FILE", help=f"{ANY_FILE[:-1]}, or a timm architecture.")
]


def means_file(name: str) -> bool:
    """True for what lies on the disk, or by its name could only be meant to."""
    endings = (".safetensors", ".json", *PICKLED)
    return os.path.exists(name) or os.sep in name or name.lower().endswith(endings)


def located(name: str) -> str:
    """The file itself, or that of a folder's weights. Raises FileFormatError."""
    from randsurgery.format.shards import located as inside

    return str(inside(name)) if os.path.isdir(name) else name


def check_file(name: str) -> None:
    """Raises FileFormatError for what may be an architecture, where only a file will do."""
    if not means_file(name):
        raise FileFormatError(
            f"{name}: no such file; if it is an architecture, `randsurgery init {name}` writes one"
        )


def is_pickled(file: str) -> bool:
    """True for what torch.save wrote, as far as its name and its first bytes tell, and for the
    index of a sharded file that it wrote. Raises FileFormatError for an index that is none."""
    from pathlib import Path

    from randsurgery.format.shards import is_index, pickled_parts, weight_map
    from randsurgery.inspection.headers import looks_like_safetensors

    if is_index(file):
        return pickled_parts(weight_map(Path(file)))
    if looks_like_safetensors(file):
        return False
    if file.lower().endswith(PICKLED):
        return True
    try:
        with open(file, "rb") as opened:
            return opened.read(1) in (b"P", b"\x80")  # an archive, or a pickle as torch once wrote
    except OSError:
        return False


def read_by_torch(file: str, *, ema: bool = False) -> Any:
    """The tensors of a .pth, in memory; None for what has a header to read. ``ema``: the average
    of its weights. Raises FileFormatError, or UsageError for an average that is not there."""
    if not is_pickled(file):
        if ema:
            raise UsageError(f"--ema: {file} holds no averaged weights; leave the option out")
        return None
    note(f"{clean(file)}: no safetensors file, so all of it is read, with torch")
    from randsurgery.surgery.bases import map_state

    state = map_state(file, ema=ema)
    for line in state.notes:
        note(clean(line))
    for name, reason in state.skipped.items():
        note(clean(f"{name}: left out ({reason})"))
    return {name: read() for name, read in state.tensors.items()}


def given_base(file: str, base: str | None, refs: Iterable[BaseRef]) -> Any:
    """The base to give to a file that builds on ``refs``: a path, or the tensors of a .pth, which
    takes torch to be read. Without ``base``, one that is no safetensors file and lies beside the
    file; else None, and whoever opens the file looks for a safetensors base itself."""
    from randsurgery.format.checkpoint import is_safetensors
    from randsurgery.format.shards import beside

    refs = list(refs)
    found = base or beside(file, [ref.file for ref in refs if ref.file is not None])
    if found is None or (is_safetensors(found) and not Path(found).is_dir()):
        return found
    from randsurgery.surgery.bases import given_base as read

    return read(found, {ref.identity for ref in refs})


def architecture(
    name: str, init: str | None, seed: int | None, args: dict[str, Any]
) -> tuple[Checkpoint, list[str]]:
    """A network of that architecture as init would write it, and its tensors' names from the first
    layer to the last. Raises UsageError listing architectures near the name."""
    from randsurgery.surgery.architectures import build_meta, check_name, spec_of
    from randsurgery.surgery.initialisers import check_init
    from randsurgery.surgery.recipes import make_recipe

    check_name(name)
    made = make_recipe(name, check_init(init or "signed-constant"), seed=seed or 0, args=args)
    return made, list(build_meta(spec_of(name, args)).state_dict())
