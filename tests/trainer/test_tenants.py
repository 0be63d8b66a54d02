"""Guarantee 10: runs that share a language model, and rows, are each as if they were alone."""

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plait.errors import ConfigError, DataError, ModelError
from plait.modalities import Image, Limits
from plait.stream import Document, Sample, render
from plait.trainer.config import config_from
from plait.trainer.engine import commands, executor
from plait.trainer.engine.commands import ForwardBackward, MicroBatch
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.engine.retrying import compute_rows
from plait.trainer.engine.runs import Run
from plait.trainer.model import LEARN
from plait.trainer.optimiser import StepSettings
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.spec import LoraSpec, ModelSpec

SGD = StepSettings(optimizer="sgd", learning_rate=0.001)

LORAS = [
    LoraSpec(rank=2, alpha=4.0),  # at 32, a scale of 16 turns round-off into 1e-6 in ten steps
    LoraSpec(rank=5, alpha=7.0),
    LoraSpec(rank=1, targets=("q_proj", "v_proj")),
    LoraSpec(rank=8, targets=("down_proj",)),
]


@pytest.fixture
def spec(tiny_values: dict[str, Any]) -> ModelSpec:
    return config_from(tiny_values).model


@pytest.fixture
def samples(lab: Any) -> list[Sample]:
    made: list[Sample] = lab.samples
    return made


class Tenants:
    """Runs of one engine, with adapters and projectors of their own."""

    def __init__(self, specs: Sequence[ModelSpec], settings: EngineSettings | None = None) -> None:
        self.engine = Engine(settings)
        self.runs: list[Run] = []
        for seed, spec in enumerate(specs):
            name, built = self.engine.create_run(spec, seed, Limits())
            self.runs.append(self.engine.executor.runs[name])
            generator = torch.Generator().manual_seed(seed)
            for _, part, parameter in built.model.trainable():
                if "lora_B" in part:  # zeros at first, which would hide what is mixed up
                    parameter.data.normal_(std=0.1, generator=generator)

    def documents(self, number: int, samples: Sequence[Sample]) -> list[Document]:
        built = self.runs[number].built
        return [render(sample, built.tokenizer, built.layout) for sample in samples]

    def submit(self, number: int, samples: Sequence[Sample], **options: Any) -> "Future[Any]":
        documents = self.documents(number, samples)
        return self.engine.forward_backward(self.runs[number].name, documents, **options)

    def step(self, number: int, settings: StepSettings = SGD) -> "Future[Any]":
        return self.engine.submit(commands.OptimStep(self.runs[number].name, settings))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs stood in each row that was computed."""
    seen: list[int] = []
    compute = executor.compute

    def counted(slices: Any, *rest: Any, **options: Any) -> Any:
        seen.append(len(slices))
        return compute(slices, *rest, **options)

    monkeypatch.setattr(executor, "compute", counted)
    return seen


@pytest.fixture
def four(spec: ModelSpec) -> Iterator[Tenants]:
    tenants = Tenants([replace(spec, lora=lora) for lora in LORAS])
    yield tenants
    tenants.engine.close()


class Held:
    """Keeps an engine's worker busy until it is let go, so that what is queued is there at once."""

    def __init__(self, tenants: Tenants) -> None:
        self.gate = threading.Event()
        work = tenants.engine._work
        turn = work._turn

        def waiting() -> None:
            assert self.gate.wait(60)
            work._turn = turn  # type: ignore[method-assign]
            work._wait()  # takes in what was queued meanwhile
            turn()

        work._turn = waiting  # type: ignore[method-assign]


def all_at_once(tenants: Tenants, samples: Sequence[Sample], **options: Any) -> list[Any]:
    held = Held(tenants)
    futures = [tenants.submit(n, samples, **options) for n in range(len(tenants.runs))]
    held.gate.set()
    return [future.result() for future in futures]


def gradients(run: Run) -> list[Tensor]:
    return [gradient.clone() for gradient in run.gradients if gradient is not None]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], bound: float) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= bound * other.norm()


