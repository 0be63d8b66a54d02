"""The engine's commands and its plan of micro-batches."""

import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.errors import ConfigError, DataError, ModelError, Origin, UnknownNameError
from plait.modalities import Limits, Text
from plait.stream import Document, Message, Sample, render
from plait.trainer.build import Built
from plait.trainer.config import config_from
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.engine.dropouts import draws
from plait.trainer.engine.planning import plan
from plait.trainer.losses import Loss, LossBatch
from plait.trainer.model import LEARN, Objective
from plait.trainer.optimiser import StepSettings
from plait.trainer.places import Place
from plait.trainer.sampling.settings import SamplerSettings
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


def test_data_are_called_by_their_number_in_the_call(lone: Lone) -> None:
    """Whatever the packing, which nobody sees."""
    data = [document(7) for _ in range(6)]
    data[4] = replace(data[4], weights=np.full(7, np.inf, dtype=np.float32))
    with pytest.raises(DataError, match="that of datum 4 is"):
        lone.forward_backward(data)


def endless(batch: LossBatch) -> torch.Tensor:
    """Documents of weight 3 have a finite loss, and a gradient that is not."""
    values, spoilt = batch.logprobs.clone(), batch.weights == 3
    found = batch.logprobs[spoilt]
    values[spoilt] = (found - found.detach()).abs().sqrt()
    return batch.per_document(values)


def test_the_datum_whose_gradient_is_not_finite_is_found(lone: Lone) -> None:
    data = [document(4) for _ in range(3)]  # of one micro-batch
    data[1] = replace(data[1], weights=np.full(4, 3, dtype=np.float32))
    objective = Objective(Loss(name="endless", function=endless, inputs=("weights",)), {})
    with pytest.raises(DataError, match=r"those of datum 1 are not: nothing was added"):
        lone.engine.forward_backward(lone.name, data, objective).result()
    assert all(gradient is None for gradient in lone.run.gradients)
    lone.engine.forward_backward(lone.name, [data[0], data[2]], objective).result()


def test_loading_weights_forgets_what_failed_before(lone: Lone, tmp_path: Path) -> None:
    place, store = Place("run", "sampler_weights", "one"), Store(tmp_path)
    lone.engine.submit(commands.SaveState(lone.name, store, place, weights_only=True)).result()
    bad = replace(document(5), weights=np.full(5, np.inf, dtype=np.float32))
    with pytest.raises(DataError):
        lone.forward_backward([bad])
    source = Source(store, place.path)
    lone.engine.submit(commands.LoadState(lone.name, source, with_optimizer=False)).result()
    lone.forward_backward([document(5)])
    lone.step()


