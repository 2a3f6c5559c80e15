"""``randsurgery ensemble``: many members over one backbone."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from randsurgery.cli import common, options
from randsurgery.cli.common import command, note, print_json
from randsurgery.cli.options import RunOptions, plan_of, takes_run_options

if TYPE_CHECKING:
    from randsurgery.jobs.members import Change, Incoming

app = typer.Typer(
    help="Cheap ensembles: members that share one backbone, in one file.", no_args_is_help=True
)


@app.command("build")
@command
@takes_run_options(without=("warmup_epochs", "plot", "log_to", "resume"))
def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="With --members: an architecture, a plan or a file to start from. Without: "
            "files of ours, whose members are packed into one, or dense weights (--arch).",
        ),
    ],
    members: Annotated[
        int | None,
        typer.Option("--members", help="Train so many members.", rich_help_panel=options.ENSEMBLE),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="What each member learns: fc (classifier and norms), share (a slice of every "
            "layer), full, popup (a mask). A plan says it itself. Of files that are packed: full, "
            "for those that share nothing.",
            rich_help_panel=options.ENSEMBLE,
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            help="share: the part of each layer's filters that all members have alike, such as "
            "0.9.",
            rich_help_panel=options.ENSEMBLE,
        ),
    ] = None,
    k: Annotated[
        str | None,
        typer.Option(
            "--k",
            help="popup: the part of the weights that a mask keeps; default 0.3.",
            rich_help_panel=options.ENSEMBLE,
        ),
    ] = None,
    warmup_epochs: Annotated[
        int,
        typer.Option(
            min=0,
            help="Epochs that train everything first, as the start that members share (not the "
            "learning rate's warm-up).",
            rich_help_panel=options.ENSEMBLE,
        ),
    ] = 0,
    reinit: Annotated[
        bool,
        typer.Option(
            "--reinit",
            help="Members start from weights of their own seeds in what they learn.",
            rich_help_panel=options.ENSEMBLE,
        ),
    ] = False,
    name: options.Names = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="The architecture of dense files that are packed.", rich_help_panel=common.MODEL
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto",
            help="auto: go on with the member at which a build was stopped.",
            rich_help_panel=common.TRAINING,
        ),
    ] = None,
    *,
    run: RunOptions,
) -> None:
    """Train N members that share one backbone, or pack files into one.

    As in Section 4.3 of Rosenfeld & Tsotsos. Member i, from 0 on, trains with
    the seed --seed + i: an order, augmentation and scores of its own.
    """
    from randsurgery.errors import UsageError
    from randsurgery.jobs.build import BuildPlan

    if members is None:
        other = None if kind == "full" else kind
        told = {"--kind": other, "--share": share, "--k": k, "--warmup-epochs": warmup_epochs,
                "--reinit": reinit, "--resume": resume}  # fmt: skip
        if given := [option for option, value in told.items() if value] + _of_training(run):
            raise UsageError(f"{given[0]} goes with --members N, which trains; files are packed")
        _pack(sources, name, arch, run, whole=kind == "full")
        return
    if len(sources) != 1:
        raise UsageError(f"--members trains from one source, found {len(sources)}")
    if arch is not None:
        raise UsageError("--arch goes with dense files that are packed")
    plan = replace(plan_of(sources[0], run), resume=resume)
    _train(BuildPlan(plan, members, kind, share, k, warmup_epochs, reinit, tuple(name or ())), run)


def _train(plan: Any, run: RunOptions) -> None:
    from randsurgery.cli import render
    from randsurgery.jobs.build import build_facts, prepare_build, run_build

    job = prepare_build(plan)
    for line in job.job.notes:
        note(line)
    with job.job.checkpoint:
        facts = build_facts(job)
        if run.dry_run:
            if run.json:
                print_json(facts)
            else:
                render.show_pairs([(key, render.plain(value)) for key, value in facts.items()])
            return
        for key, value in facts.items():
            common.detail(f"{key}: {value}")
        with render.stages_progress(job.job.settings.epochs) as hooks:
            built = run_build(job, hooks)
    _show(str(built.path), run.json, {"metrics": built.records})
    note(f"written and verified: {built.path}")


_PACKING = ("base", "ema", "width", "model_kwargs", "output", "force", "dry_run", "json", "config",
            "quiet", "verbose")  # fmt: skip


def _of_training(run: RunOptions) -> list[str]:
    """The options that were given and mean nothing where files are packed."""
    others = [field for field in fields(run) if field.name not in _PACKING]
    given = [field.name for field in others if getattr(run, field.name) != field.default]
    return [f"--{name.replace('_', '-')}" for name in given]


def _pack(
    files: list[str], names: list[str] | None, arch: str | None, run: RunOptions, *, whole: bool
) -> None:
    from randsurgery.errors import UsageError
    from randsurgery.jobs.members import prepare_pack

    if len(files) == 1:
        raise UsageError("one source: pass --members N to train, or further files to pack")
    incoming = replace(_incoming(files, names, run.base, arch, run), whole=whole)
    change = prepare_pack(incoming, run.output, force=run.force)
    _change(change, run.dry_run, run.json)


def _incoming(
    files: list[str],
    names: list[str] | None,
    base: str | None,
    arch: str | None = None,
    run: RunOptions | None = None,
) -> Incoming:
    from randsurgery.jobs.members import Incoming

    args = common.model_arguments(run.model_kwargs, width=run.width) if run else {}
    ema = run.ema if run else False
    return Incoming(tuple(files), tuple(names or ()), base, arch, ema=ema, args=args)


def _change(change: Change, dry_run: bool, json: bool, word: str = "packed") -> None:
    """Write what was prepared, and show what the file has then."""
    from randsurgery.jobs.members import run_change

    for line in change.notes:
        note(common.clean(line))
    with change.checkpoint:
        if dry_run:
            if json:
                print_json({"output": str(change.output), "members": list(change.members)})
            else:
                common.out().print(f"{change.output}: {', '.join(change.members)}")
            return
        run_change(change)
    _show(str(change.output), json, {"moved": list(change.moved)})
    note(f"{word}: {', '.join(change.moved)}")
    note(f"written and verified: {change.output}")


def _show(path: str, json: bool, more: dict[str, Any]) -> None:
    from randsurgery.cli import render
    from randsurgery.inspection.members import list_members

    report = list_members(path)
    if json:
        print_json({"path": path, "verified": True, **report.to_json(), **more})
    else:
        render.show_members(report)


@app.command("add")
@command
def add(
    file: options.File,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="MEMBER",
            help="Files whose members join: of randsurgery, on the same backbone; with --base, "
            "dense checkpoints fine-tuned from it.",
        ),
    ],
    name: options.Names = None,
    base: common.BaseOption = None,
    ema: common.EmaOption = False,
    output: options.Into = None,
    force: common.Force = False,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Add members that were trained anywhere, if and only if they have the same backbone.

    FILE itself is changed, whole or not at all, unless --output is given.
    """
    from randsurgery.jobs.members import prepare_add

    incoming = replace(_incoming(files, name, base), ema=ema)
    change = prepare_add(file, incoming, output, force=force)
    _change(change, dry_run, json, "added")


