"""``ensemble build``: N members over one backbone, trained one after another (Rosenfeld & Tsotsos,
Section 4.3), or files packed into one.

Every member is a training job of its own, whose file lies in a folder beside the output until all
are there; a build that was stopped goes on with the member it was in.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint, read_checkpoint
from randsurgery.format.container import write_atomically
from randsurgery.format.generator import torch_seed
from randsurgery.format.members import check_names, renamed
from randsurgery.format.recipe import Plan, RandomSource
from randsurgery.format.writing import write_checkpoint
from randsurgery.jobs import parts, runs
from randsurgery.jobs.preparing import Prepared, RunPlan, closing_on_error, prepare
from randsurgery.jobs.records import keep_base, metrics_path, write_settings
from randsurgery.jobs.runs import Technique
from randsurgery.jobs.settling import told
from randsurgery.jobs.sources import flatten, in_memory
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.ensembles import joined
from randsurgery.surgery.initialisers import parse_fraction
from randsurgery.surgery.learning import learn_plan, survivor_counts
from randsurgery.surgery.modules import meta_module
from randsurgery.surgery.plans import (
    Freeze,
    count_layers,
    everything,
    make_plan,
    with_plan,
)
from randsurgery.surgery.roles import has_norms
from randsurgery.surgery.scores import resolve
from randsurgery.training.catalogue import WITHOUT_NORMS_LR
from randsurgery.training.loop import Hooks, Record
from randsurgery.training.optimisation import check_settings
from randsurgery.training.settings import TrainSettings

Kind = Literal["fc", "share", "full", "popup", "plan"]
START = "start"
"""The stage that trains what all members begin from."""


@dataclass(frozen=True)
class BuildPlan:
    """An ensemble to train.

    members: how many. kind: what each learns: the classifier and norms ("fc"), all but a ``share``
    of every layer's filters, everything, a mask that keeps ``k``, or what the source's plan says;
    None if that has one. warmup: epochs that train the shared start first. reinit: members begin
    with weights drawn from their own seeds. names: the members', if not m0, m1, ...
    """

    run: RunPlan
    members: int
    kind: str | None = None
    share: str | None = None
    k: str | None = None
    warmup: int = 0
    reinit: bool = False
    names: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UsageError for values out of range and options that do not go together."""
        if self.members < 1:
            raise UsageError(f"--members must be 1 or more, found {self.members}")
        kinds = get_args(Kind)[:-1]
        if self.kind is not None and self.kind not in kinds:
            raise UsageError(f"unknown --kind {self.kind!r}, expected {', '.join(kinds)}")
        if self.share is not None and self.kind != "share":
            raise UsageError("--share goes with --kind share")
        if self.kind == "share" and self.share is None:
            raise UsageError("--kind share needs --share, such as 0.9: what the members have alike")
        if self.share is not None and parse_fraction(self.share, "--share") == 1:
            raise UsageError("--share must be below 1: members that share all filters learn none")
        if self.k is not None and self.kind != "popup":
            raise UsageError("--k goes with --kind popup")
        if self.reinit and self.kind == "popup":
            raise UsageError("--reinit goes with learned weights; --kind popup learns masks")
        if self.names and len(self.names) != self.members:
            raise UsageError(f"{self.members} members, but {len(self.names)} names (--name)")
        check_names(self.member_names)
        files = [START] * bool(self.warmup) + [f"{name}.state" for name in self.member_names]
        if taken := sorted({*files} & {*self.member_names}):
            raise UsageError(f"--name {taken[0]} is a part of the build's own; give another")

    @property
    def member_names(self) -> tuple[str, ...]:
        """The members' names, in order, such that they sort in this order."""
        width = len(str(self.members - 1))
        return self.names or tuple(f"m{index:0{width}d}" for index in range(self.members))


