"""What every command shares: errors to exit codes, output, configuration files, option types."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from randsurgery.errors import OutputError, RandsurgeryError, UsageError, near

if TYPE_CHECKING:
    from randsurgery.jobs.inputs import Shown
    from randsurgery.training.folders import Part

F = TypeVar("F", bound=Callable[..., Any])

INTERRUPTED = 130
BUG = 70
"""As sysexits.h has it: an internal software error."""


@dataclass
class Verbosity:
    """-q sets it to 0 (results and errors), -v to 2; 1 otherwise."""

    level: int = 1


verbosity = Verbosity()


def out() -> Console:
    """Data: stdout. Plain in a pipe; names from files are never read as markup."""
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    """Messages: stderr."""
    return Console(
        stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty()
    )


def note(message: str) -> None:
    """A message for people, on stderr; silent with -q."""
    if verbosity.level >= 1:
        err().print(Text(message))


def fail(message: str) -> None:
    """An error: one line on stderr."""
    err().print(Text(f"error: {clean(message)}"))


def detail(message: str) -> None:
    """A message that only -v asks for, on stderr."""
    if verbosity.level >= 2:
        err().print(Text(message))


def clean(text: str) -> str:
    """Text from a file or dataset, control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def drop_stdout() -> None:
    """Send what stdout still holds nowhere, so that the interpreter does not fail to flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def size(count: float) -> str:
    """Bytes for people: 2.92 MB (decimal)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1000
    raise AssertionError


def bug(error: Exception) -> int:
    """Tell of an error that nobody foresaw; its exit code. What ran out of memory is none of ours.

    The parser's own exceptions are raised again.
    """
    if isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message"):
        raise error
    detail("".join(traceback.format_exception(error)))
    said = str(error).strip().partition("\n")[0][:200]
    if isinstance(error, MemoryError) or "out of memory" in said or "allocate memory" in said:
        fail("out of memory; a smaller --batch-size, --img-size or network takes less")
        return UsageError.exit_code
    hint = "" if verbosity.level >= 2 else ", with what -v shows"
    fail(f"a bug of ours ({type(error).__name__}: {said}); please report it{hint}")
    return BUG


