"""What is left where a rank has died, and every run and view of it on new ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from plait.trainer.build import Built
from plait.trainer.checkpoint import Snapshot, Weights, put_weights, weights_of
from plait.trainer.engine import commands
from plait.trainer.engine.commands import Command
from plait.trainer.engine.executor import Executor, View
from plait.trainer.engine.runs import Run
from plait.trainer.ranks.group import ALONE

Together = Callable[[Command, Callable[[], Any]], Any]
"""Lets the other ranks do a command while this one does what is given."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Copies that no attempt to start ranks again can spoil."""

    runs: list[tuple[Run, Snapshot]]
    whole: dict[str, View]
    """Views that need nobody else."""

    views: list[tuple[str, Built, Weights]]
    """Those whose language model goes with the ranks."""


def keep(old: Executor, mirrors: Mapping[str, Snapshot]) -> Kept:
    """Everything as this rank has it, without asking the others.

    Args:
        mirrors: Runs with shards, as their last step left them. One without was just being made.
    """
    runs = [
        (run, mirrors[name] if run.sharded else _snapshot(old, run))
        for name, run in old.runs.items()
        if not run.sharded or name in mirrors
    ]
    cut = {name: view.built for name, view in old.views.items() if _on_shards(view)}
    return Kept(
        runs,
        {name: view for name, view in old.views.items() if name not in cut},
        [(name, built, weights_of(built)) for name, built in cut.items()],
    )


def put_back(kept: Kept, executor: Executor, together: Together) -> None:
    """Every run on new processes, and on this one what was lost with shards.

    Raises:
        RankDiedError: another rank died; it may be tried again.
    """
    for run, snapshot in kept.runs:
        _run(run, snapshot, executor, together)
    if executor.group.sharded:
        executor.views |= kept.whole
        for name, built, weights in kept.views:
            create = commands.CreateView(name, built.spec, None, built.limits)
            _build(built, create, executor, together)
            executor.views[name].built = built
            put_weights(built, weights)


def _run(run: Run, snapshot: Snapshot, executor: Executor, together: Together) -> None:
    built = run.built
    create = commands.CreateRun(run.name, built.spec, built.seed, built.limits)
    restore = commands.Restore(run.name, snapshot)
    if not executor.group.sharded:
        run.group = executor.group
        together(create, _nothing)
        together(restore, _nothing)
        return
    _build(built, create, executor, together)
    executor.runs[run.name].built = built
    together(restore, lambda: executor.execute(restore))
    executor.runs[run.name].failure = run.failure


def _build(built: Built, create: Command, executor: Executor, together: Together) -> None:
    """Let everybody who holds `built` have what is built anew."""

    def build() -> None:
        fresh = executor.execute(create)
        for field in fields(Built):
            setattr(built, field.name, getattr(fresh, field.name))

    together(create, build)


def _nothing() -> None:
    """This rank has it still."""


def _on_shards(view: View) -> bool:
    return view.built.model.backbone.sharded


def _snapshot(executor: Executor, run: Run) -> Snapshot:
    group, run.group = run.group, ALONE
    try:
        return executor.gather(commands.Gather(run.name))
    finally:
        run.group = group
