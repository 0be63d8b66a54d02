"""Idle runs: state that waits elsewhere comes back as it was. A CPU has no second memory, so that
bytes stand for it, which nothing can compute with, and what was left behind is spoilt."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plait.modalities import Limits
from plait.stream import render
from plait.trainer.engine import commands
from plait.trainer.engine.executor import Executor
from plait.trainer.engine.idle import Idle
from plait.trainer.model import LEARN
from plait.trainer.optimiser import StepSettings


def elsewhere(tensor: Tensor) -> Tensor:
    held = tensor.clone().view(torch.uint8)
    tensor.fill_(torch.nan)
    return held


def returned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device).view(torch.float32)


def loop(lab: Any, idle: Idle) -> tuple[Executor, list[list[Tensor]]]:
    """Of two runs the first waits with a state and with gradients while the second computes."""
    executor = Executor(1_000_000)
    executor.idle = idle
    for number, name in enumerate(("one", "two")):
        executor.execute(commands.CreateRun(name, lab.spec(), number, Limits()))

    def turn(name: str) -> None:
        built = executor.runs[name].built
        documents = [render(s, built.tokenizer, built.layout) for s in lab.samples[2:3]]
        executor.execute(commands.Begin(name))
        batch = commands.MicroBatch(name, documents, LEARN, True, (0,))
        executor.execute(commands.Compute([batch], name, True))
        executor.execute(commands.Finish(name))

    def step(name: str) -> None:
        executor.execute(commands.OptimStep(name, StepSettings(learning_rate=0.01)))

    weights = []
    for _ in range(2):
        turn("one")
        step("one")
        turn("one")
        for _ in range(4):
            turn("two")
        step("two")
        step("one")
        weights.append([p.detach().clone() for *_, p in executor.runs["one"].trainable])
    return executor, weights


def test_what_waited_elsewhere_comes_back_as_it_was(lab: Any) -> None:
    moved: list[int] = []

    def counted(tensor: Tensor) -> Tensor:
        moved.append(tensor.nbytes)
        return elsewhere(tensor)

    stays, expected = loop(lab, Idle())
    idle = Idle(counted, returned, ("cpu",), patience=2)
    executor, found = loop(lab, idle)
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    trained = sum(parameter.nbytes for *_, parameter in executor.runs["one"].trainable)
    assert sum(moved) == (3 + 3) * trained  # each time gradients and Adam's two moments
    assert stays.idle._here == {} and stays.idle._gone == {}  # on a CPU nothing moves


def test_a_run_that_waits_elsewhere_costs_no_row_anything(lab: Any) -> None:
    """Nobody looks at it until it is used, and none stays behind when it is dropped."""
    idle = Idle(elsewhere, returned, ("cpu",), patience=2)
    executor, _ = loop(lab, idle)
    for _ in range(4):
        idle.row_done()
    assert idle._here == {} and set(idle._gone) == {"one", "two"}
    executor.run("two")
    assert set(idle._here) == {"two"} and set(idle._gone) == {"one"}
    for name in ("one", "two"):
        executor.execute(commands.DropRun(name))
    assert idle._here == {} and idle._gone == {}


def test_what_memory_does_not_suffice_for_comes_back_later(lab: Any) -> None:
    left = [-1]

    def back(tensor: Tensor, device: torch.device) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return returned(tensor, device)

    idle = Idle(elsewhere, back, ("cpu",), patience=2)
    executor, _ = loop(lab, idle)
    run = executor.runs["one"]
    for _ in range(4):
        idle.row_done()
    left[0] = 3
    with pytest.raises(torch.OutOfMemoryError):
        idle.used(run)
    idle.used(run)
    assert run.optimizer is not None
    moments = [value for values in run.optimizer.state.values() for value in values.values()]
    assert not any(moment.dtype == torch.uint8 for moment in moments)
    assert "one" not in idle._gone
