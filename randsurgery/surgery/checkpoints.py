"""What training programs write: where the weights lie, and what stands before their names.

docs/checkpoints.md is the table of it. Nothing here opens a file, and nothing is guessed: what a
file holds beside the weights that are taken is said in a note, and where two things could be meant
neither is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch

from randsurgery.errors import FileFormatError, IncompatibleError, UsageError, near
from randsurgery.format.recognise import SAVE_STATE
from randsurgery.surgery.pickles import Skipped

# --- where the weights lie ------------------------------------------------------------------------

WEIGHTS = (
    "state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module",
)  # fmt: skip
"""Under what names programs save a state dict, beside other things."""
AVERAGED = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "params_ema",
    "ema_model",
)  # fmt: skip
"""Under what names they save the moving average of the weights."""


@dataclass(frozen=True)
class State:
    """A state dict. ``about``: what lay beside it; ``skipped``: what in it is no tensor, with its
    class; ``notes``: what the user is to know."""

    tensors: dict[str, torch.Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def state_of(found: Any, file: str, *, ema: bool = False) -> State:
    """The state dict in what torch.save wrote: the weights, or with ``ema`` their average.

    Raises FileFormatError if there is none, or two that could be meant; UsageError for an average
    that is not there, or is all there is and was not asked for.
    """
    if not isinstance(found, dict):
        raise FileFormatError(f"{file}: holds no state dict but {_told(found)}")
    boxes = {key: value for key, value in found.items() if _is_state(value)}
    averaged = [key for key in boxes if key in AVERAGED]
    plain = [key for key in boxes if key in WEIGHTS]
    flat = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    if not plain and not averaged:
        if not any("." in str(key) or value.ndim for key, value in flat.items()) and boxes:
            plain = list(boxes)
        elif ema:
            raise UsageError(_no_average(file))
        elif flat:
            beside = {str(key): value for key, value in found.items() if key not in flat}
            return _state({k: v for k, v in found.items() if k in flat or "." in str(k)}, beside)
        else:
            raise FileFormatError(f"{file}: holds no state dict{_instead(found)}")
    others = [str(key) for key in boxes if key not in (*plain, *averaged)]
    if ema and not averaged:
        raise UsageError(_no_average(file))
    if not ema and not plain:
        raise UsageError(
            f"{file}: holds averaged weights alone ({', '.join(averaged)}); pass --ema to take them"
        )
    chosen = averaged if ema else plain
    if len(chosen) > 1:
        names = " and ".join(repr(key) for key in chosen[:2])
        raise FileFormatError(
            f"{file}: holds several state dicts, {names}; save the one that is meant alone: "
            f"torch.save(torch.load(FILE)[{chosen[0]!r}], OTHER)"
        )
    notes = _notes(file, chosen[0], [] if ema else averaged, plain if ema else [], others)
    about = {str(key): value for key, value in found.items() if key not in boxes}
    return _state(boxes[chosen[0]], about, notes)


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and any(isinstance(one, torch.Tensor) for one in value.values())
        and all(isinstance(key, str) for key in value)
    )


def _state(found: dict[Any, Any], about: dict[str, Any], notes: tuple[str, ...] = ()) -> State:
    tensors = {str(key): v for key, v in found.items() if isinstance(v, torch.Tensor)}
    skipped = {
        str(key): value.name or "an unknown class"
        for key, value in found.items()
        if isinstance(value, Skipped)
    }
    return State(tensors, about, skipped, notes)


def _notes(
    file: str, chosen: str, averaged: list[str], plain: list[str], others: list[str]
) -> tuple[str, ...]:
    notes = []
    if averaged:
        notes.append(
            f"{file}: averaged weights lie beside the others ({averaged[0]}); --ema takes them"
        )
    if plain:
        notes.append(f"{file}: the averaged weights are taken ({chosen}), not {plain[0]}")
    if others:
        notes.append(f"{file}: {chosen!r} is taken; beside it {', '.join(others)}, not read")
    return tuple(notes)


def _no_average(file: str) -> str:
    return f"--ema: {file} holds no averaged weights; leave the option out"


def _told(value: Any) -> str:
    """What was found in the place of a state dict."""
    if isinstance(value, Skipped):
        return f"a whole object of {value.name}; where its code is: {SAVE_STATE}"
    return f"a {type(value).__name__}, expected names with tensors"


def _instead(found: dict[Any, Any]) -> str:
    for key, value in found.items():
        if isinstance(value, Skipped) and key in (*WEIGHTS, *AVERAGED):
            return f": {key!r} is {_told(value)}"
    keys = ", ".join(repr(key) for key in list(found)[:6])
    return f", expected names with tensors; found {keys or 'nothing'}"


# --- what stands before the names -----------------------------------------------------------------

PREFIXES = ("module.", "model.", "net.", "network.", "backbone.")
"""What DataParallel, Lightning and wrappers of one's own put before every name."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put anywhere in a name."""
_WRAPPED = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")
_LEFTOVERS = ("n_averaged", "total_ops", "total_params")
"""Buffers that an averaged model and counters of operations leave in a state dict."""
_LOSSES = ("criterion", "loss", "loss_fn", "loss_func", "loss_function")
"""What the losses are called that a Lightning module keeps beside its network."""


