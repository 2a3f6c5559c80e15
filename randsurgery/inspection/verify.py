"""Every digest of a file, compared; of many files and folders, too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from randsurgery.errors import FileFormatError, IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint, is_safetensors, read_checkpoint
from randsurgery.format.rebuild import Payloads
from randsurgery.format.writing import (
    Check,
    verify,
)


@dataclass(frozen=True)
class VerifyReport:
    """The checks of one file; ``ok`` if all agreed. ``networks``: a check a member, that its
    architecture fits, None if that was not asked, empty if the file names none. ``fault``: why
    the file could not be checked; ``foreign``: it is a safetensors file, but not one of
    randsurgery, so that nothing was checked."""

    file: str
    checks: tuple[Check, ...]
    networks: tuple[Check, ...] | None = None
    fault: str | None = None
    foreign: bool = False

    @property
    def ok(self) -> bool:
        """True if every digest agreed and every network fits."""
        return self.fault is None and not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not agree."""
        return tuple(c for c in (*self.checks, *(self.networks or ())) if not c.ok)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``ok``, the number of checks, and the failures."""
        found: dict[str, Any] = {
            "file": self.file,
            "ok": self.ok,
            "checks": len(self.checks),
            "failures": [asdict(check) for check in self.failures],
        }
        if self.networks is not None:
            found["networks"] = len(self.networks)
        if self.fault is not None:
            found["fault"] = self.fault
        if self.foreign:
            found["skipped"] = "not a file of randsurgery"
        return found


def verify_file(
    path: str | os.PathLike[str],
    *,
    base: Payloads | str | os.PathLike[str] | None = None,
    architecture: bool = False,
) -> VerifyReport:
    """Rebuild every tensor and compare every digest; with ``architecture``, check the network too.
    Raises FileFormatError if unreadable."""
    with read_checkpoint(path, base=base, spare_bases=True) as checkpoint:
        assert checkpoint.path is not None
        networks = tuple(check_architecture(checkpoint)) if architecture else None
        return VerifyReport(checkpoint.path.name, tuple(verify(checkpoint)), networks)


def check_architecture(checkpoint: Checkpoint) -> list[Check]:
    """Build each member's network on meta, as its architecture has it, and hold names, shapes and
    dtypes against the file's. This, and nothing else here, imports torch. A file that names no
    architecture is not checked."""
    if checkpoint.recipe.model is None:
        return []
    from randsurgery.surgery.modules import check_fit, meta_module

    checks = []
    for member in checkpoint.recipe.members:
        what = f"{member.name}: {checkpoint.recipe.model.name}"
        try:
            shell = meta_module(checkpoint, member.name)
            check_fit(checkpoint.recipe, member, shell, checkpoint.recipe.model.name)
            checks.append(Check(what, True))
        except (IncompatibleError, UsageError) as error:
            checks.append(Check(what, False, str(error)))
    return checks


@dataclass(frozen=True)
class Found:
    """A file to verify. ``named``: it was given itself, not found in a folder."""

    path: Path
    named: bool


def find_files(paths: Iterable[str | os.PathLike[str]]) -> list[Found]:
    """The files among ``paths``, and every .safetensors file below the folders among them, each
    once, in order of their names. Links to folders are not followed.

    Raises FileFormatError for a folder that cannot be read, UsageError for one without such files.
    """
    found: dict[Path, Found] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            found.setdefault(path, Found(path, True))
            continue
        below = sorted(_below(path))
        if not below:
            raise UsageError(f"{path}: no .safetensors file in this folder or below it")
        for file in below:
            found.setdefault(file, Found(file, False))
    return list(found.values())


def _below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise FileFormatError(f"{error.filename}: cannot be read ({error.strerror})") from None

    for here, _, names in os.walk(folder, onerror=refuse):
        for path in (Path(here) / name for name in names):
            # a pipe would never end; a broken link is a file that is missing
            if is_safetensors(path) and (path.is_file() or path.is_symlink()):
                yield path