def test_runs_share_a_language_model_and_towers(four: Tenants) -> None:
    first, *others = (run.model for run in four.runs)
    for other in others:
        assert other.language is first.language
        assert other.media_encoder("hf_vision").encoder is first.media_encoder("hf_vision").encoder
        mine, theirs = (
            {id(p) for _, _, p in model.trainable()} for model in (first, other)
        )  # fmt: skip
        assert mine and theirs and not mine & theirs


def test_gradients_in_a_mixed_row_are_those_of_the_run_alone(
    four: Tenants, samples: list[Sample], rows: list[int]
) -> None:
    mixed = all_at_once(four, samples)
    assert rows == [4]
    together = [gradients(run) for run in four.runs]
    for number, run in enumerate(four.runs):
        run.clear()
        alone = four.submit(number, samples).result()
        assert_close(together[number], gradients(run), 1e-5)
        for one, other in zip(mixed[number], alone, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-5, atol=1e-5)
    assert rows == [4, 1, 1, 1, 1]


def test_after_ten_steps_weights_are_those_of_runs_alone(
    spec: ModelSpec, samples: list[Sample], rows: list[int]
) -> None:
    specs = [replace(spec, lora=lora) for lora in LORAS]

    def trained(numbers: Sequence[int]) -> list[list[Tensor]]:
        tenants = Tenants(specs)
        for step in range(10):
            held = Held(tenants)
            some = [samples[step % 4], samples[(step + 1) % 4]]
            futures = [tenants.submit(number, some) for number in numbers]
            futures += [tenants.step(number) for number in numbers]
            held.gate.set()
            for future in futures:
                future.result()
        tenants.engine.close()
        return [[p.detach().clone() for *_, p in tenants.runs[n].trainable] for n in numbers]

    together = trained(range(4))
    assert rows == [4] * 10
    for number, mine in enumerate(together):
        [alone] = trained([number])
        assert all((a - b).abs().max() <= 1e-6 for a, b in zip(mine, alone, strict=True))
        before = [p.detach() for *_, p in Tenants(specs).runs[number].trainable]
        moved = [(a - b).norm() / b.norm() for a, b in zip(mine, before, strict=True)]
        assert max(moved) > 0.01


def test_what_a_run_must_not_mix_runs_alone(
    spec: ModelSpec, samples: list[Sample], rows: list[int]
) -> None:
    """Dropout draws from a state that is the run's; a language model that trains is nobody's."""
    specs = [
        replace(spec, lora=LoraSpec(rank=2)),
        replace(spec, lora=LoraSpec(rank=2, dropout=0.5)),
        replace(spec, lora=None),
        replace(spec, lora=LoraSpec(rank=3)),
    ]
    tenants = Tenants(specs)
    all_at_once(tenants, samples[:2])
    assert sorted(rows) == [1, 1, 2]
    assert tenants.runs[2].model.language is not tenants.runs[0].model.language
    tenants.engine.close()


def test_dropout_of_a_frozen_tower_is_never_drawn(
    spec: ModelSpec, samples: list[Sample], rows: list[int], tiny_vision: Path, tmp_path: Path
) -> None:
    tower = tmp_path / "tower"
    shutil.copytree(tiny_vision, tower)
    config = json.loads((tower / "config.json").read_text()) | {"hidden_dropout_prob": 0.5}
    (tower / "config.json").write_text(json.dumps(config))
    encoder = replace(spec.encoders["image"], weights=str(tower))
    frozen = replace(spec, encoders={"image": encoder}, lora=LoraSpec(rank=2))
    trained = replace(frozen, train=("language", "vision"))
    tenants = Tenants([frozen, frozen, trained])
    assert [run.draws for run in tenants.runs] == [False, False, True]
    all_at_once(tenants, samples)
    assert sorted(rows) == [1, 2]
    first, second = (tenants.submit(0, samples).result() for _ in range(2))
    assert [one.loss for one in first] == [two.loss for two in second]
    tenants.engine.close()


