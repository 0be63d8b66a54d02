"""What fails on one rank, or between two commands, neither hangs nor is taken for done."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plait
from plait.errors import CheckpointError, ConfigError, ModelError, PlaitError, RankDiedError
from plait.modalities import Limits
from plait.stream import render
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.engine.team import Team
from plait.trainer.losses import Loss
from plait.trainer.model import LEARN, Objective
from plait.trainer.optimiser import StepSettings
from plait.trainer.ranks import children
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.source import Source
from tests.trainer.ranks.conftest import Driver, Make, assert_close
from tests.trainer.ranks.test_deaths import MOMENTUM, kill


@pytest.fixture
def deaf(pair: Engine, monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Rank 1 dies, once, when it has done a command of the type put in here, unanswered."""
    types: list[type] = []
    armed: list[bool] = []
    done, heard = Team._all, children.Child.answer

    def _all(team: Team, told: Any, mine: Any) -> Any:
        if types and type(told) is types[0]:
            armed.append(True)
            types.clear()
        return done(team, told, mine)

    def answer(child: children.Child, *, waits: bool = True) -> Any:
        found = heard(child, waits=waits)
        if armed:
            armed.clear()
            child._process.kill()
            child._process.wait()
            return heard(child, waits=waits)
        return found

    monkeypatch.setattr(Team, "_all", _all)
    monkeypatch.setattr(children.Child, "answer", answer)
    return types


def test_a_step_whose_rank_dies_behind_it_is_done_or_refused(
    pair: Engine, alone: Engine, drive: Make, lab: Any, deaf: list[type]
) -> None:
    two, one = drive(pair, "full"), drive(alone, "full")
    for driver in (two, one):
        driver.submit(lab.samples)
        driver.step(MOMENTUM).result()
    two.submit(lab.samples).result()
    deaf.append(commands.OptimStep)
    try:
        two.step(MOMENTUM).result()
        one.submit(lab.samples)
        one.step(MOMENTUM).result()
    except RankDiedError as error:
        assert "nothing of this command counts" in str(error)
    assert not deaf
    for driver in (two, one):
        driver.submit(lab.samples[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two.run, "failure", None)
        two.step(MOMENTUM).result()
    one.step(MOMENTUM).result()
    assert two.run.steps == one.run.steps
    assert_close(two.weights(), one.weights(), 1e-5)


def test_a_run_whose_rank_dies_while_it_is_made_leaves_the_engine_well(
    pair: Engine, drive: Make, lab: Any, deaf: list[type]
) -> None:
    two = drive(pair, "full")
    before = set(pair.executor.runs)
    deaf.append(commands.CreateRun)
    try:
        drive(pair, "full", seed=5)
    except RankDiedError:
        assert set(pair.executor.runs) == before
    assert not deaf
    two.submit(lab.samples).result()
    two.step().result()


def test_calls_under_way_fail_with_a_rank_whatever_finds_it_dead(
    pair: Engine, alone: Engine, drive: Make, lab: Any
) -> None:
    """Another run's command starts the ranks again between two micro-batches of a call."""
    two, other, one = drive(pair), drive(pair, seed=1), drive(alone)
    other.submit(lab.samples).result()
    documents = two.documents(lab.samples * 2)
    batches = [[number] for number in range(len(documents))]
    step, computed = [], pair._work.team.compute

    def compute(rows: Any) -> Any:
        found = computed(rows)
        if not step:
            kill(pair)
            time.sleep(0.2)
            step.append(other.step())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair._work.team, "compute", compute)
        command = commands.ForwardBackward(two.name, documents, batches, LEARN)
        future = pair.submit(command)
        with pytest.raises(RankDiedError):
            future.result()
    assert step
    with pytest.raises(PlaitError):
        step[0].result()
    with pytest.raises(ModelError, match="one failed"):
        two.step().result()
    assert two.pending() == {}
    two.submit(lab.samples).result()
    one.submit(lab.samples).result()
    assert_close(two.pending(), one.pending(), 1e-5)


def test_a_view_of_a_checkpoint_that_does_not_fit_costs_nobody_anything(
    pair: Engine, drive: Make, lab: Any
) -> None:
    two, other = drive(pair), drive(pair, "projector")
    folder = other.save()
    two.submit(lab.samples).result()
    before, pids = two.pending(), pair._work.team.pids
    with pytest.raises(CheckpointError):
        pair.create_view(two.built.spec, Source(other.store, str(folder)), Limits())
    assert pair._work.team.pids == pids
    assert_close(two.pending(), before, 0.0)
    assert not pair.executor.views


def test_a_name_that_is_taken_leaves_the_ranks_running(pair: Engine, drive: Make, lab: Any) -> None:
    two = drive(pair)
    two.submit(lab.samples).result()
    before, pids = two.pending(), pair._work.team.pids
    two._saved -= 1
    with pytest.raises(CheckpointError):
        two.save()
    assert pair._work.team.pids == pids
    assert_close(two.pending(), before, 0.0)