@dataclass(frozen=True)
class PreparedBuild:
    """A checked build. ``job``: the start, all but trained. ``learned``: the plan of each member;
    None for masks. ``each``, ``total``: parameters that a member learns, and that a network has."""

    plan: BuildPlan
    job: Prepared
    kind: Kind
    learned: Plan | None
    each: int
    total: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """What a build wrote. ``records``: the last of each member's training, by name."""

    path: Path
    bytes: int
    records: dict[str, Record]


def prepare_build(plan: BuildPlan) -> PreparedBuild:
    """Check everything a build needs. Raises RandsurgeryError; writes nothing. The job's checkpoint
    is to be closed by the caller."""
    plan.check()
    resumes = plan.run.resume
    if resumes not in (None, "auto"):
        raise UsageError(f"--resume {resumes}: a build is resumed by auto, from its own parts")
    label = f"ensemble-{plan.kind or 'plan'}"
    with closing_on_error() as stack:
        run = replace(plan.run, resume=None, learns="masks" if plan.kind == "popup" else "weights")
        job = prepare(run, stack, label, flat=False)
        parts.check_folder(
            parts.parts_folder(job.output), resume=plan.run.resume is not None, force=plan.run.force
        )
        had, start = job.checkpoint.member().plan, job.checkpoint
        if start.member().tensors:
            had, start = had and _begun(had), in_memory(start)
        kind = _kind(plan, had, start)
        shell = meta_module(start)
        learned = _learned(plan, kind, shell, had)
        if learned is not None:
            start = with_plan(start, learned)
            if plan.reinit:
                _check_drawn(start, learned)
        each, total = _sizes(plan, start, shell)
        if plan.warmup:
            _check_whole(learned)
            check_settings(_of_start(job, shell, plan.warmup))
        settings = _settings(replace(plan, run=job.plan), kind)
    return PreparedBuild(plan, replace(job, checkpoint=start), kind, learned, each, total, settings)


def _begun(plan: Plan) -> Plan:
    """The plan for slices that hold what they learned, not what they started from."""
    parts = {n: part.model_copy(update={"start": None}) for n, part in plan.tensors.items()}
    return plan.model_copy(update={"tensors": parts})


def _kind(plan: BuildPlan, had: Plan | None, start: Checkpoint) -> Kind:
    if had is not None and plan.kind is None:
        return "plan"
    if had is not None:
        raise UsageError(f"the source has a plan, which implies what members learn; leave --kind "
                         f"{plan.kind} out")  # fmt: skip
    for kind in get_args(Kind)[:-1]:
        if kind == plan.kind:
            found: Kind = kind
            return found
    raise UsageError("--kind fc, share, full or popup is needed: the source has no plan")


def _learned(plan: BuildPlan, kind: Kind, shell: nn.Module, had: Plan | None) -> Plan | None:
    """What each member learns; None for masks."""
    if kind == "popup":
        return None
    if kind == "plan":
        return had
    if kind == "full":
        return everything(shell)
    if kind == "fc":
        return make_plan(shell, Freeze(only=("@head",)))
    assert plan.share is not None
    return make_plan(shell, Freeze(fraction=1 - parse_fraction(plan.share, "--share"), least=1))


def _popup(plan: BuildPlan, seed: int) -> Popup:
    return Popup(plan.k or "0.3", seed=seed)


def _sizes(plan: BuildPlan, start: Checkpoint, shell: nn.Module) -> tuple[int, int]:
    """Parameters that a member learns (of masks: one a masked weight), and all."""
    who = start.member()
    rows = count_layers(shell, who.plan or Plan(), survivor_counts(start, who))
    if who.plan is not None:
        return sum(row.learned for row in rows), sum(row.total for row in rows)
    wish = _popup(plan, 0)
    targets, _ = resolve(shell, wish)
    wish.shares(shell)  # which checks k
    each = sum(getattr(module, leaf).numel() for _, module, leaf in targets)
    return each, sum(row.total for row in rows)


