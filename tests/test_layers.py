"""The house: who may import whom, and what nobody may touch. Read from the syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import randsurgery

ROOT = Path(randsurgery.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

FLOORS = (
    ("_version",),
    ("errors",),
    ("format",),
    ("surgery",),
    ("training",),
    ("inspection", "jobs"),
    ("api",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    """``format.masks`` for randsurgery/format/masks.py, ``format`` for its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Every module imported anywhere in a file, inside functions too, as a dotted name."""

    def walk(node: ast.AST) -> Iterator[str]:
        if is_type_checking(node) and not for_types:
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def own_imports(path: Path) -> Iterator[str]:
    """The package's own modules that a file imports: ``format.masks``."""
    for name in imports(path):
        if name.split(".")[0] == "randsurgery":
            rest = name.removeprefix("randsurgery").lstrip(".")
            while rest and rest not in MODULES:  # cut the imported name off
                rest = rest.rpartition(".")[0]
            yield rest


def floor_of(module: str) -> int:
    return FLOOR[module.split(".")[0]]


def test_every_part_has_a_floor() -> None:
    assert {name.split(".")[0] for name in MODULES} - {""} <= set(FLOOR)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_go_down_only(name: str) -> None:
    part = name.split(".")[0]
    for found in own_imports(MODULES[name]):
        if not found:  # the package itself holds the version alone
            continue
        other = found.split(".")[0]
        lower = floor_of(found) < floor_of(name)
        assert lower or other == part, f"{name} imports {found}"


def test_importing_the_package_imports_the_version_alone() -> None:
    tree = imports(MODULES[""], for_types=False)
    assert [name for name in tree if name.startswith("randsurgery")] == [
        "randsurgery._version.__version__"
    ]


def listed(package: str) -> list[list[str]]:
    """The modules that a package's docstring lists, top down; those of one line are siblings."""
    text = ast.get_docstring(ast.parse(MODULES[package].read_text(encoding="utf-8"))) or ""
    found = []
    for line in text.splitlines():
        entry = re.fullmatch(r"\s*(\w+(?:, \w+)*)\s\s+\S.*", line)
        if entry:
            names = entry[1].split(", ")
            if all(f"{package}.{name}" in MODULES for name in names):
                found.append(names)
    return found


PACKAGES = ("format", "surgery", "training", "inspection", "jobs")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_docstring_lists_every_module(package: str) -> None:
    names = [name for line in listed(package) for name in line]
    there = {n.partition(".")[2] for n in MODULES if n.startswith(f"{package}.")}
    assert sorted(names) == sorted(there)


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_only_those_listed_above_them(package: str) -> None:
    rank = {name: number for number, line in enumerate(listed(package)) for name in line}
    for name, number in rank.items():
        for found in own_imports(MODULES[f"{package}.{name}"]):
            if found.startswith(f"{package}."):
                other = found.partition(".")[2]
                assert rank[other] < number, f"{package}.{name} imports {found}"


def test_commands_do_not_import_each_other() -> None:
    commands = {n for n in MODULES if n.startswith("cli.")} - {
        "cli.app",
        "cli.common",
        "cli.files",
        "cli.methods",
        "cli.options",
        "cli.predicting",
        "cli.render",
        "cli.running",
        "cli.tables",
        "cli.training",
        "cli.weight_tables",
    }
    for name in commands:
        assert not set(own_imports(MODULES[name])) & commands, name
    for shared in ("cli.render", "cli.tables"):
        assert set(own_imports(MODULES[shared])) & {*commands, "cli.app"} == set()


# --- who may import what from outside ------------------------------------------------------------


def importers(*packages: str) -> set[str]:
    return {
        name
        for name, path in MODULES.items()
        if {found.split(".")[0] for found in imports(path)} & set(packages)
    }


