"""Guarantees 3 and 4 on two real processes, sharded and not: nothing hangs, nothing depends on
which rank computes what."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from plait.errors import ConfigError, DataError, ModelError
from plait.modalities import Image, Limits
from plait.stream import render
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine
from plait.trainer.losses import Loss
from plait.trainer.model import Objective
from plait.trainer.optimiser import StepSettings
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.spec import LoraSpec
from tests.trainer.ranks.conftest import Make, assert_close

MOMENTUM = StepSettings(optimizer="sgd", learning_rate=0.001, options={"momentum": 0.9})

SETS: dict[str, Sequence[int]] = {
    "texts": (2, 2, 2),
    "pictures": (0, 1, 3),
    "mixed": (0, 1, 2, 3),
    "one, so that a rank has nothing": (1,),
    "uneven": (1, 2),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["lora", "full", "projector"])
def test_gradients_are_those_of_one_rank(
    pair: Engine, alone: Engine, drive: Make, lab: Any, kind: str, name: str
) -> None:
    samples = [lab.samples[number] for number in SETS[name]]
    two, one = drive(pair, kind), drive(alone, kind)
    found, expected = two.submit(samples).result(), one.submit(samples).result()
    assert [result.loss for result in found] == pytest.approx([r.loss for r in expected], rel=1e-5)
    assert_close(two.pending(), one.pending(), 1e-5)
    two.submit(samples[:1]).result()
    one.submit(samples[:1]).result()
    assert_close(two.pending(), one.pending(), 1e-5)


def test_after_ten_steps_weights_are_those_of_one_rank(
    pair: Engine, alone: Engine, drive: Make, lab: Any
) -> None:
    for kind in ("lora", "full"):
        two, one = drive(pair, kind), drive(alone, kind)
        before = one.weights()
        for step in range(10):
            for driver in (two, one):
                driver.submit([lab.samples[step % 4], lab.samples[(step + 1) % 4]])
                driver.step()
        found, expected = two.weights(), one.weights()
        assert_close(found, expected, 1e-5)
        assert max(float((w - before[n]).norm() / before[n].norm().clamp(min=1e-9))
                   for n, w in expected.items()) > 0.01  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_state_goes_on_with_another_number_of_ranks(
    pair: Engine, alone: Engine, drive: Make, lab: Any, kind: str
) -> None:
    """With pending gradients and an optimiser that remembers."""
    two, one = drive(pair, kind), drive(alone, kind)
    for driver in (two, one):
        for _ in range(2):
            driver.submit(lab.samples)
            driver.step(MOMENTUM)
        driver.submit(lab.samples[:2])
    there, back = drive(alone, kind), drive(pair, kind)
    there.load(two.save())
    back.load(one.save())
    drivers = (one, two, there, back)
    for driver in drivers:
        driver.submit(lab.samples[2:])
        driver.step(MOMENTUM).result()
    expected = one.weights()
    for driver in drivers[1:]:
        assert_close(driver.weights(), expected, 1e-5)


def test_a_row_broken_at_decoding_adds_nothing_on_any_rank(
    pair: Engine, drive: Make, lab: Any, tmp_path: Path
) -> None:
    two = drive(pair)
    two.submit(lab.samples).result()
    before = two.pending()
    file = tmp_path / "broken.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(file)
    whole = file.read_bytes()
    sample = lab.sample("a disc", "look")
    message = replace(sample.messages[0], parts=(Image(file), *sample.messages[0].parts))
    bad = replace(sample, messages=(message, sample.messages[1]))
    for place in range(3):  # on either rank
        samples = [*lab.samples[:2]]
        samples.insert(place, bad)
        documents = two.documents(samples)
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"broken\.png"):
            pair.forward_backward(two.name, documents).result()
        file.write_bytes(whole)
        assert_close(two.pending(), before, 0.0)
        with pytest.raises(ModelError, match="one failed"):
            two.step().result()
    two.step().result()


def test_where_memory_ends_all_ranks_split_and_try_again(
    pair: Engine, drive: Make, lab: Any, loss_module: Path
) -> None:
    import plait_test_losses as losses

    two, fresh = drive(pair), drive(pair)
    samples = [*lab.samples, *lab.samples]
    two.submit(samples).result()
    small = Objective(
        Loss(name="small", function=losses.of_two_at_most, inputs=(), optional=("weights",)), {}
    )
    fresh.submit(samples, objective=small).result()
    assert_close(fresh.pending(), two.pending(), 1e-5)
    group = [replace(d, group=0) for d in fresh.documents(lab.samples)]
    with pytest.raises(ModelError, match=r"memory ended in a micro-batch of 4 documents"):
        pair.forward_backward(fresh.name, group, small).result()


def test_a_loss_that_fails_or_is_not_finite_fails_its_call_alone(
    pair: Engine, drive: Make, lab: Any, loss_module: Path
) -> None:
    import plait_test_losses as losses

    two, other = drive(pair), drive(pair, seed=1)
    broken = Loss(name="broken", function=losses.broken, inputs=(), optional=("weights",))
    documents = two.documents(lab.samples)
    nan = replace(documents[1], weights=np.full_like(documents[1].weights, np.nan), sample_id="x7")
    two.submit(lab.samples).result()
    before = two.pending()
    bad = two.submit(lab.samples, objective=Objective(broken, {}))
    worse = pair.forward_backward(two.name, [documents[0], nan, documents[2]])
    fine = other.submit(lab.samples)
    with pytest.raises(ValueError, match="this loss is broken"):
        bad.result()
    with pytest.raises(DataError, match="a loss must be finite; that of datum x7 is nan"):
        worse.result()
    fine.result()
    assert_close(two.pending(), before, 0.0)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_gradient_that_is_not_finite_names_its_own_data(
    pair: Engine, drive: Make, lab: Any, loss_module: Path, kind: str
) -> None:
    import plait_test_losses as losses

    two = drive(pair, kind)
    steep = Objective(
        Loss(name="steep", function=losses.steep, inputs=(), optional=("weights",)), {}
    )
    for place in range(3):
        documents = [replace(d, sample_id=f"d{n}") for n, d in enumerate(two.documents(
            [lab.samples[2]] * 3))]  # fmt: skip
        documents[place] = replace(documents[place], weights=documents[place].weights * 7)
        with pytest.raises(DataError, match=f"gradients must be finite, and those of .*d{place}"):
            pair.forward_backward(two.name, documents, steep).result()
    assert two.pending() == {}


def test_runs_share_rows_on_all_ranks(pair: Engine, alone: Engine, drive: Make, lab: Any) -> None:
    pairs = [(drive(pair, seed=n), drive(alone, seed=n)) for n in range(3)]
    futures = [two.submit(lab.samples) for two, _ in pairs]
    for (two, one), future in zip(pairs, futures, strict=True):
        one.submit(lab.samples).result()
        future.result()
        assert_close(two.pending(), one.pending(), 1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_samples_are_those_of_one_rank(
    pair: Engine, alone: Engine, drive: Make, lab: Any, kind: str
) -> None:
    found = []
    for engine in (pair, alone):
        driver = drive(engine, kind)
        driver.submit(lab.samples)
        driver.step()
        view = engine.new_name("view")
        built = engine.submit(commands.TakeView(driver.name, view)).result()
        busy = [driver.submit(lab.samples) for _ in range(3)]
        prompt = render(lab.samples[0], built.tokenizer, built.layout, for_generation=True)
        settings = SamplerSettings(max_tokens=8, temperature=0.0)
        made = engine.submit(commands.Sample(view, prompt, settings)).result()
        for future in busy:
            future.result()
        engine.finish(commands.DropView(view))
        found.append(made.samples[0])
    two, one = found
    assert two.tokens == one.tokens
    np.testing.assert_allclose(two.logprobs, one.logprobs, atol=1e-4)


def test_settings_that_shards_cannot_have_are_refused(
    pair: Engine, strategy: str, drive: Make, lab: Any
) -> None:
    if strategy == "ddp":
        pytest.skip("whole models can have them")
    with pytest.raises(ConfigError, match=r"lora\.dora needs whole weights"):
        pair.create_run(lab.spec(lora=LoraSpec(rank=2, dora=True)), 0, Limits())
    two = drive(pair, "full")
    two.submit(lab.samples)
    with pytest.raises(ConfigError, match="'adafactor' needs whole weights"):
        two.step(StepSettings(optimizer="adafactor")).result()


def test_a_loss_that_other_processes_cannot_read_is_refused(
    pair: Engine, drive: Make, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = drive(pair)
    here = Loss(name="here", function=lambda batch: batch, inputs=(), optional=("weights",))
    with pytest.raises(ModelError, match="define losses of your own in a module"):
        two.submit(lab.samples, objective=Objective(here, {}))
    monkeypatch.setattr(a_loss, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "a_loss", a_loss, raising=False)
    main = Loss(name="main", function=a_loss, inputs=(), optional=("weights",))
    with pytest.raises(ModelError, match="stands in the program itself"):
        two.submit(lab.samples, objective=Objective(main, {}))


def a_loss(batch: Any) -> Any:
    return batch.per_document(batch.logprobs)
