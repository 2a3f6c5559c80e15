"""The program: its commands, and how it ends."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from randsurgery._version import __version__
from randsurgery.cli import (
    common,
    convert,
    diff,
    ensemble,
    evaluate,
    export,
    freeze,
    init,
    inspect,
    masks,
    popup,
    predict,
    together,
    train,
    weights,
)

EXIT_CODES = (
    "Exit codes: 0 done; 1 differences found; 2 usage; 3 unreadable or corrupt file; "
    "4 incompatible parts; 5 data; 6 disk or permission; 7 diverged; 70 a bug of ours; "
    "130 interrupted."
)

app = typer.Typer(
    name="randsurgery",
    help="A network is a seed plus a few bits: surgery on random and pretrained checkpoints.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"randsurgery {__version__}")
        raise typer.Exit()


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    common.verbosity.level = 1  # a command's own -q and -v come after this


app.command("init")(init.init)
app.command("freeze")(freeze.freeze)
app.command("train")(train.train)
app.command("popup")(popup.popup)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("export")(export.export)
app.command("convert")(convert.convert)
ensemble.app.command("eval")(together.evaluate)
ensemble.app.command("predict")(together.predict)
ensemble.app.command("calibrate")(together.calibrate)
inspect.app.command("masks")(masks.masks)
inspect.app.command("diff")(diff.diff)
inspect.app.command("weights")(weights.weights)
app.add_typer(ensemble.app, name="ensemble")
app.add_typer(inspect.app, name="inspect")


SEVERAL = ("--decay-epochs", "--decay-milestones")
"""Options that take numbers until the next option, as timm's do."""


def spread(arguments: Sequence[str]) -> Iterator[str]:
    """``--decay-epochs 15 30`` as the parser knows it: the option again before each number."""
    option, values = "", 0
    for at, argument in enumerate(arguments):
        if argument == "--":
            yield from arguments[at:]
            return
        if argument.startswith("-"):
            option, values = argument, 0
        elif option in SEVERAL and argument.isdecimal():
            if values:
                yield option
            values += 1
        else:
            option = ""
        yield argument


def with_value(message: str, arguments: Sequence[str]) -> str:
    """The parser's complaint about an option, with the value that it found."""
    about = re.match(r"Invalid value for (.*?): ", message)
    names = re.findall(r"--?[A-Za-z][\w-]*", about[1]) if about else []
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names and (equals or at + 1 < len(arguments)):
            found = value if equals else arguments[at + 1]
            return message if found in message else f"{message.rstrip('.')}, found {found[:80]!r}"
    return message


def main() -> None:
    """Run the command line. What the parser refuses is one line, like every other error."""
    try:
        code = app(list(spread(sys.argv[1:])), standalone_mode=False)
    except typer.Abort:
        raise SystemExit(common.INTERRUPTED) from None
    except Exception as error:
        told = getattr(error, "format_message", None)
        if told is None:
            raise SystemExit(common.bug(error)) from None
        if message := told():  # without one, help was shown
            message = with_value(message, sys.argv[1:])
            path = getattr(getattr(error, "ctx", None), "command_path", "randsurgery")
            common.fail(f"{message.rstrip('.')}; see {path} --help")
        raise SystemExit(2) from None
    raise SystemExit(code)
