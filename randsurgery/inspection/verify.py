"""Every digest of a file, compared."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from randsurgery.format.checkpoint import is_safetensors, read_checkpoint
from randsurgery.format.rebuild import Payloads
from randsurgery.format.writing import (
    Check,
    verify,
)


@dataclass(frozen=True)
class VerifyReport:
    """The checks of one file; ``ok`` if all agreed."""

    file: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if every digest agreed."""
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not agree."""
        return tuple(check for check in self.checks if not check.ok)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``ok``, the number of checks, and the failures."""
        return {
            "file": self.file,
            "ok": self.ok,
            "checks": len(self.checks),
            "failures": [asdict(check) for check in self.failures],
        }


def pickled_base(path: str | os.PathLike[str]) -> Path | None:
    """The base that a file names, if it lies beside it and takes torch to be read."""
    with read_checkpoint(path, need_bases=False) as checkpoint:
        files = [ref.file for ref in checkpoint.recipe.bases.values() if ref.file is not None]
    beside = (Path(path).parent / file for file in sorted(files) if not is_safetensors(file))
    return next((file for file in beside if file.is_file()), None)


def verify_file(
    path: str | os.PathLike[str], *, base: Payloads | str | os.PathLike[str] | None = None
) -> VerifyReport:
    """Rebuild every tensor and compare every digest. Raises FileFormatError if unreadable."""
    with read_checkpoint(path, base=base) as checkpoint:
        assert checkpoint.path is not None
        return VerifyReport(checkpoint.path.name, tuple(verify(checkpoint)))
