"""Whose turn it is."""

from concurrent.futures import Future

import numpy as np

from plait.modalities import Limits
from plait.stream import Document
from plait.trainer.engine.commands import Command, CreateRun, ForwardBackward, OptimStep, Sample
from plait.trainer.engine.scheduler import Kind, Queued, Scheduler
from plait.trainer.model import LEARN
from plait.trainer.optimiser import StepSettings
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.spec import ModelSpec

ONE = Document(
    token_ids=np.arange(4),
    targets=np.arange(4),
    weights=np.ones(4, dtype=np.float32),
    positions=np.arange(4),
)


def computing(run: str) -> Command:
    return ForwardBackward(run, [ONE], [[0]], LEARN)


def turns(*queue: Command) -> list[str]:
    """Each turn: the names of those whose commands it does, in capitals where a row is computed."""
    scheduler = Scheduler(8, None, lambda _: Kind("model", "model"))
    for command in queue:
        scheduler.put(Queued(command, Future()))
    made = []
    while scheduler:
        chosen = scheduler.next()
        if isinstance(chosen, Queued):
            made.append(chosen.owner)
            scheduler.done(chosen)
        else:
            [row] = chosen
            made.append("".join(taken.queued.owner for taken in row).upper())
            for taken in row:
                scheduler.done(taken.queued)
    return made


def test_many_steps_of_one_run_let_the_rows_of_others_between() -> None:
    steps = [OptimStep("a", StepSettings()) for _ in range(3)]
    assert turns(*steps, computing("b"), computing("b")) == ["a", "B", "a", "B", "a"]


def test_many_new_runs_let_the_rows_of_others_between() -> None:
    new = [CreateRun(name, ModelSpec(language="any"), 0, Limits()) for name in "xyz"]
    assert turns(*new, computing("b"), computing("b")) == ["x", "B", "y", "B", "z"]


def test_a_step_of_each_run_comes_before_the_row_that_all_share() -> None:
    steps = [OptimStep(run, StepSettings()) for run in "ab"]
    assert turns(*steps, computing("a"), computing("b")) == ["a", "b", "AB"]


def test_requests_to_sample_are_all_let_in_before_a_row() -> None:
    asked = [Sample("v", ONE, SamplerSettings(), 1) for _ in range(3)]
    assert turns(computing("b"), *asked) == ["v", "v", "v", "B"]
