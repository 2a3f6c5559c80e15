"""Start-up: wall time of ``randsurgery --help`` as a process of its own, and of an empty Python.

The command is the script beside this interpreter. ``python`` is ``python -c pass``, what no
program written in Python can undercut.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.timing import Action, in_turn, parser_for, report


def running(*command: str) -> Action:
    """Run a command to its end, its output thrown away. Raises CalledProcessError."""
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def script() -> str:
    """The installed command."""
    found = shutil.which("randsurgery", path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit("randsurgery is not installed beside this interpreter")
    return found


def main() -> None:
    """Measure and print the report."""
    parser = parser_for("startup", __doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    timings = in_turn(
        {"help": running(script(), "--help"), "python": running(sys.executable, "-c", "pass")},
        args.rounds,
    )
    report(timings, {"help/python": timings.ratio("help", "python")}, rounds=args.rounds)


if __name__ == "__main__":
    main()