def parts(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_torch_stays_out_of_the_format_and_of_inspection() -> None:
    heavy = importers("torch", "timm", "torchvision", "sklearn")
    assert parts(heavy) <= {"surgery", "training", "jobs", "api"}


def test_printing_stays_in_the_command_line() -> None:
    assert parts(importers("rich", "typer")) == {"cli"}
    for name, path in MODULES.items():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printed = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printed, name


def test_benchmarks_and_internals_of_the_command_lines_library_are_not_imported() -> None:
    for name, path in MODULES.items():
        for found in imports(path):
            assert found.split(".")[0] not in ("click", "benchmarks", "tests"), name
            assert not found.startswith(("typer._", "typer.core", "typer.main")), name


def run(code: str) -> set[str]:
    """The top-level modules loaded after a piece of code, in a fresh interpreter."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "timm", "torchvision", "sklearn", "matplotlib", "numpy", "scipy", "pydantic"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not run("import randsurgery; randsurgery.__version__; dir(randsurgery)") & HEAVY


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from randsurgery.cli.app import app
for arguments in ([], ["popup"], ["inspect", "storage"], ["eval"]):
    try:
        app([*arguments, "--help"])
    except SystemExit as end:
        assert end.code == 0
"""
    assert not run(code) & (HEAVY - {"pydantic"})  # some releases of typer need it themselves


@pytest.mark.parametrize(
    "package",
    [
        "format.checkpoint",
        "inspection.storage",
        "inspection.verify",
        "inspection.model",
        "inspection.weight_plots",
    ],
)
def test_reading_a_file_imports_no_torch(package: str) -> None:
    loaded = run(f"import randsurgery.{package}")
    assert "numpy" in loaded
    assert not loaded & {"torch", "timm", "torchvision", "sklearn", "rich", "typer"}


# --- global generators ---------------------------------------------------------------------------

# where torch's global generators are used: always borrowed, never seeded for good
BORROWED = {
    "surgery.adaptation._loaded",
    "surgery.architectures.build_initialised",
    "surgery.bases.pretrained_base",
    "training.loop.fit",
    "training.augmentation.seeded",
    "training.optimisation.check_settings",
}
# where Python's and NumPy's are: saved before and restored after, around timm's transforms
LENT = {"training.augmentation.seeded"}
# what a training step draws, as dropout does, from the generator that ``fit`` borrows
SAMPLED = [("surgery.supermask_scores.SupermaskScores.choose", "torch.rand_like")]
DRAWS = re.compile(
    r"torch\.(rand\w*|normal|bernoulli|multinomial|manual_seed|seed|initial_seed"
    r"|(get|set)_rng_state)|torch\.cuda\.(manual_seed\w*|seed\w*|(get|set)_rng_state\w*)"
)


def calls(path: Path) -> Iterator[tuple[str, str]]:
    """(place, called name) of every call."""

    def walk(node: ast.AST, place: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            place = f"{place}.{node.name}"
        if isinstance(node, ast.Call):
            yield place, ast.unparse(node.func)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, place)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), module_name(path))


EVERY_CALL = [call for path in FILES for call in calls(path)]


def test_torchs_generators_are_borrowed_alone() -> None:
    assert [call for call in EVERY_CALL if DRAWS.fullmatch(call[1])] == SAMPLED
    assert {place for place, name in EVERY_CALL if name == "borrowed"} == BORROWED
    seeded = {place for place, name in EVERY_CALL if name.endswith("manual_seed")}
    assert seeded == {"surgery.randomness.borrowed"}


def test_numpys_and_pythons_generators_are_lent_in_one_place() -> None:
    numpy = {(p, n) for p, n in EVERY_CALL if n.startswith(("np.random.", "numpy.random."))}
    assert {name for place, name in numpy if place not in LENT} == {"np.random.Philox"}
    python = {place for place, name in EVERY_CALL if re.match(r"random\.\w+$", name)}
    assert python == LENT
    lent = {name for place, name in EVERY_CALL if place in LENT}
    assert {
        "random.getstate",
        "random.setstate",
        "np.random.get_state",
        "np.random.set_state",
    } <= lent