def test_a_step_says_whether_there_are_gradients_of_others(lone: Lone) -> None:
    bad = replace(document(5), weights=np.full(5, np.inf, dtype=np.float32))
    with pytest.raises(DataError):
        lone.forward_backward([bad])
    with pytest.raises(ModelError, match="no gradients of others: call forward_backward again"):
        lone.step()


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5])
def test_a_seed_is_one_that_torch_can_have(engine: Engine, spec: ModelSpec, seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed must be a whole number"):
        engine.create_run(spec, seed, Limits())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rank": 2.5}, r"lora\.rank must be a whole number"),
        ({"rank": True}, r"lora\.rank must be a whole number"),
        ({"alpha": float("nan")}, r"lora\.alpha must be a number above 0"),
        ({"targets": "q_proj"}, r"lora\.targets must be a list"),
        ({"targets": ()}, r"lora\.targets must be a list"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LoraSpec(**wrong)


def test_a_rate_that_a_layer_hands_to_a_function_counts_as_dropout(lone: Lone) -> None:
    """OPT, BioGPT and Whisper have no layer of dropout, and DINOv2 drops whole paths."""
    layer = lone.built.model.language.get_decoder().layers[0]
    assert not draws(lone.built)
    for name in ("dropout", "activation_dropout", "drop_prob"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, name, 0.1, raising=False)
            assert draws(lone.built)


def test_untrained_parameters_are_named(lone: Lone) -> None:
    lone.forward_backward([document(5)])
    _, name, _ = lone.run.trainable[-1]
    lone.run.gradients[-1] = None
    with pytest.raises(ModelError, match=f"1 parameters got no gradient.*{name}"):
        lone.step()


def test_a_step_that_fails_in_its_middle_is_not_stepped_on_again(
    lone: Lone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, store = Place("run", "weights", "one"), Store(tmp_path)
    lone.forward_backward([document(5)])
    lone.step()
    lone.forward_backward([document(5)])
    saved = lone.engine.submit(commands.SaveState(lone.name, store, place))
    saved.result()
    lone.step(divide_by_weight=True)
    after = [parameter.detach().clone() for *_, parameter in lone.run.trainable]

    def fails(self: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    lone.forward_backward([document(5)])
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fails)
        with pytest.raises(ModelError, match=r"in its middle \(CUDA out of memory\)"):
            lone.step(divide_by_weight=True)
    more = commands.SaveState(lone.name, store, Place("run", "weights", "two"))
    for refused in (
        lone.step,
        lambda: lone.forward_backward([document(5)]),
        lambda: lone.forward_backward([document(5)], backward=False),
        lambda: lone.engine.submit(more).result(),
        lambda: lone.engine.submit(commands.TakeView(lone.name, "view")).result(),
    ):
        with pytest.raises(ModelError, match="load_state_with_optimizer goes on"):
            refused()
    source = Source(store, place.path)
    lone.engine.submit(commands.LoadState(lone.name, source, True)).result()
    lone.step(divide_by_weight=True)
    for mine, (*_, parameter) in zip(after, lone.run.trainable, strict=True):
        assert torch.equal(mine, parameter)


def test_weights_alone_do_not_bring_back_what_an_optimiser_remembers_of_half_a_step(
    lone: Lone, tmp_path: Path
) -> None:
    place, store = Place("run", "sampler_weights", "one"), Store(tmp_path)
    lone.forward_backward([document(5)])
    lone.step()
    lone.engine.submit(commands.SaveState(lone.name, store, place, weights_only=True)).result()
    load = commands.LoadState(lone.name, Source(store, place.path), False)
    before = lone.run.optimizer
    lone.engine.submit(load).result()
    assert lone.run.optimizer is before is not None
    lone.run.spoilt = "memory ended"
    lone.engine.submit(load).result()
    assert lone.run.optimizer is None
    lone.forward_backward([document(5)])
    lone.step()


def test_a_divided_step_divides_by_the_weights_of_all_calls_before_it(lone: Lone) -> None:
    lone.forward_backward([document(5), document(3)])
    together = lone.step(divide_by_weight=True)["grad_norm:mean"]
    again = Lone(lone.built.spec, EngineSettings(capacity=12))
    for length in (5, 3):
        again.forward_backward([document(length)])
    assert again.step(divide_by_weight=True)["grad_norm:mean"] == pytest.approx(together, rel=1e-5)
    again.engine.close()


@pytest.mark.parametrize("weight", [0.0, -2.0])
def test_gradients_are_not_divided_by_what_would_turn_them_round(lone: Lone, weight: float) -> None:
    weights = np.full(5, weight, dtype=np.float32)
    lone.forward_backward([replace(document(5), weights=weights)])
    with pytest.raises(ModelError, match=f"sum is above 0; it is {5 * weight:g}"):
        lone.step(divide_by_weight=True)
    lone.step()


def test_the_garbage_collector_waits_for_no_lock(engine: Engine) -> None:
    """It may drop a client in any line, of a thread that holds any lock."""
    with engine._lock:
        dropping = threading.Thread(target=engine.discard, args=[commands.DropRun("nobody")])
        ending = threading.Thread(target=engine._work.end)
        for thread in (dropping, ending):
            thread.start()
            thread.join(20)
            assert not thread.is_alive()


def test_what_was_queued_before_a_run_is_dropped_is_done(lone: Lone) -> None:
    computed = lone.engine.forward_backward(lone.name, [document(5)])
    lone.engine.discard(commands.DropRun(lone.name))
    assert len(computed.result()) == 1
    lone.engine.submit(commands.DropRun("nobody")).result()  # what came before it is done
    assert lone.name not in lone.engine.executor.runs


@pytest.mark.parametrize(
    ("name", "value"),
    [("capacity", 0), ("capacity", "4096"), ("max_documents", 0), ("sampler_memory_mb", -3)],
)
def test_settings_that_nothing_can_be_computed_with_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1"):
        EngineSettings(**{name: value})


def test_no_document_is_nothing_to_compute(engine: Engine, lone: Lone) -> None:
    with pytest.raises(DataError, match="at least one document"):
        engine.forward_backward(lone.name, [])


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
