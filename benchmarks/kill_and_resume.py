"""Kill a training run at random moments, resume it, and compare the file with that of a run that
was never interrupted.

Each trial starts ``popup`` or ``train`` as a process, kills it with SIGKILL after a random time,
again and again, resuming with ``--resume auto``, until it ends by itself; then the bytes of the two
files are compared. One thread, one machine.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import note, parser_for

COMMANDS = {
    "popup": ["popup", "conv2", "--k", "0.5", "--learn", "@head"],
    "train": ["train", "plan.safetensors"],
}
SHARED = ["--epochs", "6", "--state-every", "7", "--resume", "auto", "-q"]
PLAN = ["freeze", "conv2", "--width", "0.25", "--num-classes", "10", "--fraction", "0.25", "-q"]


def start(folder: Path, kind: str, output: str) -> subprocess.Popen[bytes]:
    """The run as a process of its own."""
    width = ["--width", "0.25"] if kind == "popup" else []
    command = [sys.executable, "-m", "randsurgery", *COMMANDS[kind], *width, *SHARED, "-o", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def trial(folder: Path, kind: str, name: str, whole_seconds: float, draw: random.Random) -> int:
    """Kill and resume until the run ends; how often it was killed."""
    kills = 0
    while True:
        process = start(folder, kind, name)
        wait = draw.uniform(0.35, 1.05) * whole_seconds if kills == 0 else 600
        try:
            code = process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            state = folder / name.replace(".safetensors", ".state.safetensors")
            if (folder / name).exists() and not state.exists():
                return kills  # killed after all was done, on its way out
            continue
        if code != 0:
            raise SystemExit(f"{kind}: a resumed run ended with exit code {code}")
        return kills


def main() -> None:
    """Run the trials and print the report."""
    parser = parser_for("kill_and_resume", __doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    kills, identical, trials = 0, 0, 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        plan = [sys.executable, "-m", "randsurgery", *PLAN, "-o", "plan.safetensors"]
        subprocess.run(plan, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        seconds = {}
        for kind in COMMANDS:
            began = time.perf_counter()
            if start(folder, kind, f"{kind}.safetensors").wait():
                raise SystemExit(f"{kind} failed")
            seconds[kind] = time.perf_counter() - began
        while kills < args.kills:
            kind = list(COMMANDS)[trials % 2]
            name = f"{kind}-{trials}.safetensors"
            kills += trial(folder, kind, name, seconds[kind], draw)
            same = (folder / name).read_bytes() == (folder / f"{kind}.safetensors").read_bytes()
            identical, trials = identical + same, trials + 1
            note(f"trial {trials} ({kind}): {kills} kills so far, identical: {same}")
    print(json.dumps({"kills": kills, "runs": trials, "identical": identical}))
    if identical != trials:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
