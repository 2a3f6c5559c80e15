"""docs/data.md, docs/ensembles.md and docs/inspect.md: every command and every Python block of a
page is run, in order, and gives what the page shows. Words, names, columns and counts agree
exactly, measured figures loosely."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from randsurgery.cli import ensemble, inspect
from randsurgery.cli.app import app, spread
from randsurgery.jobs import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "ensembles.md"
INSPECT = ROOT / "docs" / "inspect.md"
DATA = ROOT / "docs" / "data.md"
TOUR = ROOT / "docs" / "tour.md"


# --- the page ------------------------------------------------------------------------------------


@dataclass
class Step:
    """A command or a Python block, and the lines that the page shows below it."""

    kind: str  # "shell" or "python"
    source: str
    shown: list[str] = field(default_factory=list)


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """("text", lines) of each indented block, (language, lines) of each fenced one."""
    lines = [*text.splitlines(), ""]
    at = 0
    while at < len(lines):
        if lines[at].startswith("```"):
            end = lines.index("```", at + 1)
            yield lines[at][3:] or "text", lines[at + 1 : end]
            at = end
        elif lines[at].startswith("    "):
            start = at
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            found = "\n".join(line[4:] for line in lines[start:at]).rstrip()
            yield "text", found.split("\n")
            continue
        at += 1


def steps(text: str) -> list[Step]:
    """What the page tells its reader to run. A block without a command is what the Python block
    before it prints; one in another language is only looked at."""
    found: list[Step] = []
    for language, lines in blocks(text):
        if language == "python":
            found.append(Step("python", "\n".join(lines) + "\n"))
        if language != "text":
            continue
        open_end = False
        for line in lines:
            if line.startswith("$ "):
                found.append(Step("shell", line[2:]))
            elif open_end:
                found[-1].source += "\n" + line
            else:
                found[-1].shown.append(line)
            open_end = (line.startswith("$ ") or open_end) and line.endswith("\\")
    return found


# --- running it ----------------------------------------------------------------------------------


ASK = "; echo $?"
"""Behind a command: its exit code is printed."""


@dataclass
class Reader:
    """Somebody who types what the page says, in one folder and one Python session."""

    names: dict[str, Any] = field(default_factory=dict)

    def run(self, step: Step) -> str:
        """What a terminal would show."""
        if step.kind == "python":
            return self.python(step.source)
        command = step.source.replace("\\\n", " ")
        if not command.startswith("randsurgery "):
            done = subprocess.run(
                command, shell=True, check=True, capture_output=True, text=True, timeout=60
            )
            return done.stdout
        asked = command.endswith(ASK)
        with interrupted(step):
            typed = shlex.split(command.removesuffix(ASK))[1:]
            result = CliRunner().invoke(app, list(spread(typed)))
        if asked:
            return f"{result.output}{result.exit_code}\n"
        assert ended_as_shown(step, result.exit_code), (step.source, result.output)
        return result.output

    def python(self, source: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "page", "exec"), self.names)
        return printed.getvalue()


def ended_as_shown(step: Step, code: int) -> bool:
    """True if the exit code is that of what the page shows."""
    if any(line.startswith("^C") for line in step.shown):
        return code == 130
    return (code != 0) == any(line.startswith("error: ") for line in step.shown)


@contextlib.contextmanager
def interrupted(step: Step) -> Iterator[None]:
    """Ctrl-C where the page has ^C: in the epoch after the last that is shown."""
    before = [line for line, then in itertools.pairwise(step.shown) if then.startswith("^C")]
    if not before:
        yield
        return
    stage, epoch = re.match(r"(\w+): epoch (\d+),", before[0]).groups()  # type: ignore[union-attr]
    write = runs.write_state

    def write_and_stop(path: Path, state: Any, run: Any) -> None:
        write(path, state, run)
        if path.name.startswith(f"{stage}.") and state.epoch == int(epoch):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "write_state", write_and_stop)
        yield


# --- comparing -----------------------------------------------------------------------------------

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
UNITS = ("B", "kB", "MB", "GB")


def same(shown: list[str], printed: str) -> str:
    """What is wrong, or nothing. A line of the page may be folded to fit it; ``...`` stands for any
    number of lines."""
    rest = [line.removeprefix("^C") for line in shown if line.strip()]
    actual = [line for line in printed.splitlines() if line.strip()]
    skip = False
    while rest:
        if rest[0] == "...":
            skip, rest = True, rest[1:]
            continue
        if not actual:
            return f"the page has a line more: {rest[0]!r}"
        taken = folded(rest, actual[0])
        if taken:
            rest, skip = rest[taken:], False
        elif not skip:
            return f"the page has {rest[0]!r}, found {actual[0]!r}"
        actual = actual[1:]
    return "" if skip or not actual else f"the page lacks {actual[0]!r}"


def folded(shown: list[str], line: str) -> int:
    """How many of the next lines of the page are that line; 0 if they are not."""
    words = line.split()
    for taken in range(1, len(shown) + 1):
        found = " ".join(shown[:taken]).split()
        if len(found) >= len(words):
            return taken if same_words(found, words) else 0
    return 0


def same_words(shown: list[str], words: list[str]) -> bool:
    """The same words; of a line that says which epoch was kept any number, which is measured."""
    if len(shown) != len(words):
        return False
    if "kept:" in words:
        return NUMBER.sub("#", " ".join(shown)) == NUMBER.sub("#", " ".join(words))
    units = [*words[1:], ""]
    return all(same_word(a, b, u) for a, b, u in zip(shown, words, units, strict=True))


def same_word(shown: str, word: str, following: str = "") -> bool:
    """The same but for measured figures, which have a point: bytes within a twentieth, others
    within 0.4, or a third if that is more; but for whole numbers with a comma, which are bytes,
    too; and for whole percentages, which may be 15 off. Rules of a table may differ in length."""
    if set(shown) == set(word) == {"─"}:
        return True
    if shown.count(",") > 4:
        return same_row(shown.split(","), word.split(","))
    if NUMBER.sub("#", shown) != NUMBER.sub("#", word):
        return False
    for one, other in zip(NUMBER.findall(shown), NUMBER.findall(word), strict=True):
        a, b = (float(number.replace(",", "")) for number in (one, other))
        percent = 15.0 if shown.endswith("%") and "." not in shown else 0.0
        if abs(a - b) > max(percent, tolerance(one, following)):
            return False
    return True


def tolerance(number: str, following: str) -> float:
    """How far a figure of the page may be from the one that is found."""
    value = float(number.replace(",", ""))
    if following in UNITS or "," in number:
        return 0.05 * value
    return max(0.4, value / 3) if "." in number else 0.0


def same_row(shown: list[str], found: list[str]) -> bool:
    """A row of a CSV: the path agrees, what the networks say of it need not."""
    if shown[0] == "path":
        return shown == found
    numbers = all(NUMBER.fullmatch(cell) for cell in found[2:])
    return shown[0] == found[0] and len(shown) == len(found) and numbers


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("page", "picture"),
    [(PAGE, "ensembles.png"), (INSPECT, "weights.png"), (DATA, "confusion.png")],
    ids=lambda p: Path(p).stem,
)
def test_a_page_shows_what_its_commands_print(
    page: Path, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = Reader()
    for step in steps(page.read_text(encoding="utf-8")):
        wrong = same(step.shown, printed := reader.run(step))
        assert not wrong, f"{step.source}\n{wrong}\n\n{printed}"
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("page", "group", "blocks_of_python"), [(PAGE, ensemble.app, 3), (INSPECT, inspect.app, 1)]
)
def test_a_page_uses_every_command(page: Path, group: typer.Typer, blocks_of_python: int) -> None:
    found, name = steps(page.read_text(encoding="utf-8")), page.stem.removesuffix("s")
    used = {step.source.split()[2] for step in found if f" {name} " in step.source}
    assert used == {command.name for command in group.registered_commands}
    assert sum(step.kind == "python" for step in found) >= blocks_of_python


@pytest.mark.parametrize("page", [PAGE, INSPECT, DATA], ids=lambda p: Path(p).stem)
def test_a_page_fits_80_columns(page: Path) -> None:
    lines = [line for _, lines in blocks(page.read_text(encoding="utf-8")) for line in lines]
    assert [line for line in lines if len(line) > 80] == []


def part(page: Path, title: str) -> list[Step]:
    text = page.read_text(encoding="utf-8")
    return steps(text.split(f"## {title}\n")[1].split("\n## ")[0])


@pytest.mark.usefixtures("one_thread")
def test_the_tour_shows_what_its_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [*part(TOUR, "A plan"), *part(TOUR, "A report")]
    assert len(found) == 3
    for step in found:
        assert not same(step.shown, printed := Reader().run(step)), f"{step.source}\n{printed}"


@pytest.mark.parametrize(
    ("title", "page", "commands"), [("An ensemble", PAGE, 2), ("Your own images", DATA, 1)]
)
def test_the_tour_shows_what_the_page_shows(title: str, page: Path, commands: int) -> None:
    there = {step.source: step.shown for step in steps(page.read_text(encoding="utf-8"))}
    here = part(TOUR, title)
    assert len(here) >= commands
    for step in here:
        assert same(step.shown, "\n".join(there[step.source])) == ""


def test_the_readme_is_short_and_shows_what_the_tour_shows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    there = {step.source: step.shown for step in steps(TOUR.read_text(encoding="utf-8"))}
    here = part(ROOT / "README.md", "Four commands")
    assert len(here) == 4
    for step in here:
        assert same(step.shown, "\n".join(there[step.source])) == ""


@pytest.mark.usefixtures("one_thread")
def test_the_readme_says_what_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (step,) = (one for one in part(ROOT / "README.md", "In Python") if one.kind == "python")
    assert len([line for line in step.source.splitlines() if line]) <= 8
    Reader().run(step)
    assert (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ("m0 0.9000 16.30 kB", "m0   0.8817   16.90 kB"),
        ("360 images", "360 images"),
        ("header 3,936", "header 3,952"),
        ("──── ──", "── ────"),
        ("accuracy 97.50%", "accuracy 81.00%"),
        ("by filter 22-70%", "by filter 33-67%"),
        ("kept: epoch 6, the best", "kept: epoch 7, the best"),
        ("path,class,a,b,c,d", "path,class,a,b,c,d"),
        ("x.png,3,0.1,0.2,0.3,0", "x.png,4,0.9,1e-05,1.3,0.4"),
    ],
)
def test_figures_may_differ(shown: str, found: str) -> None:
    assert same([shown], found) == ""


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ("m0 0.9000", "m1 0.9000"),
        ("m0 0.9000", "m0 0.4000"),
        ("m0 0.9000", "m0 nan"),
        ("5 members", "4 members"),
        ("16.30 kB", "16.30 MB"),
        ("header 3,936", "header 4,936"),
        ("header 3,936", "header 936"),
        ("16.30 kB", "18.30 kB"),
        ("accuracy 97.50%", "accuracy 9.00%"),
        ("accuracy NLL", "NLL accuracy"),
        ("by filter 22-70%", "by filter 22-90%"),
        ("filters 10/25", "filters 11/25"),
        ("kept: epoch 6, the best", "kept: epoch 6, the last"),
        ("path,class,a,b,c,d", "path,class,a,b,c,e"),
        ("x.png,3,0.1,0.2,0.3,0", "y.png,3,0.1,0.2,0.3,0"),
        ("x.png,3,0.1,0.2,0.3,0", "x.png,3,0.1,nan,0.3,0"),
        ("one line", "one line\nand another"),
        ("one line", ""),
    ],
)
def test_words_and_counts_may_not(shown: str, found: str) -> None:
    assert same([shown], found) != ""


def test_a_page_may_fold_lines_and_leave_some_out() -> None:
    printed = "a\nb 1\nerror: this is long\nc\n"
    assert same(["a", "...", "error: this", "is long", "c"], printed) == ""
    assert same(["a", "..."], printed) == ""
    assert same(["a", "...", "error: this", "is short", "c"], printed) != ""
    assert same(["a", "...", "d"], printed) != ""


def test_steps_are_read_off_a_page() -> None:
    text = (
        "Prose.\n\n    $ one a \\\n        b\n    said\n\n    more\n    $ two\n\n"
        "```tree\nfolder\n```\n\n```python\nprint(1)\n```\n\nprints\n\n    1\n"
    )
    assert steps(text) == [
        Step("shell", "one a \\\n    b", ["said", "", "more"]),
        Step("shell", "two"),
        Step("python", "print(1)\n", ["1"]),
    ]