def _check_drawn(start: Checkpoint, learned: Plan) -> None:
    """Raises UsageError if nothing that is learned was drawn from a seed."""
    entries = start.recipe.tensors
    sources = (part.start or entries[name].source for name, part in learned.tensors.items())
    if not any(isinstance(source, RandomSource) for source in sources):
        raise UsageError("--reinit needs weights that were drawn from a seed; the source has none")


def _check_whole(learned: Plan | None) -> None:
    """Raises UsageError if the network is no whole one before its slices are put in."""
    if learned is not None and any(part.start for part in learned.tensors.values()):
        raise UsageError(
            "--warmup-epochs trains the whole network first, but the plan's is zero outside its "
            "slices (--fill zero); leave one of the two out"
        )


def _settings(plan: BuildPlan, kind: Kind) -> dict[str, Any]:
    """What a build was told, beside the settings of training."""
    found = {
        **runs.source_settings(plan.run),
        "kind": kind,
        "share": plan.share,
        "k": str(_popup(plan, 0).k) if kind == "popup" else None,
        "start_epochs": plan.warmup,  # the learning rate has warm-up epochs of its own
        "reinit": plan.reinit,
    }
    return {key: value for key, value in found.items() if value is not None}


# --- the parts -----------------------------------------------------------------------------------


def _stages(job: PreparedBuild) -> list[str]:
    return [START] * bool(job.plan.warmup) + list(job.plan.member_names)


def _identity(job: PreparedBuild) -> dict[str, Any]:
    """What makes two builds the same."""
    technique = Technique("ensemble build", lambda _: None, job.settings)
    return {**runs.identity(job.job, technique), "members": list(job.plan.member_names)}


# --- train ---------------------------------------------------------------------------------------


def run_build(job: PreparedBuild, hooks: Callable[[str], Hooks]) -> Built:
    """Train every member, then write, re-read and verify the ensemble. ``hooks``: for each stage,
    by name. Raises DivergedError; the members that are trained are kept for ``--resume auto``."""
    output, folder = job.job.output, parts.parts_folder(job.job.output)
    parts.open_folder(folder, _identity(job), resume=job.plan.run.resume is not None)
    start = job.job
    # damage is told before anything is trained
    done = {name for name in _stages(job) if parts.is_done(folder / f"{name}.safetensors")}
    try:
        with contextlib.ExitStack() as stack:
            if job.plan.warmup:
                start = _warmed(job, folder, START in done, hooks(START), stack)
            found: Checkpoint | None = None
            for index, name in enumerate(job.plan.member_names):
                part = _trained(job, start, folder, index, name in done, hooks(name), stack)
                found = part if found is None else joined(found, part)
            assert found is not None
            keep_base(found, output)
            size = write_checkpoint(output, found, force=job.plan.run.force, finished=True)
            records = _write_records(job, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; the members trained so far are in {folder}; --resume auto goes on with "
            "the same command"
        ) from None
    parts.clear(folder)
    return Built(output, size, records)