def test_losses_and_forward_passes_share_rows_too(
    four: Tenants, samples: list[Sample], rows: list[int]
) -> None:
    held = Held(four)
    learning = four.submit(0, samples)
    only = four.submit(1, samples, backward=False)
    held.gate.set()
    found, seen = learning.result(), only.result()
    assert rows == [2]
    assert not any(g is not None for g in four.runs[1].gradients)
    assert gradients(four.runs[0])
    everywhere = seen[0].logprobs != 0
    assert everywhere.sum() > (found[0].logprobs != 0).sum()


def test_a_row_that_breaks_fails_its_own_run_only(
    four: Tenants, samples: list[Sample], rows: list[int], tmp_path: Path, lab: Any
) -> None:
    cut = tmp_path / "cut.png"
    four.submit(2, samples).result()
    expected = gradients(four.runs[2])
    four.runs[2].clear()
    rows.clear()
    good = Image(np.zeros((16, 16, 3), dtype=np.uint8))
    broken = lab.sample("a disc", "look")
    message = replace(broken.messages[0], parts=(good, *broken.messages[0].parts))
    documents = four.documents(0, [replace(broken, messages=(message, broken.messages[1]))])
    item = replace(documents[0].items[0], part=Image(cut))
    documents = [replace(documents[0], items=(item,))]
    held = Held(four)
    bad = four.engine.forward_backward(four.runs[0].name, documents)
    fine = four.submit(2, samples)
    held.gate.set()
    with pytest.raises(DataError, match=r"cut\.png"):
        bad.result()
    fine.result()
    assert_close(gradients(four.runs[2]), expected, 1e-5)
    assert not any(g is not None for g in four.runs[0].gradients)
    with pytest.raises(ModelError, match=r"one failed: .*cut\.png"):
        four.step(0).result()
    four.step(2).result()


@pytest.mark.parametrize("where", ["weight", "embedding"])
def test_a_nan_of_one_run_reaches_no_other(
    four: Tenants, samples: list[Sample], where: str
) -> None:
    four.submit(1, samples).result()
    expected = gradients(four.runs[1])
    four.runs[1].clear()
    run = four.runs[0]
    if where == "weight":
        *_, (_, _, parameter) = (one for one in run.trainable if "lora_B" in one[1])
        parameter.data[0, 0] = torch.nan
    else:
        projector = run.model.media_encoder("hf_vision").projector
        next(projector.parameters()).data.fill_(torch.nan)
    held = Held(four)
    bad, fine = four.submit(0, samples), four.submit(1, samples)
    held.gate.set()
    with pytest.raises(DataError, match="must be finite"):
        bad.result()
    fine.result()
    assert_close(gradients(four.runs[1]), expected, 1e-5)


