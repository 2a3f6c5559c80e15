"""The options of the ways to find masks, read off their fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from randsurgery.errors import UsageError
from randsurgery.jobs.methods import ALGORITHMS, METHODS
from randsurgery.surgery.method import Method

F = TypeVar("F", bound=Callable[..., Any])

MASK = "Mask"


def takes_method_options(function: F) -> F:
    """Give a command every option that some method has, which it receives by name, those that were
    given, as its argument ``given``."""
    options = _all_options()
    hints = get_type_hints(function, include_extras=True)
    own = inspect.signature(function).parameters.values()
    parameters = [
        p.replace(annotation=hints[p.name]) for p in own if p.name not in ("given", "algorithm")
    ]
    first = next(i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.KEYWORD_ONLY)
    parameters[first:first] = [ALGORITHM, *(_parameter(field) for field in options.values())]

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in options}
        given = {
            name: value
            for name, value in values.items()
            if value not in (None, False, [], options[name].default)
        }
        return function(*args, **kwargs, given=given)

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped  # type: ignore[return-value]


ALGORITHM = inspect.Parameter(
    "algorithm",
    inspect.Parameter.KEYWORD_ONLY,
    default="edge-popup",
    annotation=Annotated[
        str,
        typer.Option(
            help=f"{', or '.join(f'{m.name} ({m.paper})' for m in ALGORITHMS.values())}.",
            rich_help_panel=MASK,
        ),
    ],
)


def _options(method: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    """A method's options by name."""
    return {field.name: field for field in dataclasses.fields(method) if "help" in field.metadata}


def _all_options() -> dict[str, dataclasses.Field[Any]]:
    """Those of all methods, those that all have at the end."""
    found = {name: field for method in METHODS for name, field in _options(method).items()}
    common = {"skip", "learn"}
    return dict(sorted(found.items(), key=lambda option: option[0] in common))


@functools.cache
def _hints() -> dict[str, Any]:
    """The types of all options by name."""
    return {name: kind for method in METHODS for name, kind in get_type_hints(method).items()}


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """The option of a field: a flag, several values, or one as text."""
    kind, flag = _hints()[field.name], f"--{field.name.replace('_', '-')}"
    several = get_origin(kind) is tuple
    shown: Any = bool if kind is bool else (list[str] | None if several else str | None)
    about = typer.Option(
        flag,
        metavar=field.metadata["metavar"],
        help=field.metadata["help"],
        rich_help_panel=MASK,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if kind is bool else None,
        annotation=Annotated[shown, about],
    )


def method_of(algorithm: str | None, given: dict[str, Any], seed: int, scaled: bool) -> Method:
    """The method that the options choose. Raises UsageError for options that do not go together."""
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise UsageError(f"unknown --algorithm {algorithm!r}, expected {' or '.join(ALGORITHMS)}")
    by_option = [m for m in METHODS if m.chosen_by is not None and _name(m.chosen_by) in given]
    method = by_option[0] if by_option else ALGORITHMS[algorithm or "edge-popup"]
    way = method.chosen_by or f"--algorithm {method.name}"
    known = _options(method)
    told = {f"--{name.replace('_', '-')}": name in known for name in given}
    told["--scaled"] = not scaled or (hasattr(method, "share") and method.chosen_by is None)
    told["--algorithm"] = algorithm in (None, "edge-popup") or method.chosen_by is None
    if strange := sorted(option for option, goes in told.items() if not goes):
        raise UsageError(f"{strange[0]} does not go with {way}")
    values = {name: _value(name, value) for name, value in given.items()}
    for name, field in known.items():
        if name not in values and field.metadata["cli_default"] is not None:
            values[name] = field.metadata["cli_default"]
    return method(seed=seed, **values)


def _name(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def _value(name: str, value: Any) -> Any:
    """An option's value as its field has it."""
    kind = _hints()[name]
    if get_origin(kind) is not tuple:
        return value
    pairs = get_origin(get_args(kind)[0]) is tuple
    return tuple(_pair(name, one) for one in value) if pairs else tuple(value)


def _pair(name: str, text: str) -> tuple[str, str]:
    pattern, equals, k = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--{name.replace('_', '-')} must be PATTERN=K, found {text!r}")
    return pattern, k