def _of_start(begin: Prepared, shell: nn.Module, epochs: int) -> TrainSettings:
    """The settings under which the shared start is trained, to its last epoch: its weights are
    learned, whatever its members learn."""
    settings, lr = begin.settings, begin.settings.lr
    if begin.plan.overrides.get("lr") is None and not has_norms(shell):
        lr = min(lr, WITHOUT_NORMS_LR)
    return replace(
        settings, epochs=epochs, lr=lr, min_lr=min(settings.min_lr, lr), decay_milestones=(),
        warmup_epochs=min(settings.warmup_epochs, epochs // 2), keep="last", patience=None,
    )  # fmt: skip


def _stage(job: PreparedBuild, start: Prepared, path: Path, settings: TrainSettings) -> Prepared:
    """A training job of its own, that goes on from its state if it was stopped."""
    run = replace(start.plan, resume="auto", force=True, plot=None, log_to=())
    return replace(start, plan=run, settings=settings, output=path)


def _read_part(path: Path, start: Prepared, stack: contextlib.ExitStack) -> Checkpoint:
    part = stack.enter_context(read_checkpoint(path, need_bases=False))
    return replace(part, bases=start.checkpoint.bases)


def _warmed(
    job: PreparedBuild, folder: Path, done: bool, hooks: Hooks, stack: contextlib.ExitStack
) -> Prepared:
    """The start after its own epochs, in which everything is learned, as all members' backbone."""
    path, begin = folder / f"{START}.safetensors", job.job
    all_of_it = with_plan(begin.checkpoint, everything(meta_module(begin.checkpoint)))
    if not done:
        settings = _of_start(begin, meta_module(begin.checkpoint), job.plan.warmup)
        stage = replace(_stage(job, begin, path, settings), checkpoint=all_of_it)
        runs.carry_out(stage, _technique(job, lambda model: learn_plan(model, all_of_it)), hooks)
    warm = flatten(_read_part(path, begin, stack))
    if job.learned is not None:
        warm = with_plan(warm, job.learned)
    return replace(begin, checkpoint=warm)


def _trained(
    job: PreparedBuild,
    start: Prepared,
    folder: Path,
    index: int,
    done: bool,
    hooks: Hooks,
    stack: contextlib.ExitStack,
) -> Checkpoint:
    """A member under its name, trained now or before the build was stopped."""
    name = job.plan.member_names[index]
    path, seed = folder / f"{name}.safetensors", start.settings.seed + index
    if not done:
        stage = _stage(job, start, path, replace(start.settings, seed=seed))
        runs.carry_out(stage, _technique(job, _attach(job, start, seed)), hooks)
    part = _read_part(path, start, stack)
    return renamed(part, {part.member().name: name})


def _technique(job: PreparedBuild, attach: Callable[[nn.Module], object]) -> Technique:
    return Technique("ensemble build", attach, job.settings)


def _attach(job: PreparedBuild, start: Prepared, seed: int) -> Callable[[nn.Module], object]:
    """What makes a network learn as a member of that seed."""
    if job.learned is None:
        return lambda model: _popup(job.plan, seed).attach(model)
    # not the member's seed itself, which may be the backbone's
    drawn = torch_seed(seed, "reinit") if job.plan.reinit else None
    return lambda model: learn_plan(model, start.checkpoint, seed=drawn)


# --- what is written -----------------------------------------------------------------------------


def _write_records(job: PreparedBuild, folder: Path) -> dict[str, Record]:
    """Every stage's metrics, by name, and the build's settings, beside the output. Returns the last
    record of each member."""
    last: dict[str, Record] = {}
    lines = []
    for name in _stages(job):
        for line in metrics_path(folder / f"{name}.safetensors").read_text().splitlines():
            last[name] = json.loads(line)
            lines.append(json.dumps({"member": name, **last[name]}) + "\n")
    output = job.job.output
    write_atomically(metrics_path(output), iter(["".join(lines).encode()]))
    options = {
        **job.settings,
        **told(job.job.settings),
        **runs.options(job.job.plan),
        "kind": None if job.kind == "plan" else job.kind,
        "warmup_epochs": job.plan.warmup,  # the option's name
        "start_epochs": None,
        "members": job.plan.members,
        "source": None,
        "sources": [job.job.plan.source.origin or job.job.plan.source.name],
        "name": list(job.plan.names) or None,
    }
    write_settings(output, options, job.job.dataset)
    return {name: last[name] for name in job.plan.member_names}


def build_facts(job: PreparedBuild) -> dict[str, Any]:
    """What a build would do, for ``--dry-run``; ``learned`` by all members together."""
    technique = _technique(job, lambda _: None)
    own = {
        "kind": job.kind,
        "members": list(job.plan.member_names),
        "learned": job.each * job.plan.members,
        "learned_each": job.each,
        "total": job.total,
    }
    return {**runs.facts(job.job, own, technique)}
