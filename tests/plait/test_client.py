"""The primitives through the in-process client, on a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.client import ServiceClient, TrainingClient
from plait.errors import CheckpointError, ConfigError, DataError, ModelError, UnknownNameError
from plait.modalities import Image, Text
from plait.primitives.documents import document_of
from plait.stream import Message, Sample
from plait.trainer.engine.controller import EngineSettings
from plait.trainer.engine.runs import Run
from plait.trainer.spec import LoraSpec
from plait.types import AdamParams, Datum, ImageChunk, ModelInput, SamplingParams

Make = Callable[..., TrainingClient]


def told(question: tuple[Any, ...], answer: str) -> Sample:
    return Sample(messages=(Message("user", question), Message("assistant", (Text(answer),))))


def run_of(client: TrainingClient) -> Run:
    return client._engine.executor.runs[client._run]


def gradients(client: TrainingClient) -> dict[str, torch.Tensor]:
    run = run_of(client)
    pending = zip(run.trainable, run.gradients, strict=True)
    return {name: g.clone() for (_, name, _), g in pending if g is not None}


def weights(client: TrainingClient) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for _, name, p in client._built.model.trainable()}


def assert_equal(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def assert_close(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert (tensor - other[name]).norm() <= 1e-5 * other[name].norm() + 1e-9, name


def logprobs(output: Any) -> list[np.ndarray[Any, Any]]:
    return [row["logprobs"].to_numpy() for row in output.loss_fn_outputs]


def test_results_keep_their_order_whatever_the_packing(make: Make, samples: list[Sample]) -> None:
    client = make()
    data = [client.datum(sample) for sample in [*samples, samples[0]]]
    together = client.forward_backward(data).result()
    expected = gradients(client)
    longest = max(datum.model_input.length for datum in data)
    small = make(engine=EngineSettings(capacity=longest))
    packs = small._engine.plan([document_of(d, small._built) for d in data])
    assert len(packs) > 1
    apart = small.forward_backward(data).result()
    for datum, mine, other in zip(data, logprobs(together), logprobs(apart), strict=True):
        assert len(mine) == datum.model_input.length
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    assert together.metrics["loss:sum"] == pytest.approx(apart.metrics["loss:sum"], rel=1e-5)
    assert_close(gradients(small), expected)
    np.testing.assert_array_equal(logprobs(together)[0], logprobs(together)[3])


def test_sums_not_means(make: Make, samples: list[Sample]) -> None:
    client, double = make(), make()
    data = [client.datum(samples[1])]
    once = client.forward_backward(data).result().metrics
    twice = double.forward_backward(data * 2).result().metrics
    assert twice["loss:sum"] == pytest.approx(2 * once["loss:sum"], rel=1e-6)
    assert twice["weight:sum"] == 2 * once["weight:sum"] > 2
    assert_close(gradients(double), {name: 2 * g for name, g in gradients(client).items()})
    client.forward_backward(data).result()
    assert_close(gradients(client), gradients(double))


def test_loss_and_gradient_are_autograds(make: Make, tiny_language: Path) -> None:
    """Against transformers' own forward pass, with weights that differ by position."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_language)
    client = make(encoders={}, lora=None, train=("language",))
    tokens, targets, weight = [5, 9, 12, 7], [9, 12, 7, 2], [0.0, 1.0, 0.5, 2.0]
    datum = Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weight})
    output = client.forward_backward([datum]).result()
    found = plain(torch.tensor([tokens])).logits[0].log_softmax(-1)[range(4), targets]
    loss = -(found * torch.tensor(weight)).sum()
    loss.backward()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    expected = found.detach().numpy() * np.array([0, 1, 1, 1])
    np.testing.assert_allclose(logprobs(output)[0], expected, rtol=1e-4, atol=1e-6)
    theirs = {f"language.{name}": p.grad for name, p in plain.named_parameters()}
    assert_close(gradients(client), theirs)


def test_forward_gives_every_logprob_and_no_gradient(make: Make, samples: list[Sample]) -> None:
    client = make()
    datum = Datum(ModelInput.from_ints([5, 9, 12]), {"target_tokens": [9, 12, 7],
                                                     "weights": [0, 0, 1]})  # fmt: skip
    everywhere = logprobs(client.forward([datum]).result())[0]
    assert (everywhere < 0).all()
    assert gradients(client) == {}
    learned = logprobs(client.forward_backward([datum]).result())[0]
    assert learned[:2].tolist() == [0, 0]
    assert learned[2] == pytest.approx(everywhere[2], rel=1e-5)


