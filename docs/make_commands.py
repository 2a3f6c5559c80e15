"""Writes docs/commands.md from the program: what --help says of each command.

python docs/make_commands.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))  # this program, not one that is installed
from randsurgery.cli.app import app

PAGE = Path(__file__).with_name("commands.md")

HEAD = """\
# Commands

What `--help` says, 80 columns wide. This page is made, not written: change the help texts in
`randsurgery/cli/` and run

    python docs/make_commands.py

which takes a second; `tests/test_commands_page.py` tells when that was forgotten.
Made with {made}.

{contents}
"""


def commands(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group, in the order of the help, the program's own first."""
    yield path
    for command in group.registered_commands:
        assert command.name is not None, "commands are registered under their names"
        yield (*path, command.name)
    for inner in group.registered_groups:
        assert inner.name is not None
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance, (*path, inner.name))


def help_of(words: tuple[str, ...]) -> str:
    """What ``randsurgery WORDS --help`` prints in 80 columns without colours."""
    plain = {
        "COLUMNS": "80", "TERMINAL_WIDTH": "80", "TERM": "dumb", "NO_COLOR": "1",
        "FORCE_COLOR": None, "PY_COLORS": None, "GITHUB_ACTIONS": None,
        "_TYPER_FORCE_DISABLE_TERMINAL": "1",
    }  # fmt: skip
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="randsurgery", env=plain)
    assert result.exit_code == 0, result.output
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def made_with() -> str:
    """The libraries that lay the help out."""
    return f"typer {version('typer')}, rich {version('rich')}"


def page() -> str:
    """The whole page."""
    paths = list(commands(app))
    titles = [" ".join(("randsurgery", *path)) for path in paths]
    links = [f"[{title}](#{title.replace(' ', '-')})" for title in titles]
    parts = [HEAD.format(made=made_with(), contents=" ·\n".join(links))]
    for title, path in zip(titles, paths, strict=True):
        parts.append(f"## {title}\n\n```text\n{help_of(path)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