@app.command("remove")
@command
def remove(
    file: options.File,
    members: Annotated[list[str], typer.Argument(metavar="NAME", help="The members that go.")],
    base: common.BaseOption = None,
    output: options.Into = None,
    force: common.Force = False,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Remove members; of the others not one bit changes.

    FILE itself is changed, whole or not at all, unless --output is given.
    """
    from randsurgery.jobs.members import prepare_remove

    change = prepare_remove(file, members, output, base=base, force=force)
    _change(change, dry_run, json, "removed")


@app.command("extract")
@command
def extract(
    file: options.File,
    member: Annotated[str, typer.Argument(metavar="NAME", help="The member to take out.")],
    base: common.BaseOption = None,
    output: common.Output = None,
    force: common.Force = False,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Write one member as a file of its own; FILE keeps it."""
    from randsurgery.jobs.members import prepare_extract

    change = prepare_extract(file, member, output, base=base, force=force)
    _change(change, dry_run, json, "extracted")


@app.command("list")
@command
def list_(
    file: options.File,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Chart of the bytes: .png, .svg, .pdf.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    force: common.Force = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """The members, and the bytes that each adds; exit code 3 if one is damaged."""
    from randsurgery.cli import render
    from randsurgery.format.container import check_picture
    from randsurgery.inspection.members import list_members, plot_members

    if plot is not None:
        check_picture(plot, force=force)
    report = list_members(file)
    if json:
        print_json(report.to_json())
    else:
        render.show_members(report)
    if plot is not None:
        plot_members(report, plot)
        note(f"chart: {plot}")
    for fault in report.faults:
        common.fail(fault)
    if report.faults:
        raise typer.Exit(3)
