"""Weights that lie in several files, and folders as the Hugging Face Hub has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from randsurgery.errors import FileFormatError, OutputError
from randsurgery.format.canonical import strict_json
from randsurgery.format.checkpoint import is_checkpoint, is_safetensors, read_checkpoint
from randsurgery.format.container import MAX_HEADER, Container
from randsurgery.format.tensors import RawTensor

CONFIG = "config.json"
INDEX = ".index.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a folder's weights are called, in the order in which Hugging Face's libraries look."""
PICKLED = (".bin", ".pth", ".pt")
"""How the names of parts end that torch.save wrote."""


class Shards(dict[str, Path]):
    """The part that each tensor lies in. A part is open only while one of its tensors is read."""

    def read(self, name: str) -> RawTensor:
        """The tensor, in memory of its own. Raises KeyError, or FileFormatError."""
        with Container(self[name]) as part:
            return part.read(name)


def weights_in(folder: str | os.PathLike[str]) -> tuple[Path, tuple[str, ...]]:
    """The file of a folder's weights, or their index, and the others that are not read. Raises
    FileFormatError if there is none."""
    found = [name for name in WEIGHTS if (Path(folder) / name).is_file()]
    if not found:
        raise FileFormatError(
            f"{folder}: a folder without weights, expected {WEIGHTS[0]}, {WEIGHTS[2]} or the "
            f"{INDEX} of one"
        )
    return Path(folder) / found[0], tuple(found[1:])


def located(path: str | os.PathLike[str]) -> Path:
    """The file itself, or that of a folder's weights. Raises FileFormatError."""
    return weights_in(path)[0] if Path(path).is_dir() else Path(path)


def beside(path: str | os.PathLike[str], names: Iterable[str]) -> Path | None:
    """The first base of those names that lies beside a file and is no safetensors file, which
    ``read_checkpoint`` finds itself; of a folder's name also the one the file lies in."""
    folder = Path(path).absolute().parent
    for name in sorted(names):
        found = folder / name
        if found.is_dir() or (found.is_file() and not is_safetensors(found)):
            return found
        if folder.name == name and any((folder / one).is_file() for one in WEIGHTS):
            return folder
    return None


def base_beside(path: str | os.PathLike[str], name: str) -> Path | None:
    """The base of that recorded name that lies beside a file, of any kind; None if none does."""
    found = Path(path).with_name(name)
    return found if found.is_file() else beside(path, [name])


def files_behind(path: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    """The files that a path to weights stands for, as far as they are there: itself, or those of a
    folder, an index and its parts."""
    if path is None:
        return ()
    file = Path(path)
    if file.is_dir():
        found = tuple(file / name for name in WEIGHTS if (file / name).is_file())
        return tuple(part for one in found for part in files_behind(one))
    if not (is_index(file) and file.is_file()):
        return (file,)
    with contextlib.suppress(FileFormatError):
        return file, *part_paths(file, weight_map(file))
    return (file,)


def read_behind(path: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    """``files_behind``, and of a file of ours the bases beside it that it builds on: all that a
    command reads that is given the path."""
    own = files_behind(path)
    if path is None or not is_safetensors(path) or not Path(path).is_file():
        return own
    try:
        with read_checkpoint(path, need_bases=False) as found:
            names = [ref.file for ref in found.recipe.bases.values() if ref.file is not None]
    except FileFormatError:  # whoever opens it tells
        return own
    bases = (base_beside(path, name) for name in names)
    return (*own, *(file for base in bases for file in files_behind(base)))


def check_not_input(
    output: Path, inputs: Iterable[str | os.PathLike[str] | None], *, option: str = "--output"
) -> None:
    """Refuse to write over what is read by way of these paths, with ``--force`` too. Raises
    OutputError, which names the option."""
    for path in inputs if output.exists() else ():
        for file in read_behind(path):
            if file.exists() and output.samefile(file):
                raise OutputError(f"{output}: is read by this command; choose another {option}")


def bytes_behind(path: str | os.PathLike[str]) -> int:
    """The bytes of the weights' files: of a folder those that are read, of an index its parts."""
    return sum(file.stat().st_size for file in files_behind(located(path)))


def is_index(path: str | os.PathLike[str]) -> bool:
    """True if the name says that it is the index of a sharded file."""
    return Path(path).suffix == ".json"


def read_shards(path: str | os.PathLike[str]) -> Shards:
    """A sharded safetensors file by its index, every header checked. Raises FileFormatError."""
    with contextlib.ExitStack() as stack:
        parts = open_shards(Path(path), stack)
        return Shards({name: part.path for name, part in parts.items()})


def open_shards(path: Path, stack: contextlib.ExitStack) -> dict[str, Container]:
    """The part that each tensor of a sharded file lies in, opened; ``stack`` closes them. Every
    part lies beside the index, under a bare name. Raises FileFormatError."""
    places = weight_map(path)
    if pickled_parts(places):
        raise FileFormatError(
            f"{path.name}: its parts are of torch.save, where safetensors files are needed"
        )
    found: dict[str, Container] = {}
    for part in sorted(set(places.values())):
        file = stack.enter_context(Container(_part(path, part)))
        if is_checkpoint(file):
            raise FileFormatError(f"{path.name}: {part!r} is a file of randsurgery, no part")
        check_part(path, places, part, set(found), set(file.infos))
        found.update(dict.fromkeys(file.infos, file))
    return found


def check_part(
    path: Path, places: dict[str, str], part: str, before: set[str], here: set[str]
) -> None:
    """Raises FileFormatError if a part lacks a tensor that the index has in it, or repeats one of
    the parts before."""
    if twice := sorted(before & here):
        raise FileFormatError(f"{path.name}: {twice[0]!r} lies in two parts")
    wanted = {name for name, place in places.items() if place == part}
    if missing := sorted(wanted - here):
        raise FileFormatError(f"{path.name}: {missing[0]!r} is not in {part}")


def _part(path: Path, name: str) -> Path:
    """The path of a part. Raises FileFormatError if it is not there."""
    part = path.parent / name
    if not part.is_file():
        raise FileFormatError(f"{path.name}: its part {name} is missing; put it beside the index")
    return part


def pickled_parts(places: dict[str, str]) -> bool:
    """True if the parts are what torch.save wrote."""
    return all(place.endswith(PICKLED) for place in places.values())


def part_paths(path: Path, places: dict[str, str]) -> list[Path]:
    """The parts by name. Raises FileFormatError if one is missing."""
    return [_part(path, name) for name in sorted(set(places.values()))]


def weight_map(path: Path) -> dict[str, str]:
    """File name by tensor, as an index has it. Raises FileFormatError, also for parts that lie
    elsewhere than beside it, or are of two sorts."""
    try:
        if path.stat().st_size > MAX_HEADER:
            raise FileFormatError(f"{path.name}: no index of a sharded file (over 100 MB)")
        found: Any = strict_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be opened ({error.strerror})") from None
    except ValueError as error:
        raise FileFormatError(f"{path.name}: the index is not valid JSON ({error})") from None
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise FileFormatError(f"{path.name}: the index has no weight_map of names to files")
    if not places:
        raise FileFormatError(f"{path.name}: the index names no tensor")
    endings = PICKLED if pickled_parts(places) else (".safetensors",)
    for part in places.values():
        bare = part == Path(part).name and not set(part) & set("/\\:\0")
        if not bare or not part.endswith(endings):
            raise FileFormatError(
                f"{path.name}: {part!r} is not a bare name ending in .safetensors, or in .bin as "
                "all others"
            )
    return places
