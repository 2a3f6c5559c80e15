"""``randsurgery popup``: find a subnetwork of a random (or dense) network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from randsurgery.cli import common
from randsurgery.cli.common import command
from randsurgery.cli.options import RunOptions, plan_of, takes_run_options

if TYPE_CHECKING:
    from randsurgery.jobs.popup import FixedMasks
    from randsurgery.surgery.popup import Popup
    from randsurgery.surgery.supermask import Supermask

MASK = "Mask"


@command
@takes_run_options()
def popup(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A timm architecture or a file of init.")
    ],
    *,
    algorithm: Annotated[
        str,
        typer.Option(
            help="edge-popup, or supermask (Zhou et al.; --lr 200, with --rescale 50, and --wd 0 "
            "unless given).",
            rich_help_panel=MASK,
        ),
    ] = "edge-popup",
    k: Annotated[
        str | None,
        typer.Option(
            "--k", help="Share of weights kept, (0, 1]; default 0.3.", rich_help_panel=MASK
        ),
    ] = None,
    k_for: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=K",
            help="Layers that keep another share; the last match decides; repeatable.",
            rich_help_panel=MASK,
        ),
    ] = None,
    scaled: Annotated[
        bool,
        typer.Option("--scaled", help="Weights times 1/sqrt(k).", rich_help_panel=common.MODEL),
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layers left dense and frozen (their running statistics still follow the data); "
            "repeatable.",
            rich_help_panel=MASK,
        ),
    ] = None,
    learn: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layers learned beside the mask, such as @norm or @head; repeatable.",
            rich_help_panel=MASK,
        ),
    ] = None,
    mask: Annotated[
        str, typer.Option(help="learned, or random: the baseline.", rich_help_panel=MASK)
    ] = "learned",
    rescale: Annotated[
        bool,
        typer.Option(
            "--rescale", help="supermask: weights times all / kept.", rich_help_panel=MASK
        ),
    ] = False,
    final: Annotated[
        str | None,
        typer.Option(
            help="supermask: the mask at the end, by threshold or one sample.",
            rich_help_panel=MASK,
        ),
    ] = None,
    mask_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Take the masks of a file, on these weights: the re-initialised ticket.",
            rich_help_panel=MASK,
        ),
    ] = None,
    rethreshold: Annotated[
        str | None,
        typer.Option(
            metavar="K",
            help="Choose masks anew from the scores that SOURCE has; nothing is learned.",
            rich_help_panel=MASK,
        ),
    ] = None,
    save_scores: Annotated[
        bool,
        typer.Option("--save-scores", help="Keep the scores in the file.", rich_help_panel=MASK),
    ] = False,
    run: RunOptions,
) -> None:
    """Learn which weights of a network to keep (edge-popup, Ramanujan et al.; supermasks, Zhou et
    al.), or put known masks on it.

    Without a dataset this runs offline on digits: real 8x8 scans, shown at 32x32.
    """
    from randsurgery.cli import running
    from randsurgery.jobs.popup import PopupPlan, popup_facts, prepare_popup, run_popup
    from randsurgery.surgery.popup import Popup

    wish = wish_of(
        {
            "--algorithm": algorithm,
            "--k": k,
            "--k-for": tuple(_pair(one) for one in k_for or ()),
            "--scaled": scaled,
            "--skip": tuple(skip or ()),
            "--learn": tuple(learn or ()),
            "--mask": mask,
            "--rescale": rescale,
            "--final": final,
            "--mask-from": mask_from,
            "--rethreshold": rethreshold,
        },
        run.seed,
    )
    share = wish.share if scaled and isinstance(wish, Popup) else None
    job = prepare_popup(PopupPlan(plan_of(source, run, share), wish, save_scores))
    running.show(job.run, run, lambda: popup_facts(job), lambda hooks: run_popup(job, hooks))


def _pair(text: str) -> tuple[str, str]:
    from randsurgery.errors import UsageError

    pattern, equals, k = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--k-for must be PATTERN=K, found {text!r}")
    return pattern, k


# what goes with what: the options of each way to find masks, besides --learn
GOES_WITH = {
    "--mask-from": {"--mask-from"},
    "--rethreshold": {"--rethreshold", "--k-for"},
    "--algorithm supermask": {"--skip", "--rescale", "--final"},
    "--algorithm edge-popup": {"--k", "--k-for", "--scaled", "--skip", "--mask"},
}


def wish_of(given: dict[str, Any], seed: int) -> Popup | Supermask | FixedMasks:
    """How masks are found. Raises UsageError for options that do not go together."""
    from randsurgery.errors import UsageError
    from randsurgery.jobs.popup import FixedMasks
    from randsurgery.surgery.initialisers import parse_fraction
    from randsurgery.surgery.popup import Popup, check_mask_kind
    from randsurgery.surgery.supermask import Supermask, check_final

    algorithm = given["--algorithm"]
    if algorithm not in ("edge-popup", "supermask"):
        raise UsageError(f"unknown --algorithm {algorithm!r}, expected edge-popup or supermask")
    fixed = [name for name in ("--mask-from", "--rethreshold") if given[name] is not None]
    way = fixed[0] if fixed else f"--algorithm {algorithm}"
    unset = (None, False, (), "learned")
    told = {name for name, value in given.items() if value not in unset and value != "edge-popup"}
    allowed = GOES_WITH[way] | {"--learn"} | (set() if fixed else {"--algorithm"})
    if strange := sorted(told - allowed):
        raise UsageError(f"{strange[0]} does not go with {way}")
    learn, k_for, scoring = given["--learn"], given["--k-for"], {"skip": given["--skip"]}
    if fixed:
        k = given["--rethreshold"]
        k = None if k is None else parse_fraction(k, "--rethreshold")
        return FixedMasks(seed=seed, learn=learn, mask_from=given["--mask-from"], k=k, k_for=k_for)
    if algorithm == "supermask":
        final = check_final(given["--final"] or "threshold")
        return Supermask(seed=seed, learn=learn, rescale=given["--rescale"], final=final, **scoring)
    kind = check_mask_kind(given["--mask"])
    k = given["--k"] or "0.3"
    return Popup(k, k_for=k_for, seed=seed, learn=learn, mask=kind, **scoring)