def test_a_failed_call_adds_nothing(make: Make, samples: list[Sample], tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    source = samples[1].media()[0].file
    cut.write_bytes(Path(source).read_bytes()[:200])
    client = make()
    good = [client.datum(sample) for sample in samples]
    bad = client.datum(told((Image(cut),), "a disc."))
    capacity = max(datum.model_input.length for datum in [*good, bad])
    client = make(engine=EngineSettings(capacity=capacity))
    client.forward_backward(good).result()
    before = gradients(client)
    pending = run_of(client).pending_weight
    documents = [document_of(d, client._built) for d in [*good, bad]]
    broken_pack = next(i for i, p in enumerate(client._engine.plan(documents)) if 3 in p)
    assert broken_pack > 0, "the broken picture must come after a micro-batch that succeeded"
    with pytest.raises(DataError, match=r"cut\.png"):
        client.forward_backward([*good, bad]).result()
    assert_equal(gradients(client), before)
    assert run_of(client).pending_weight == pending
    with pytest.raises(ModelError, match=r"one failed: .*cut\.png"):
        client.optim_step(AdamParams()).result()
    assert_equal(gradients(client), before)
    client.optim_step(AdamParams()).result()


def test_what_cannot_be_used_is_refused(make: Make, samples: list[Sample]) -> None:
    client = make(train=("projector", "language"))
    text = ModelInput.from_ints([5, 9, 12])
    picture = Image(np.zeros((8, 8, 3), dtype=np.uint8))
    mixed = ModelInput((ImageChunk(picture),)).append_int(5)

    def refused(datum: Datum, match: str) -> None:
        with pytest.raises(DataError, match=match):
            client.forward_backward([datum])

    with pytest.raises(UnknownNameError, match="did you mean 'cross_entropy'"):
        client.forward_backward([client.datum(samples[0])], "cross_entropi")
    with pytest.raises(DataError, match="at least one datum"):
        client.forward_backward([])
    refused(Datum(text, {"target_tokens": [1, 2]}), "has 3 and it has 2")
    refused(Datum(text, {"target_tokens": [1, 2, 3], "weights": [1.0]}), "has 3 and it has 1")
    refused(Datum(text, {"weights": [1, 1, 1]}), "needs target_tokens")
    refused(Datum(text), "needs target_tokens")
    refused(Datum(ModelInput.empty(), {"target_tokens": []}), "at least one position")
    refused(Datum(text, {"target_tokens": [1, 2, 10_000]}), "a target must be from 0")
    for token in (-1, 10_000):
        refused(Datum(ModelInput.from_ints([token]), {"target_tokens": [1]}), "a token id must be")
    targets = {"target_tokens": [0, 0, 0, 5, 9]}
    refused(Datum(mixed, {**targets, "weights": [0, 1, 0, 1, 1]}), "next one is media")
    wrong = ModelInput((ImageChunk(picture, expected_tokens=9),)).append_int(5)
    refused(Datum(wrong, {**targets, "weights": [0, 0, 0, 1, 1]}), "expected_tokens must be")
    before = ModelInput.from_ints([5]).append(ImageChunk(picture)).append_int(5)
    inputs = {"target_tokens": [9, 0, 0, 0, 5, 9], "weights": [1, 0, 0, 0, 1, 1]}
    refused(Datum(before, inputs), "next one is media")
    assert gradients(client) == {}
    with pytest.raises(ModelError, match="optim_step needs gradients"):
        client.optim_step(AdamParams()).result()


def test_a_datum_longer_than_a_micro_batch_is_refused(make: Make) -> None:
    client = make(engine=EngineSettings(capacity=4))
    tokens = [5, 6, 7, 8, 9]
    datum = Datum(ModelInput.from_ints(tokens), {"target_tokens": tokens})
    with pytest.raises(DataError, match="fit into a micro-batch of 4 positions; this one has 5"):
        client.forward_backward([datum])


def test_divided_steps_follow_the_mean(make: Make, samples: list[Sample]) -> None:
    """Divided by the weights, twice the data makes the same step; undivided, it is a sum."""
    client, double = make(), make()
    data = [client.datum(sample) for sample in samples]
    params = AdamParams(learning_rate=0.01, eps=1e-8)
    client.forward_backward(data).result()
    double.forward_backward(data * 2).result()
    one = client.optim_step(params, divide_by_weight=True).result().metrics["grad_norm:mean"]
    two = double.optim_step(params, divide_by_weight=True).result().metrics["grad_norm:mean"]
    assert one == pytest.approx(two, rel=1e-5)
    assert_close(weights(client), weights(double))
    weight = client.forward_backward(data).result().metrics["weight:sum"]
    double.forward_backward(data).result()
    undivided = client.optim_step(params).result().metrics["grad_norm:mean"]
    divided = double.optim_step(params, divide_by_weight=True).result().metrics["grad_norm:mean"]
    assert undivided == pytest.approx(weight * divided, rel=1e-4)
    zero = [Datum(d.model_input, d.loss_fn_inputs | {"weights": [0.0] * d.model_input.length})
            for d in data]  # fmt: skip
    client.forward_backward(zero).result()
    with pytest.raises(ModelError, match="sum is above 0; it is 0"):
        client.optim_step(params, divide_by_weight=True).result()


def test_snapshots_are_immutable(make: Make, samples: list[Sample]) -> None:
    """Guarantee 8: sampling from old weights neither changes nor is changed by training."""
    client, alone = make(lora=LoraSpec(rank=4, dropout=0.2)), make(
        lora=LoraSpec(rank=4, dropout=0.2)
    )  # fmt: skip
    params, sampling = AdamParams(learning_rate=0.05), SamplingParams(max_tokens=6, seed=5)
    data = [client.datum(sample) for sample in samples]

    def train(one: TrainingClient) -> None:
        one.forward_backward(data)
        one.optim_step(params).result()

    torch.manual_seed(9)
    train(alone)
    train(alone)

    torch.manual_seed(9)
    old = client.save_weights_and_get_sampling_client()
    prompt = client.prompt(samples[1].media()[0])
    first = old.sample(prompt, 2, sampling).result()
    train(client)
    new = client.save_weights_and_get_sampling_client()
    client.forward_backward(data).result()
    pending = gradients(client)
    later = new.sample(prompt, 2, sampling).result()
    assert old.sample(prompt, 2, sampling).result() == first
    assert later.sequences[0].logprobs != first.sequences[0].logprobs
    assert_equal(gradients(client), pending)
    client.optim_step(params).result()
    assert_equal(weights(client), weights(alone))
    assert old.sample(prompt, 2, sampling).result() == first
    with pytest.raises(ConfigError, match="num_samples must be a whole number of at least 1"):
        old.sample(prompt, 0, sampling)


def test_a_call_without_a_seed_draws_anew(make: Make) -> None:
    client = make()
    sampler = client.save_weights_and_get_sampling_client()
    prompt = client.prompt("which")

    def tokens(**options: Any) -> list[int]:
        params = SamplingParams(max_tokens=12, stop=(), temperature=2.0, **options)
        return sampler.sample(prompt, 1, params).result().sequences[0].tokens

    assert tokens() != tokens()
    assert tokens(seed=4) == tokens(seed=4)
    assert tokens(top_k=1) == tokens(top_p=1e-6)


def test_a_stop_text_ends_a_sequence_and_stays_in_it(make: Make) -> None:
    client = make()
    sampler = client.save_weights_and_get_sampling_client()
    prompt, decode = client.prompt("which"), client.get_tokenizer().decode
    free = SamplingParams(max_tokens=30, stop=(), temperature=0.0)
    whole = decode(sampler.sample(prompt, 1, free).result().sequences[0].tokens)
    for stop in (whole[3:5], ["not there", whole[3:5]]):
        params = SamplingParams(max_tokens=30, stop=stop, temperature=0.0)
        (row,) = sampler.sample(prompt, 1, params).result().sequences
        assert row.stop_reason == "stop"
        assert whole[3:5] in decode(row.tokens) and whole.startswith(decode(row.tokens))
        assert whole[3:5] not in decode(row.tokens[:-1])
    with pytest.raises(ConfigError, match="a stop token must be a whole number in"):
        sampler.sample(prompt, 1, SamplingParams(stop=[10_000]))


def test_a_rate_of_an_unknown_part_is_refused_at_once(make: Make) -> None:
    client = make()
    with pytest.raises(UnknownNameError, match="did you mean 'projector'"):
        client.optim_step(AdamParams(part_learning_rates={"projecter": 2e-3}))


def test_saved_state_goes_on_bit_equal(make: Make, samples: list[Sample]) -> None:
    lora = LoraSpec(rank=4, dropout=0.3)
    client = make(lora=lora)
    data = [client.datum(sample) for sample in samples]
    params = AdamParams(learning_rate=0.01, weight_decay=0.1)

    def steps(one: TrainingClient, count: int) -> None:
        for _ in range(count):
            one.forward_backward(data)
            one.optim_step(params).result()

    steps(client, 2)
    path = client.save_state("two").result().path
    assert path == f"tinker://{client.run_id}/weights/two"
    saved = weights(client)
    steps(client, 2)
    other = make(lora=lora)
    other.load_state_with_optimizer(path).result()
    assert_equal(weights(other), saved)
    steps(other, 2)
    assert_equal(weights(other), weights(client))

    client.load_state(path).result()
    assert_equal(weights(client), saved)
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        client.load_state(f"tinker://{client.run_id}/weights/none")
    for name in ("../up", "", "x" * 201):
        with pytest.raises(ConfigError, match="1 to 200 bytes, no / and no leading dot"):
            client.save_state(name)
    for cursor in ({1: 2}, (1, 2), np.int64(3), float("nan"), {"a": {1}}):
        with pytest.raises(ConfigError, match="must be plain JSON"):
            client.save_state("cursor", cursor=cursor)
    with pytest.raises(ConfigError, match="a path has the form"):
        client.load_state("tinker://../weights/x")


def test_a_refused_state_changes_nothing(make: Make, samples: list[Sample]) -> None:
    """Neither weights nor moments nor what pends."""
    client, partly = make(), make(train=("language",))
    data = [client.datum(sample) for sample in samples]

    def step(one: TrainingClient) -> None:
        one.forward_backward(data)
        one.optim_step(AdamParams(learning_rate=0.05)).result()

    light = client.save_weights_for_sampler("light").result().path
    step(partly)
    other = partly.save_state("other").result().path
    layers = ("projector", "language:q_proj"), ("projector", "language:o_proj")
    narrow, narrower = (make(train=train) for train in layers)
    step(narrow)
    alike = narrow.save_state("alike").result().path
    with pytest.raises(CheckpointError, match=r"for others: .*o_proj.* trains here alone"):
        narrower.load_state_with_optimizer(alike).result()
    step(client)
    client.forward_backward(data).result()

    optimizer = run_of(client).optimizer
    assert optimizer is not None

    def held() -> dict[str, torch.Tensor]:
        moments = optimizer.state_dict()["state"]
        named = {f"{n}.{key}": v.clone() for n, row in moments.items() for key, v in row.items()}
        assert named
        pending = {f"gradient of {name}": g for name, g in gradients(client).items()}
        return named | weights(client) | pending

    before = held()
    for path, told_so in {light: "holds weights only", other: "has it for language, and"}.items():
        with pytest.raises(CheckpointError, match=told_so):
            client.load_state_with_optimizer(path).result()
        assert_equal(held(), before)
    assert run_of(client).steps == 1
    client.load_state(other).result()


def test_saved_weights_sample_in_a_client_of_their_own(
    make: Make, samples: list[Sample], tmp_path: Path
) -> None:
    client = make()
    data = [client.datum(sample) for sample in samples]
    client.forward_backward(data)
    client.optim_step(AdamParams(learning_rate=0.05)).result()
    path = client.save_weights_for_sampler("one").result().path
    here = client.save_weights_and_get_sampling_client()
    there = ServiceClient(tmp_path / "states").create_sampling_client(path)
    params = SamplingParams(max_tokens=5, temperature=0.0)
    prompt = client.prompt(Text("which: "), samples[1].media()[0])
    assert there.sample(prompt, 1, params).result() == here.sample(prompt, 1, params).result()
    there.close()


def test_options_of_the_lora_client(tiny_language: Path, tmp_path: Path) -> None:
    service = ServiceClient(tmp_path)
    base = str(tiny_language)
    client = service.create_lora_training_client(base, rank=2, train_mlp=False, train=["language"])
    names = [name for _, name, _ in client._built.model.trainable()]
    assert all(".self_attn." in name for name in names)
    info = client.get_info()
    assert (info.base_model, info.is_lora, info.lora_rank) == (base, True, 2)
    assert info.trainable == {"language": sum(w.numel() for w in weights(client).values())}
    client.close()
    with pytest.raises(ConfigError, match="set train_attn, train_mlp or train_unembed"):
        service.create_lora_training_client(base, train_mlp=False, train_attn=False)
    with pytest.raises(ConfigError, match="needs layers"):
        service.create_lora_training_client(base, train_mlp=False, train_attn=False)
    with pytest.raises(ConfigError, match="either model_path or base_model"):
        service.create_sampling_client()


def test_a_run_counts_its_own_parameters(tiny_language: Path, tmp_path: Path) -> None:
    """Not those of the runs that it shares its language model with."""
    with ServiceClient(tmp_path) as service:
        held = [service.create_lora_training_client(str(tiny_language), rank=n) for n in (2, 8)]
        for client in held:
            mine = sum(weight.numel() for weight in weights(client).values())
            assert client.get_info().trainable["language"] == mine


def test_datums_are_what_is_rendered(make: Make, samples: list[Sample]) -> None:
    client = make()
    for sample in samples:
        datum = client.datum(sample)
        length = datum.model_input.length
        inputs = datum.loss_fn_inputs
        assert inputs["target_tokens"].shape == inputs["weights"].shape == [length]
        assert inputs["weights"].tolist()[-1] == 1.0
    prompt = client.prompt("which: ", samples[2].media()[0])
    assert prompt == client.prompt(samples[2].messages[0])
    with pytest.raises(ConfigError, match="not of both"):
        client.prompt("which", samples[0].messages[0])
