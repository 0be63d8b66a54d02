"""A rank that is killed fails what was under way; runs go on from their last step."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from plait.errors import ModelError, RankDiedError
from plait.stream import render
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine
from plait.trainer.optimiser import StepSettings
from plait.trainer.sampling.settings import SamplerSettings
from tests.trainer.ranks.conftest import Driver, Make, assert_close

MOMENTUM = StepSettings(optimizer="sgd", learning_rate=0.001, options={"momentum": 0.9})


def kill(engine: Engine) -> None:
    [pid] = engine._work.team.pids
    os.kill(pid, signal.SIGKILL)


def stepped(driver: Driver, samples: Any) -> int:
    """One step, begun again as often as a rank dies in it; how often that was."""
    for tries in range(20):
        forward = driver.submit(samples)
        step = driver.step(MOMENTUM)
        try:
            forward.result()
        except RankDiedError:
            with pytest.raises(ModelError, match="one failed"):
                step.result()
            continue
        try:
            step.result()
            return tries
        except (RankDiedError, ModelError) as error:
            assert "rank" in str(error)
    raise AssertionError("ranks die again and again")


def weights(driver: Driver) -> dict[str, Tensor]:
    """Saved, and saved again where a rank died in it."""
    for _ in range(3):
        with contextlib.suppress(RankDiedError):
            return driver.weights()
    raise AssertionError("ranks die again and again")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_goes_on_from_its_last_step(
    pair: Engine, alone: Engine, drive: Make, lab: Any, kind: str
) -> None:
    two, one = drive(pair, kind), drive(alone, kind)
    view = pair.new_name("view")
    built = pair.submit(commands.TakeView(two.name, view)).result()
    prompt = render(lab.samples[0], built.tokenizer, built.layout, for_generation=True)
    sample = commands.Sample(view, prompt, SamplerSettings(max_tokens=6, temperature=0.0))
    first = pair.submit(sample).result().samples[0].tokens
    deaths = 0
    for number in range(3):
        one.submit(lab.samples)
        one.step(MOMENTUM).result()
        if number == 1:
            kill(pair)
        deaths += stepped(two, lab.samples)
    assert deaths == 1
    assert_close(two.weights(), one.weights(), 1e-5)
    assert pair.submit(sample).result().samples[0].tokens == first
    pair.finish(commands.DropView(view))


def test_pending_gradients_that_went_with_a_rank_are_told_once(
    pair: Engine, drive: Make, lab: Any
) -> None:
    two = drive(pair)
    two.submit(lab.samples).result()
    kill(pair)
    time.sleep(0.1)
    other = drive(pair, seed=3)  # whatever comes next finds it dead
    with pytest.raises(ModelError, match="gradients went with a rank"):
        two.step().result()
    with pytest.raises(ModelError, match="there are none"):
        two.step().result()
    other.submit(lab.samples).result()
    other.step().result()


@pytest.fixture
def kills(pair: Engine) -> Iterator[threading.Thread]:
    """Kills rank 1 at seeded moments, wherever it is then; also while it is started again."""
    moments, over = random.Random(7), threading.Event()

    def kill_again() -> None:
        for seconds in (1.0, 0.2, 9.0, 1.0, 8.5, 9.5):  # a short one hits a rank that starts
            before = pair._work.team.pids
            if over.wait(seconds + moments.random()):
                return
            if before and before == pair._work.team.pids:
                kill(pair)
            while pair._work.team.pids in ([], before) and not over.is_set():
                time.sleep(0.01)

    thread = threading.Thread(target=kill_again)
    thread.start()
    yield thread
    over.set()
    thread.join()


@pytest.mark.slow
def test_deaths_at_any_moment_lose_no_step(
    pair: Engine, alone: Engine, drive: Make, lab: Any, kills: threading.Thread
) -> None:
    two, one = drive(pair, "full"), drive(alone, "full")
    steps = 0
    while kills.is_alive():
        stepped(two, lab.samples)
        steps += 1
        if steps <= 20:  # then round-off has grown too far to be compared
            one.submit(lab.samples)
            one.step(MOMENTUM).result()
            assert_close(weights(two), one.weights(), 1e-4)
    assert two.run.steps == steps