def command(function: F) -> F:
    """Turn errors into one line on stderr and their exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            found = function(*args, **kwargs)
            sys.stdout.flush()
            return found
        except RandsurgeryError as error:
            detail(traceback.format_exc())
            fail(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as error:
            err().print(Text(clean(str(error)) or "interrupted; nothing was written"))
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            drop_stdout()  # the reader has gone
            raise typer.Exit(0) from None
        except OSError as error:  # files' own errors were named where they arose
            drop_stdout()
            detail(traceback.format_exc())
            fail(f"the output cannot be written ({error.strerror or error})")
            raise typer.Exit(OutputError.exit_code) from None
        except Exception as error:
            raise typer.Exit(bug(error)) from None

    return wrapped  # type: ignore[return-value]


def _set_quiet(value: bool) -> None:
    if value:
        verbosity.level = 0


def _set_verbose(value: bool) -> None:
    if value:
        verbosity.level = 2


def _load_config(context: typer.Context, path: str | None) -> str | None:
    """Make a YAML file's values the command's defaults; the command line wins."""
    if path is None:
        return None
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold option names with values")
    known = {
        option.lstrip("-").replace("-", "_"): p
        for p in context.command.params
        if p.name
        for option in (p.name, *p.opts)
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in known or name == "config":
            hint = near(name, known)
            raise typer.BadParameter(f"{path} has unknown option {str(key)!r}{hint}")
        parameter = known[name]
        several = getattr(parameter, "multiple", False)
        value = [value] if several and not isinstance(value, list) else value
        defaults[str(parameter.name)] = str(value) if isinstance(value, float) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def split_of(name: str) -> Part:
    """The split that is asked for, under any of its names. Raises UsageError."""
    from randsurgery.training.folders import SPLIT_NAMES

    for part, names in SPLIT_NAMES.items():
        if name.lower() in names:
            return part
    raise UsageError(
        f"unknown --split {name!r}, expected test, validation or train" + near(name, SPLIT_NAMES)
    )


def say_shown(shown: Shown, fell_back: str, left_out: int, flattering: bool) -> None:
    """What there is to know of the images that a network was shown."""
    if shown.fell_back:
        note(f"no dataset given or recorded: {fell_back}")
    if shown.told:
        note(shown.told)
    if shown.assumed:
        note(shown.assumed)
    if left_out:
        note(f"left out: {left_out:,} images that a temperature was fitted on")
    if flattering:
        note("a temperature was fitted on these images: its figures are too good")


def parse_pairs(items: list[str], what: str) -> dict[str, bool | int | float | str | None]:
    """``key=value`` options; values as YAML reads them. Raises UsageError."""
    import yaml

    found: dict[str, bool | int | float | str | None] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"{what} must be KEY=VALUE, found {item!r}")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"{what} {key} has a value that is not YAML: {value!r}") from None
    return found


def model_arguments(
    pairs: list[str] | None, **given: int | float | None
) -> dict[str, bool | int | float | str | None]:
    """``--model-kwargs`` and the arguments that have options of their own, those that were given.
    Raises UsageError."""
    found = parse_pairs(pairs or [], "--model-kwargs")
    return {**found, **{key: value for key, value in given.items() if value is not None}}


# --- options -------------------------------------------------------------------------------------

TRAINING, DATA, OUTPUT, MODEL = "Training", "Data", "Output", "Model"

Quiet = Annotated[
    bool,
    typer.Option(
        "-q",
        "--quiet",
        help="No messages: results and errors only.",
        callback=_set_quiet,
        rich_help_panel=OUTPUT,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "-v",
        "--verbose",
        help="Show resolved settings, and where an error arose.",
        callback=_set_verbose,
        rich_help_panel=OUTPUT,
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        "-c",
        "--config",
        metavar="FILE.yaml",
        is_eager=True,
        callback=_load_config,
        help="Option values as defaults; the command line wins.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=OUTPUT)
]
Depth = Annotated[
    int | None,
    typer.Option(
        "--depth",
        min=0,
        help="Rows of names cut to so many parts; 0: every name. Default: some 40 rows.",
        rich_help_panel=OUTPUT,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Overwrite an existing file.", rich_help_panel=OUTPUT)
]
Output = Annotated[
    str | None,
    typer.Option("-o", "--output", metavar="FILE", help="File to write.", rich_help_panel=OUTPUT),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check and show, write nothing.", rich_help_panel=OUTPUT),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N, mps.", rich_help_panel=TRAINING)
]
InitOption = Annotated[
    str | None,
    typer.Option(
        "--init",
        metavar="NAME",
        help="signed-constant (default where masks are learned), kaiming-normal (where weights "
        "are), kaiming-uniform, xavier-normal, xavier-uniform or xavier-constant.",
        rich_help_panel=MODEL,
    ),
]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained", help="Start from timm's weights.", rich_help_panel=MODEL),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        help="Start from dense weights: .safetensors, .pth, the index of a sharded one, a folder.",
        rich_help_panel=MODEL,
    ),
]
EmaOption = Annotated[
    bool,
    typer.Option(
        "--ema",
        help="Of a checkpoint that has both, the moving average of the weights.",
        rich_help_panel=MODEL,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="FILE",
        help="The base checkpoint a file builds on, if it does not lie beside it.",
        rich_help_panel=MODEL,
    ),
]
Width = Annotated[
    float | None,
    typer.Option(help="Width multiplier of conv2 .. conv8.", rich_help_panel=MODEL),
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-kwargs",
        metavar="KEY=VALUE",
        help="Model argument, repeatable.",
        rich_help_panel=MODEL,
    ),
]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", min=1, help="Classes.", rich_help_panel=DATA)
]
ImgSize = Annotated[
    int | None,
    typer.Option("--img-size", min=1, help="Image size in pixels.", rich_help_panel=DATA),
]
InChans = Annotated[
    int | None,
    typer.Option("--in-chans", min=1, help="Image channels.", rich_help_panel=DATA),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="digits, or timm's torch/NAME or hfds/NAME. Default: what the file records, else "
        "digits.",
        rich_help_panel=DATA,
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Where the dataset lies; alone, a folder of images: train/CLASS, and test/CLASS or "
        "validation/CLASS, or labels.csv.",
        rich_help_panel=DATA,
    ),
]  # fmt: skip
CropPct = Annotated[
    float | None,
    typer.Option(
        "--crop-pct",
        help="Evaluation: the share of the shorter side that is kept.",
        rich_help_panel=DATA,
    ),
]
Interpolation = Annotated[
    str | None,
    typer.Option(help="bicubic, bilinear or nearest.", rich_help_panel=DATA),
]
AnyClasses = Annotated[
    bool,
    typer.Option(
        "--any-classes",
        help="Take a dataset whose classes have other names than the file's, by their numbers.",
        rich_help_panel=DATA,
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad", help="Go on without images that cannot be read.", rich_help_panel=DATA
    ),
]
Split = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="test, validation (a folder's, or what training held out) or train.",
        rich_help_panel=DATA,
    ),
]
Download = Annotated[
    bool,
    typer.Option("--dataset-download", help="Fetch the dataset if missing.", rich_help_panel=DATA),
]
Workers = Annotated[
    int | None,
    typer.Option("-j", "--workers", min=0, help="Loader processes.", rich_help_panel=DATA),
]
BatchSize = Annotated[
    int | None,
    typer.Option("-b", "--batch-size", min=1, help="Images a step.", rich_help_panel=TRAINING),
]
Amp = Annotated[
    bool | None, typer.Option("--amp", help="bfloat16 autocast.", rich_help_panel=TRAINING)
]
