"""What clients hold, when they let it go, and that no queued command is lost."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plait.client import SamplingClient, ServiceClient, TrainingClient
from plait.errors import ModelError
from plait.modalities import Text
from plait.stream import Message, Sample
from plait.trainer.spec import ModelSpec
from plait.types import AdamParams, SamplingParams

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, stop=())


def snapshots(client: TrainingClient) -> set[str]:
    """Names of those that the engine holds when what is queued is done."""
    client.forward([client.datum(told("a"))]).result()
    return set(client._engine.executor.views)


def told(answer: str) -> Sample:
    return Sample((Message("user", (Text("which"),)), Message("assistant", (Text(answer),))))


def tokens(sampler: SamplingClient) -> list[float]:
    response = sampler.sample(sampler.prompt("which"), 1, GREEDY).result()
    return response.sequences[0].logprobs


def train(client: TrainingClient) -> None:
    client.forward_backward([client.datum(told("a disc."))])
    client.optim_step(AdamParams(learning_rate=0.1)).result()


def test_a_closed_snapshot_leaves_the_engine_and_the_others(
    make: Callable[..., TrainingClient],
) -> None:
    client = make()
    first = client.save_weights_and_get_sampling_client()
    train(client)
    with client.save_weights_and_get_sampling_client() as second:
        kept = tokens(second)
        first.close()
        first.close()
        assert snapshots(client) == {second._view}
        train(client)
        third = client.save_weights_and_get_sampling_client()
        train(client)
        assert tokens(second) == kept, "a later snapshot must not take its place"
        assert tokens(third) != kept
    assert snapshots(client) == {third._view}
    with pytest.raises(ModelError, match="this client is closed"):
        tokens(second)
    kept = tokens(third)
    client.close()
    assert tokens(third) == kept, "a snapshot outlives the client that trained it"
    third.close()
    with pytest.raises(ModelError, match="client is closed"):
        tokens(third)


def test_a_dropped_snapshot_is_forgotten_when_its_commands_are_done(
    make: Callable[..., TrainingClient],
) -> None:
    client = make()
    prompt = client.prompt("which")
    sampled = client.save_weights_and_get_sampling_client().sample(prompt, 1, GREEDY)
    assert len(sampled.result().sequences[0].tokens) == 4
    gc.collect()
    assert snapshots(client) == set()


def test_a_dropped_client_frees_its_model(spec: ModelSpec, tmp_path: Path) -> None:
    client = ServiceClient(tmp_path).create_training_client(spec)
    model, worker = weakref.ref(client._built.model), client._engine._worker
    language = weakref.ref(client._built.model.language)
    last = client.forward([client.datum(told("a disc."))])
    snapshot = client.save_weights_and_get_sampling_client()
    del client
    gc.collect()
    assert len(tokens(snapshot)) == 4
    gc.collect()
    assert model() is None and worker.is_alive(), "a snapshot's client still samples"
    assert language() is not None
    del snapshot
    gc.collect()
    worker.join(timeout=20)
    assert not worker.is_alive()
    gc.collect()
    assert language() is None
    assert last.result().metrics["loss:sum"] > 0


def test_clients_are_context_managers(spec: ModelSpec, tmp_path: Path) -> None:
    with ServiceClient(tmp_path) as service:
        with service.create_training_client(spec) as client:
            last = client.forward([client.datum(told("a disc."))])
        assert last._future.done() and not service._engine.executor.runs
        with pytest.raises(ModelError, match="client is closed"):
            client.forward([client.datum(told("a disc."))])
    assert not service._engine._worker.is_alive()
    with pytest.raises(ModelError, match="engine is closed"):
        service.create_training_client(spec)


def test_giving_up_waiting_does_not_take_a_command_back(
    make: Callable[..., TrainingClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the step behind it would run on half of the gradients."""
    client, patient = make(), make()
    data, params = [client.datum(told("a disc."))], AdamParams(learning_rate=0.1)
    patient.forward_backward(data)
    patient.forward_backward(data)
    expected = patient.optim_step(params).result().metrics
    gate, model = threading.Event(), client._built.model
    compute = model.score

    def slow(*values: Any, **named: Any) -> Any:
        assert gate.wait(30)
        return compute(*values, **named)

    monkeypatch.setattr(model, "score", slow)

    async def main() -> None:
        client.forward_backward(data)
        second = client.forward_backward(data)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second, 0.05)
        step = client.optim_step(params)
        gate.set()
        assert len((await asyncio.wait_for(second, 30)).loss_fn_outputs) == 1
        assert (await asyncio.wait_for(step, 30)).metrics == expected

    asyncio.run(main())