def test_other_ranks_give_up_views_and_models_with_rank_0(
    pair: Engine, drive: Make, lab: Any, loss_module: Path, specs: Any
) -> None:
    import plait_test_losses as losses

    two = drive(pair)
    folder = two.save()
    count = Loss(name="held", function=losses.held, inputs=(), optional=("weights",))
    counts = []
    for _ in range(4):
        view, _ = pair.create_view(two.built.spec, Source(two.store, str(folder)), Limits())
        full = Driver(pair, specs["full"], two.store.root)
        full.submit(lab.samples).result()
        full.drop()
        pair.finish(commands.DropView(view))
        two.submit(lab.samples, objective=Objective(count, {})).result()
        [pid] = pair._work.team.pids
        counts.append((loss_module / f"held-{pid}").read_text())
    assert counts[-1] == counts[0]


def test_a_layer_that_fails_on_one_rank_is_its_call_s_error_alone(
    pair: Engine, drive: Make, lab: Any
) -> None:
    two = drive(pair)
    two.submit(lab.samples).result()
    before, pids = two.pending(), pair._work.team.pids

    def fail(*_: Any) -> None:
        raise ValueError("this layer is broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two.built.model.backbone.decoder.layers[0].mlp, "forward", fail)
        with pytest.raises(ValueError, match="this layer is broken"):
            two.submit(lab.samples).result()
    assert pair._work.team.pids == pids
    assert_close(two.pending(), before, 0.0)


def test_a_rank_that_takes_long_alone_is_not_taken_for_dead(
    pair: Engine, strategy: str, drive: Make, lab: Any, loss_module: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import plait_test_losses as losses

    if strategy == "fsdp":
        pytest.skip("sharded ranks compute in step")
    monkeypatch.setattr(children, "_PATIENCE", 0.2)
    two = drive(pair)
    slow = Loss(name="slow", function=losses.slow_or_broken, inputs=(), optional=("weights",))
    documents = two.documents([lab.samples[2]] * 2)
    documents[0] = replace(documents[0], weights=documents[0].weights * 7)
    pids = pair._work.team.pids
    with pytest.raises(ValueError, match="heavy"):
        pair.forward_backward(two.name, documents, Objective(slow, {})).result()
    assert pair._work.team.pids == pids


def test_a_loss_that_one_rank_cannot_import_lets_nobody_wait(
    tmp_path: Path, pair: Engine, drive: Make, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, or computed where it can be."""
    (tmp_path / "plait_test_here_only.py").write_text(
        "def mine(batch):\n    return batch.per_document(-batch.logprobs * batch.weights)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import plait_test_here_only

    two, other = drive(pair), drive(pair)
    loss = Loss(name="m", function=plait_test_here_only.mine, inputs=(), optional=("weights",))
    other.submit(lab.samples).result()
    future = two.submit(lab.samples, objective=Objective(loss, {}))
    try:
        future.result(timeout=60)
        assert_close(two.pending(), other.pending(), 1e-5)
    except ModelError as error:
        assert "plait_test_here_only" in str(error)


def test_an_optimiser_that_needs_whole_weights_is_not_loaded_into_shards(
    pair: Engine, alone: Engine, strategy: str, drive: Make, lab: Any
) -> None:
    one, two = drive(alone, "full"), drive(pair, "full")
    one.submit(lab.samples)
    one.step(StepSettings(optimizer="adafactor", learning_rate=1e-4)).result()
    folder = one.save()
    if strategy == "ddp":
        two.load(folder)
        return
    with pytest.raises(ConfigError, match="'adafactor' needs whole weights"):
        two.load(folder)


def test_fewer_gpus_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="this machine has 1 and devices is 2"):
        Engine(EngineSettings(devices=2))


def test_what_the_engine_s_settings_say_of_devices_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="this machine has 1 and devices is 3"):
        plait.ServiceClient(tmp_path, engine=EngineSettings(devices=3, strategy="fsdp"))


def test_views_outlive_ranks_that_die_while_others_are_started(
    pair: Engine, drive: Make, lab: Any, deaf: list[type]
) -> None:
    two = drive(pair)
    two.submit(lab.samples)
    two.step(StepSettings(learning_rate=0.1)).result()
    view = pair.new_name("view")
    built = pair.submit(commands.TakeView(two.name, view)).result()
    prompt = render(lab.samples[0], built.tokenizer, built.layout, for_generation=True)
    sample = commands.Sample(view, prompt, SamplerSettings(max_tokens=6, temperature=0.0))
    first = pair.submit(sample).result().samples[0]
    deaf.append(commands.CreateView)  # if it comes to that, when ranks are started again
    kill(pair)
    with pytest.raises(RankDiedError):
        two.submit(lab.samples).result()
    again = pair.submit(sample).result().samples[0]
    assert again.tokens == first.tokens
    np.testing.assert_allclose(again.logprobs, first.logprobs, atol=1e-5)
    pair.finish(commands.DropView(view))
