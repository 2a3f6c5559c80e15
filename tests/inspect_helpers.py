"""The program run in the process, in a terminal, and in a process that is watched."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from randsurgery.cli.app import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    return result.stderr.strip().splitlines()[-1]


class Terminal(io.StringIO):
    """Text that takes itself for a terminal's."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def without_bold(text: str) -> str:
    """What a terminal shows, without the codes for the bold type of headings."""
    return re.sub("\x1b\\[[01]m", "", text.replace("\r\n", "\n"))


def in_terminal(*arguments: object, columns: int = 80) -> str:
    """What the program shows in a terminal of that width, headings not bold."""
    shown = Terminal()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", str(columns))
        patch.delenv("NO_COLOR", raising=False)
        app([str(a) for a in arguments], standalone_mode=False)
    return without_bold(shown.getvalue())


def in_pty(*arguments: object) -> str:
    """The same of the program in a process of its own, in a real terminal."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "randsurgery", *map(str, arguments)]
    with subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, env=environment) as job:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the other end has gone
            while part := os.read(master, 65536):
                shown += part
    os.close(master)
    assert job.returncode == 0, shown
    return without_bold(shown.decode())


WATCHED = """
import runpy, sys
sys.argv[0] = "randsurgery"
try:
    runpy.run_module("randsurgery", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], *({"torch", "timm", "torchvision", "matplotlib"} & set(sys.modules)),
      file=sys.stderr)
"""


def watched(*arguments: object) -> tuple[int, set[str]]:
    """(peak kB of memory, heavy modules) of a command in a process of its own."""
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, *heavy = done.stderr.splitlines()[-1].split()
    return int(peak), set(heavy)