def test_where_memory_ends_a_row_is_halved_and_then_refused(
    four: Tenants, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    four.submit(0, samples).result()
    expected = gradients(four.runs[0])
    four.runs[0].clear()
    compute, most, seen = executor.compute, 2, []

    def small(slices: Any, *rest: Any, **options: Any) -> Any:
        count = sum(len(one.documents) for one in slices)
        seen.append(count)
        if count > most:
            raise torch.OutOfMemoryError("out of memory")
        return compute(slices, *rest, **options)

    monkeypatch.setattr(executor, "compute", small)
    results = four.submit(0, samples).result()
    assert seen[-2:] == [2, 2] and len(results) == 4
    assert_close(gradients(four.runs[0]), expected, 1e-5)
    four.runs[0].clear()
    most = 0
    with pytest.raises(ModelError, match=r"memory ended in a micro-batch of 1 documents with \d+"):
        four.submit(0, samples).result()
    assert not any(g is not None for g in four.runs[0].gradients)


def test_what_a_sampler_keeps_is_given_back_before_a_row_is_split(
    four: Tenants, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and sampling share one memory."""
    engine, run = four.engine, four.runs[0]
    built = engine.submit(commands.TakeView(run.name, "view")).result()
    prompt = render(samples[0], built.tokenizer, built.layout, for_generation=True)
    sample = commands.Sample("view", prompt, SamplerSettings(max_tokens=4, temperature=0.0))
    first = engine.submit(sample).result().samples[0].tokens
    [sampler] = engine.executor._samplers.values()
    compute, seen = executor.compute, []

    def full(slices: Any, *rest: Any, **options: Any) -> Any:
        seen.append(sum(len(one.documents) for one in slices))
        if sampler.memory.held:
            raise torch.OutOfMemoryError("out of memory")
        return compute(slices, *rest, **options)

    monkeypatch.setattr(executor, "compute", full)
    assert sampler.memory.held
    four.submit(0, samples).result()
    assert seen == [4, 4] and not sampler.memory.held
    assert engine.submit(sample).result().samples[0].tokens == first


def test_pairs_are_not_split_where_memory_ends(four: Tenants, samples: list[Sample]) -> None:
    documents = [replace(d, group=n // 2) for n, d in enumerate(four.documents(0, samples))]
    tried: list[int] = []

    def attempt(rows: Sequence[Sequence[MicroBatch]]) -> list[Any]:
        tried.append(len(rows[0][0].documents))
        return [torch.OutOfMemoryError("out of memory")]

    [[result]] = compute_rows([[MicroBatch("run", documents, LEARN, True, ())]], attempt,
                              in_step=False)  # fmt: skip
    assert tried == [4, 2] and isinstance(result, ModelError)


def test_turns_are_fair_by_positions(spec: ModelSpec, samples: list[Sample]) -> None:
    """One with a long queue does not keep one with a short one waiting."""
    tenants = Tenants([replace(spec, lora=lora) for lora in LORAS[:2]],
                      EngineSettings(capacity=32, max_documents=1))  # fmt: skip
    order: list[int] = []
    held = Held(tenants)
    for number, count in ((0, 6), (1, 2)):
        for _ in range(count):
            future = tenants.submit(number, samples[2:3])
            future.add_done_callback(lambda _, n=number: order.append(n))
    held.gate.set()
    future.result()
    tenants.submit(0, samples[2:3]).result()
    tenants.engine.close()
    assert max(place for place, number in enumerate(order) if number == 1) <= 3


def test_commands_of_one_run_keep_their_order(four: Tenants, samples: list[Sample]) -> None:
    held = Held(four)
    four.submit(0, samples)
    before = four.submit(0, samples[:1], backward=False)
    four.step(0, replace(SGD, learning_rate=1.0))
    after = four.submit(0, samples[:1], backward=False)
    held.gate.set()
    assert before.result()[0].loss != after.result()[0].loss


def test_a_dropped_run_leaves_nothing_on_the_language_model(
    four: Tenants, samples: list[Sample]
) -> None:
    language = four.runs[0].model.language
    names = {f".{run.name}." for run in four.runs}
    assert all(any(name in key for key, _ in language.named_parameters()) for name in names)
    gone = four.runs[1].name
    four.engine.finish(commands.DropRun(gone))
    left = [key for key, _ in language.named_parameters()]
    assert not any(f".{gone}." in key for key in left)
    assert any(f".{four.runs[0].name}." in key for key in left)
    four.submit(0, samples).result()


def test_a_run_that_cannot_be_made_leaves_nothing(four: Tenants, spec: ModelSpec) -> None:
    language = four.runs[0].model.language
    there = {name for name, _ in language.named_parameters()}
    bases = len(four.engine.executor.bases)
    for wrong in (spec, replace(spec, attention="naive")):  # on a model of others, on a new one
        with pytest.raises(ConfigError, match="chooses no parameter of language"):
            four.engine.create_run(replace(wrong, train=("language:nobody",)), 0, Limits())
    assert {name for name, _ in language.named_parameters()} == there
    assert len(four.engine.executor.bases) == bases


def test_a_forward_backward_is_plain_data(four: Tenants, samples: list[Sample]) -> None:
    documents = four.documents(0, samples)
    command = ForwardBackward(four.runs[0].name, documents, [[0, 1], [2, 3]], LEARN)
    results = four.engine.submit(command).result()
    assert len(results) == 4 and all(result.loss > 0 for result in results)