@dataclass(frozen=True)
class Names:
    """``own``: the file's own name of each tensor, by its plain one; ``left_out``: the file's names
    of what belongs to no network; ``notes``: what was done."""

    own: dict[str, str]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plain_names(names: Iterable[str], known: Callable[[str], bool]) -> Names:
    """The names without what wrappers put before them, as far as the architecture, which ``known``
    asks for a plain name, knows more of them so; the fewest words are taken away."""
    own = {_WRAPPED.sub("", name): name for name in names}
    left = {n for n in own if not known(n) and _is_leftover(n)}
    kept = {name: full for name, full in own.items() if name not in left}
    best = max(_stripped(kept), key=lambda found: sum(map(known, found)))
    gone = _gone(best)
    notes = []
    if gone:
        notes.append(f"taken away before the names: {gone}")
    if left:
        notes.append(f"left out, no part of the network: {', '.join(sorted(left)[:3])}"
                     + (f" and {len(left) - 3} more" if len(left) > 3 else ""))  # fmt: skip
    return Names(best, tuple(own[name] for name in sorted(left)), tuple(notes))


def _stripped(names: dict[str, str]) -> Iterator[dict[str, str]]:
    """The names, then the same without a prefix that all of them bear, and so on."""
    yield names
    while first := next(
        (p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None
    ):
        names = {name[len(first) :]: full for name, full in names.items()}
        yield names


def _gone(names: Mapping[str, str]) -> str:
    """What the first name that lost something lost; "" if none did."""
    plain, full = next(((a, b) for a, b in names.items() if a != b), ("", ""))
    if full.endswith(plain):
        return full.removesuffix(plain)
    return ", ".join(word for word in WRAPPERS if word in full)


def _is_leftover(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in _LEFTOVERS or any(part in _LOSSES for part in parts[:2])


# --- the architecture's tensors -------------------------------------------------------------------

COUNT = "num_batches_tracked"


@dataclass(frozen=True)
class Own:
    """Where a tensor is in the file: under ``tensor``, and if it was pruned (torch.nn.utils.prune)
    zero where ``mask`` is."""

    tensor: str
    mask: str | None = None


@dataclass(frozen=True)
class Matched:
    """An architecture's tensors in a file. ``counts``: counts of batches that the file lacks, as
    torch wrote none before 0.4.1; 0, as torch itself reads them. ``notes``: what was done."""

    own: dict[str, Own]
    counts: tuple[str, ...]
    notes: tuple[str, ...]


def match(
    names: Iterable[str],
    wanted: Collection[str],
    file: str,
    arch: str,
    about: Mapping[str, Any],
    *,
    partly: bool = False,
) -> Matched:
    """The architecture's tensors in a file of those names. Raises IncompatibleError, both ways: a
    tensor that the architecture does not have, or one that the file lacks, unless it may
    (``partly``)."""
    plain = plain_names(names, lambda name: name in wanted or unpruned(name) in wanted)
    own, notes = dict(plain.own), list(plain.notes)
    masks = pruned(own, wanted)
    check_parametrizations(own, wanted, file)
    found = {name: Own(own[name]) for name in own if name in wanted}
    for name in masks:
        found[name] = Own(own.pop(f"{name}_orig"), own.pop(f"{name}_mask"))
    if masks:
        notes.append(pruning_note(masks))
    counts = missing_counts(found, wanted)
    if counts and not partly:
        notes.append(counts_note(counts))
    extra = sorted(set(own) - set(wanted))
    missing = [] if partly else sorted(set(wanted) - set(found) - set(counts))
    if extra or missing:
        raise IncompatibleError(
            f"{file}: {_unfit(extra, missing, own, wanted, arch)}" + says_arch(about, arch)
        )
    return Matched(found, counts, tuple(notes))


def _unfit(
    extra: list[str], missing: list[str], own: Mapping[str, str], wanted: Collection[str], arch: str
) -> str:
    """What does not fit, both ways, each with the first few names."""
    told = []
    if extra:
        first = own[extra[0]]
        told.append(f"tensor {first!r} is not one of {arch}{_more(extra, 'nor are', own)}")
    if missing:
        more = _more(missing, "and", {})
        told.append(f"lacks {missing[0]!r}{'' if extra else f' of {arch}'}{more}")
    if partly := prefix_hint(own, wanted):
        return "; it ".join(told) + partly
    return "; it ".join(told) + (near(extra[0], wanted) if extra else near(missing[0], own))


def prefix_hint(own: Collection[str], wanted: Collection[str]) -> str:
    """What there is to say where a prefix would make most names fit, but some do not bear it, or
    several prefixes would."""
    fitting = Counter(name.partition(".")[0] for name in own if name.partition(".")[2] in wanted)
    whole = sorted(f"{first}." for first, count in fitting.items() if count > len(wanted) * 0.9)
    if len(whole) > 1:
        return (
            f"; it holds several networks, under {' and '.join(map(repr, whole))}: save the one "
            "that is meant alone, without the prefix"
        )
    for prefix in PREFIXES:
        bearing = [n for n in own if n.startswith(prefix) and n[len(prefix) :] in wanted]
        if len(bearing) > len(own) // 2:
            others = len(own) - len(bearing)
            return (
                f"; all but {others} of its names fit without {prefix!r}: save the state dict of "
                "that inner module alone"
            )
    return ""


def _more(names: list[str], word: str, own: Mapping[str, str]) -> str:
    """ ", nor are 12 others ('a', 'b', ...)", or nothing."""
    rest = [repr(own.get(name, name)) for name in names[1:]]
    if not rest:
        return ""
    shown = ", ".join(rest[:2]) + (", ..." if len(rest) > 2 else "")
    comma = "," if word != "and" else ""
    return f"{comma} {word} {len(rest)} other{'s' if len(rest) > 1 else ''} ({shown})"


def unpruned(name: str) -> str:
    """The name of the weight that a name of torch.nn.utils.prune is of."""
    return name.removesuffix("_orig") if name.endswith("_orig") else name.removesuffix("_mask")


def pruned(names: Collection[str], wanted: Collection[str]) -> list[str]:
    """The tensors that a file holds as ``NAME_orig`` and ``NAME_mask``."""
    return [
        name
        for name in sorted(wanted)
        if name not in names and f"{name}_orig" in names and f"{name}_mask" in names
    ]


def pruning_note(masks: Collection[str]) -> str:
    """What there is to say of tensors that were pruned."""
    return (
        f"pruned by torch.nn.utils.prune: {len(masks)} of the tensors, zero where their masks are, "
        "which later training keeps"
    )


def missing_counts(found: Collection[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """The counts of batches that lack although the statistics beside them are there."""
    return tuple(
        name
        for name in sorted(wanted)
        if name.endswith(COUNT)
        and name not in found
        and f"{name.removesuffix(COUNT)}running_mean" in found
    )


def counts_note(counts: Collection[str]) -> str:
    """What there is to say of counts that were filled in."""
    return f"{len(counts)} counts of batches ({COUNT}) are missing; they are 0, as torch reads them"


_PARAMETRIZED = re.compile(r"^(?P<module>.*?)\.?parametrizations\.(?P<leaf>\w+)\.original\d*$")
_NORMED = (
    ("_g", "_v", "weight_norm", "torch.nn.utils.remove_weight_norm(module)"),
    ("_orig", "_u", "spectral_norm", "torch.nn.utils.remove_spectral_norm(module)"),
)


def check_parametrizations(names: Collection[str], wanted: Collection[str], file: str) -> None:
    """Raises IncompatibleError for weights that are computed from other tensors."""
    for name in sorted(names):
        if found := _PARAMETRIZED.match(name):
            raise IncompatibleError(
                f"{file}: {name!r} is a part of what a parametrization computes {found['leaf']} "
                "from; first take that off: torch.nn.utils.parametrize.remove_parametrizations("
                f"module, {found['leaf']!r})"
            )
    for name in sorted(set(wanted) - set(names)):
        for first, second, what, remedy in _NORMED:
            if {name + first, name + second} <= set(names):
                raise IncompatibleError(
                    f"{file}: {name} is computed by {what} from {name + first!r} and "
                    f"{name + second!r}; first take that off: {remedy}"
                )


def says_arch(about: Mapping[str, Any], arch: str | None = None) -> str:
    """A proposal, if what lies beside the weights names another of timm's architectures than
    ``arch``; else nothing."""
    said = about.get("arch")
    name = said.partition(".")[0] if isinstance(said, str) else ""
    if name in ("", arch) or not timm.is_model(name):
        return ""
    return f"; the checkpoint says it is of {name}"
