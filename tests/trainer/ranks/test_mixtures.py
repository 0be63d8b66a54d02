"""What runs have beside one another on two ranks, and what one has of everything at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.stream import render
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine
from plait.trainer.model import LEARN
from plait.trainer.optimiser import StepSettings
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.spec import LoraSpec
from tests.trainer.ranks.conftest import Driver, Make, assert_close

CLIPPED = StepSettings(optimizer="sgd", learning_rate=0.5, grad_clip_norm=1e-3)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_clipped_steps_are_those_of_one_rank(
    pair: Engine, alone: Engine, drive: Make, lab: Any, kind: str
) -> None:
    two, one = drive(pair, kind), drive(alone, kind)
    before = one.weights()
    for _ in range(3):
        norms = []
        for driver in (two, one):
            driver.submit(lab.samples)
            norms.append(driver.step(CLIPPED).result()["grad_norm:mean"])
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    found, expected = two.weights(), one.weights()
    moved = {name: tensor - before[name] for name, tensor in expected.items()}
    square = sum(float(tensor.double().norm()) ** 2 for tensor in moved.values())
    assert 0 < square**0.5 <= 3 * 0.5 * 1e-3 * 1.001
    assert_close({n: t - before[n] for n, t in found.items()}, moved, 1e-2)


def test_runs_of_all_kinds_train_at_the_same_time(
    pair: Engine, alone: Engine, drive: Make, lab: Any
) -> None:
    """One of them is dropped in the middle, while others train and are sampled."""
    kinds = ("full", "lora", "projector", "full", "lora")
    runs = [(drive(pair, kind, n), drive(alone, kind, n)) for n, kind in enumerate(kinds)]
    dropped = drive(pair, "full", seed=9)
    futures = []
    for _ in range(3):
        futures += [dropped.submit(lab.samples), dropped.step()]
        for driver in (driver for both in runs for driver in both):
            futures += [driver.submit(lab.samples), driver.step()]
        pair.discard(commands.DropRun(dropped.name))
        dropped = drive(pair, "full", seed=9)
    for future in futures:
        future.result()
    for two, one in runs:
        assert_close(two.weights(), one.weights(), 1e-4)


def test_a_long_prompt_is_read_in_chunks_while_its_run_trains(
    pair: Engine, alone: Engine, drive: Make, lab: Any
) -> None:
    found = []
    for engine in (pair, alone):
        per_kind = []
        for kind in ("full", "lora"):
            driver = drive(engine, kind)
            driver.submit(lab.samples)
            driver.step().result()
            view = engine.new_name("view")
            built = engine.submit(commands.TakeView(driver.name, view)).result()
            engine.executor._sampler(built).chunk = 8
            busy = [driver.submit(lab.samples) for _ in range(3)]
            sample = lab.sample("", "a big red cross and " * 12, 1, " a small disc " * 6)
            prompt = render(sample, built.tokenizer, built.layout, for_generation=True)
            settings = SamplerSettings(max_tokens=4, temperature=0.0)
            command = commands.Sample(view, prompt, settings, prompt_logprobs=True)
            made = engine.submit(command).result()
            busy.append(driver.step())
            for future in busy:
                future.result()
            again = engine.submit(command).result()
            assert again.samples[0].tokens == made.samples[0].tokens
            engine.finish(commands.DropView(view))
            per_kind.append(made)
        found.append(per_kind)
    for two, one in zip(*found, strict=True):
        assert two.samples[0].tokens == one.samples[0].tokens
        np.testing.assert_allclose(two.samples[0].logprobs, one.samples[0].logprobs, atol=1e-4)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_layers_that_are_computed_again_have_the_same_gradients(
    pair: Engine, alone: Engine, drive: Make, lab: Any, tmp_path: Path, full: bool
) -> None:
    facts: dict[str, Any] = {"lora": None if full else LoraSpec(rank=4, dropout=0.2)}
    if full:
        facts["train"] = ("language", "projector", "vision")
    spec = lab.spec(**facts)
    again = lab.spec(**facts, checkpointing=("language", "vision"))
    two, one = Driver(pair, again, tmp_path / "two"), Driver(alone, spec, tmp_path / "one")
    documents = two.documents(lab.samples)
    batches = [[0, 1], [2, 3]]  # dropout is drawn for each
    for driver in (two, one):
        command = commands.ForwardBackward(driver.name, documents, batches, LEARN)
        driver.engine.submit(command).result()
    assert_close(two.pending(), one.pending(), 1e-5)
    two.drop()
    one.drop()


def test_a_model_of_16_bits_trains_and_is_sampled(
    pair: Engine, alone: Engine, lab: Any, tmp_path: Path
) -> None:
    for full in (False, True):
        facts: dict[str, Any] = {"dtype": "bfloat16", "lora": None if full else LoraSpec(rank=4)}
        if full:
            facts["train"] = ("language", "projector", "vision")
        spec = lab.spec(**facts)
        losses = []
        for engine in (pair, alone):
            driver = Driver(engine, spec, tmp_path / f"{full}-{engine.settings.devices}")
            for _ in range(2):
                found = driver.submit(lab.samples).result()
                driver.step(replace(CLIPPED, grad_clip_norm=1.0)).result()
            losses.append([result.loss for result in found])
            driver.load(driver.save())
            driver.submit(lab.samples).result()
            driver.step(replace(CLIPPED, grad_clip_norm=1.0)).result()
            driver.drop()
        assert losses[0] == pytest.approx(losses[1], rel=2e-2)
