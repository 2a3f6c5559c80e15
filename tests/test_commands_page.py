"""docs/commands.md is what the program says of itself."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from randsurgery.cli.app import app

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "docs" / "make_commands.py"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_commands", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(page: str) -> dict[str, str]:
    """What stands below each command's title."""
    found = re.split(r"^## (randsurgery.*)\n", page, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def test_the_page_is_what_the_program_says(maker: ModuleType) -> None:
    page = maker.PAGE.read_text(encoding="utf-8")
    if f"Made with {maker.made_with()}." not in page:
        pytest.skip("other releases of typer and rich lay the help out in other ways")
    assert page == maker.page(), "run python docs/make_commands.py"


def test_the_page_has_every_command_and_every_option_of_it(maker: ModuleType) -> None:
    """Whatever releases lay the help out."""
    there = sections(maker.PAGE.read_text(encoding="utf-8"))
    paths = list(maker.commands(app))
    assert list(there) == [" ".join(("randsurgery", *path)) for path in paths]
    options = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
    for path, text in zip(paths, there.values(), strict=True):
        assert set(options.findall(text)) == set(options.findall(maker.help_of(path))), path


def test_every_command_that_help_lists_has_its_section(maker: ModuleType) -> None:
    paths = set(maker.commands(app))
    for path in paths:
        panel = maker.help_of(path).partition("─ Commands ")[2]
        names = re.findall(r"^│ ([a-z][a-z-]*)  ", panel, flags=re.MULTILINE)
        inner = {other[-1] for other in paths if other[:-1] == path and other}
        assert set(names) == inner, path


def test_the_page_is_plain_and_80_columns_wide(maker: ModuleType) -> None:
    page = maker.PAGE.read_text(encoding="utf-8")
    assert "\x1b" not in page
    for text in sections(page).values():
        assert max(map(len, text.splitlines())) <= 80
