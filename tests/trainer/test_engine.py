"""The engine's commands, its plan of micro-batches, and the optimiser's arithmetic."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from plait.errors import ConfigError, DataError, ModelError, Origin, UnknownNameError
from plait.modalities import Limits, Text
from plait.stream import Document, Message, Sample, render
from plait.trainer.build import Built
from plait.trainer.config import TrainConfig, config_from
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.engine.planning import plan
from plait.trainer.model import LEARN
from plait.trainer.optimiser import StepSettings, make_optimizer, prepare_step
from plait.trainer.places import Place
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.schedule import settings_at
from plait.trainer.source import Source
from plait.trainer.spec import LoraSpec, ModelSpec
from plait.trainer.store import Store


@pytest.fixture
def spec(tiny_values: dict[str, Any]) -> ModelSpec:
    return replace(config_from(tiny_values).model, encoders={}, lora=LoraSpec(rank=2))


class Lone:
    """An engine with one run."""

    def __init__(self, spec: ModelSpec, settings: EngineSettings | None = None, seed: int = 0):
        self.engine = Engine(settings)
        self.name, self.built = self.engine.create_run(spec, seed, Limits())
        self.run = self.engine.executor.runs[self.name]

    def forward_backward(self, documents: list[Document], *, backward: bool = True) -> Any:
        return self.engine.forward_backward(self.name, documents, backward=backward).result()

    def step(self, **options: Any) -> Any:
        command = commands.OptimStep(self.name, StepSettings(), **options)
        return self.engine.submit(command).result()


@pytest.fixture
def lone(spec: ModelSpec) -> Iterator[Lone]:
    lone = Lone(spec, EngineSettings(capacity=12))
    yield lone
    lone.engine.close()


@pytest.fixture
def engine(lone: Lone) -> Engine:
    return lone.engine


def document(length: int, group: int | None = None) -> Document:
    ids = np.arange(5, 5 + length)
    return Document(
        token_ids=ids,
        targets=ids + 1,
        weights=np.ones(length, dtype=np.float32),
        positions=np.arange(length),
        group=group,
    )


def gradients(lone: Lone) -> list[torch.Tensor | None]:
    return [None if g is None else g.clone() for g in lone.run.gradients]


def test_a_plan_covers_each_document_once_within_the_capacity() -> None:
    generator = np.random.default_rng(0)
    documents = [document(int(n)) for n in generator.integers(1, 13, 40)]
    batches = plan(documents, 12)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert all(sum(documents[i].length for i in batch) <= 12 for batch in batches)
    assert plan(documents, 12) == batches
    assert plan([], 12) == []


def test_what_fits_is_one_micro_batch_in_its_order() -> None:
    assert plan([document(n) for n in (2, 5, 1, 4)], 12) == [[0, 1, 2, 3]]
    assert all(len(batch) <= 2 for batch in plan([document(2)] * 5, 12, 2))


def test_what_fits_into_a_micro_batch_of_each_rank_is_spread_evenly() -> None:
    documents = [document(n) for n in (2, 5, 1, 4)]
    spread = plan(documents, 12, ranks=2)
    assert [sum(documents[i].length for i in batch) for batch in spread] == [6, 6]
    assert sorted(i for batch in spread for i in batch) == [0, 1, 2, 3]
    assert plan(documents[:1], 12, ranks=2) == [[0]]
    pairs = [document(3, group=n // 2) for n in range(4)]
    assert sorted(map(sorted, plan(pairs, 12, ranks=2))) == [[0, 1], [2, 3]]
    many = plan([document(10)] * 5, 12, ranks=2)
    assert sorted(many) == [[n] for n in range(5)]


def test_documents_of_a_group_stay_together() -> None:
    documents = [document(5, group=1), document(6), document(5), document(6, group=1)]
    (together,) = [batch for batch in plan(documents, 12) if 0 in batch]
    assert 3 in together
    with pytest.raises(DataError):
        plan([document(7, group=1), document(7, group=1)], 12)


def test_commands_and_results_are_plain_data(lone: Lone, tmp_path: Path) -> None:
    """They will travel between processes."""
    engine, run = lone.engine, lone.name
    documents = [document(3), document(4)]
    prompt = render(
        Sample(messages=(Message("user", (Text("a"),)),)),
        lone.built.tokenizer, lone.built.layout, for_generation=True,
    )  # fmt: skip
    settings = SamplerSettings(max_tokens=2)
    store, place = Store(tmp_path), Place("run", "weights", "one")
    for command in [
        commands.ForwardBackward(run, documents, plan(documents, 12), LEARN),
        commands.OptimStep(run, StepSettings(), divide_by_weight=True),
        commands.SaveState(run, store, place, cursor={"row": 3}),
        commands.LoadState(run, Source(store, place.path), with_optimizer=True),
        commands.TakeView(run, "one"),
        commands.Sample("one", prompt, settings, 2, prompt_logprobs=True, request="a"),
        commands.CancelSample("one", "a"),
        commands.DropView("one"),
    ]:
        copy: Any = pickle.loads(pickle.dumps(command))
        result = engine.submit(copy).result()
        if not isinstance(result, Built):  # which stays in its process
            pickle.loads(pickle.dumps(result))
        if isinstance(command, commands.LoadState):
            assert result == {"row": 3}
    with pytest.raises(UnknownNameError, match="unknown snapshot 'seven'"):
        engine.submit(commands.Sample("seven", prompt, SamplerSettings(), 1)).result()
    with pytest.raises(UnknownNameError, match="unknown run 'seven'"):
        engine.forward_backward("seven", documents).result()


def test_results_are_each_documents_own(lone: Lone) -> None:
    documents = [document(9), document(3), document(7)]
    results = lone.forward_backward(documents, backward=False)
    assert [len(result.logprobs) for result in results] == [9, 3, 7]
    for one, result in zip(documents, results, strict=True):
        assert result.loss == pytest.approx(-result.logprobs.sum(), rel=1e-5)
        assert result.weight == one.length
    np.testing.assert_allclose(results[0].logprobs[:3], results[1].logprobs, rtol=1e-5)


def equal(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    return all(a is not None and b is not None and torch.equal(a, b)
               for a, b in zip(one, other, strict=True))  # fmt: skip


def test_a_gradient_that_is_not_finite_changes_nothing(lone: Lone) -> None:
    lone.forward_backward([document(5)])
    _, _, first = lone.run.trainable[0]
    assert lone.run.gradients[0] is not None
    lone.run.gradients[0][0] = torch.inf
    before, weights = gradients(lone), first.detach().clone()
    with pytest.raises(ModelError, match="gradients must be finite; their norm is inf"):
        lone.step(divide_by_weight=True)
    assert equal(gradients(lone), before)
    assert torch.equal(first, weights)


def test_a_loss_that_is_not_finite_adds_nothing_and_names_its_datum(lone: Lone) -> None:
    bad = replace(
        document(12), weights=np.full(12, np.inf, dtype=np.float32), origin=Origin("pets", 7)
    )
    lone.forward_backward([document(12)])
    before = gradients(lone)
    with pytest.raises(DataError, match=r"a loss must be finite; .*dataset pets, row 7"):
        lone.forward_backward([document(12), bad])
    assert equal(gradients(lone), before)
    with pytest.raises(ModelError, match=r"one failed: a loss must be finite"):
        lone.step()
    assert equal(gradients(lone), before)
    lone.step()


def test_untrained_parameters_are_named(lone: Lone) -> None:
    lone.forward_backward([document(5)])
    _, name, _ = lone.run.trainable[-1]
    lone.run.gradients[-1] = None
    with pytest.raises(ModelError, match=f"1 parameters got no gradient.*{name}"):
        lone.step()


class Toy(nn.Module):
    """A matrix that decays and a bias that does not, of two parts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator))

    def trainable(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        yield "language", "matrix", self.matrix
        yield "projector", "bias", self.bias


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_steps_are_adamw_on_divided_clipped_gradients(clip: float) -> None:
    """Against the formulas of Loshchilov and Hutter (2019), in float64."""
    toy = Toy()
    trainable = list(toy.trainable())
    settings = StepSettings(
        learning_rate=0.1, weight_decay=0.2, grad_clip_norm=clip,
        part_learning_rates={"projector": 0.3},
    )  # fmt: skip
    assert (settings.beta1, settings.beta2, settings.eps) == (0.9, 0.95, 1e-12)
    optimizer = make_optimizer(trainable)
    mine = [(toy.matrix.detach().clone(), 0.1, 0.2), (toy.bias.detach().clone(), 0.3, 0.0)]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value, _, _ in mine]
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 5):
        sums = [torch.randn(v.shape, dtype=torch.float64, generator=generator) for v, _, _ in mine]
        toy.matrix.grad, toy.bias.grad = (gradient.clone() for gradient in sums)
        metrics = prepare_step(trainable, optimizer, settings, divide_by=4.0)
        optimizer.step()
        means = [gradient / 4 for gradient in sums]
        norm = float(torch.cat([gradient.flatten() for gradient in means]).norm())
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-12)
        scale = min(1.0, clip / norm) if clip else 1.0
        for (value, rate, decay), (first, second), mean in zip(mine, moments, means, strict=True):
            gradient = mean * scale
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.95).add_(0.05 * gradient**2)
            value.mul_(1 - rate * decay)
            corrected = second.div(1 - 0.95**step).sqrt() + 1e-12
            value.sub_(rate * first / (1 - 0.9**step) / corrected)
        torch.testing.assert_close(toy.matrix.detach(), mine[0][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(toy.bias.detach(), mine[1][0], rtol=1e-10, atol=1e-12)


def test_a_rate_of_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'projecter'; did you mean 'projector'"):
        StepSettings(part_learning_rates={"projecter": 2e-3})
    with pytest.raises(ConfigError, match=r"part_learning_rates\.vision must be a number"):
        StepSettings(part_learning_rates={"vision": -1.0})
    for name, value in {"learning_rate": float("nan"), "beta2": 1.0, "eps": 0.0}.items():
        with pytest.raises(ConfigError, match=f"{name} must be a number"):
            StepSettings(**{name: value})


def test_rates_rise_linearly_and_fall_along_a_cosine() -> None:
    config = TrainConfig(
        steps=10, warmup=4, learning_rate=1.0, final_share=0.1,
        part_learning_rates={"projector": 2.0}, weight_decay=0.3, grad_clip_norm=0.7,
    )  # fmt: skip
    rates = [settings_at(step, config).learning_rate for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[4:]))
    settings = settings_at(1, config)
    assert settings.part_learning_rates == {"projector": 1.0}
    assert (settings.weight_decay, settings.grad_clip_norm) == (0.3, 0.7)


def test_dropout_draws_from_the_run_s_own_state(spec: ModelSpec) -> None:
    """Two runs in one process, and whatever else draws, change nothing of one another."""
    spec = replace(spec, lora=LoraSpec(rank=2, dropout=0.5))

    def losses(lones: list[Lone]) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in lones]
        for _ in range(3):
            for mine, lone in zip(found, lones, strict=True):
                torch.rand(1)
                [result] = lone.forward_backward([document(10)])
                mine.append(result.loss)
        for lone in lones:
            lone.engine.close()
        return found

    def made(seed: int) -> Lone:
        lone = Lone(spec, seed=seed)
        for _, name, parameter in lone.run.trainable:
            if "lora_B" in name:  # zeros at the start, where dropout changes nothing
                torch.nn.init.ones_(parameter)
        return lone

    [alone] = losses([made(0)])
    assert len(set(alone)) == 3
    beside, other = losses([made(0), made(1)])
    assert beside == alone
    assert other != alone
