"""Checkpoints through clients: names, lists, lifetimes, and what is refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plait.client import ServiceClient, TrainingClient
from plait.errors import CheckpointError, ConfigError, DamagedCheckpointError
from plait.stream import Sample
from plait.trainer.spec import LoraSpec, ModelSpec
from plait.types import AdamParams, SamplingParams

STEP = AdamParams(learning_rate=0.02)


class Clock:
    now = 500.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(tmp_path: Path, clock: Clock) -> Any:
    with ServiceClient(tmp_path / "states", clock=clock) as made:
        yield made


def train(client: TrainingClient, samples: list[Sample], steps: int = 1) -> None:
    data = [client.datum(sample) for sample in samples]
    for _ in range(steps):
        client.forward_backward(data)
        client.optim_step(STEP).result()


def test_a_name_is_refused_or_overwritten_whole(
    service: ServiceClient, spec: ModelSpec, samples: list[Sample]
) -> None:
    client = service.create_training_client(spec, seed=3)
    first = client.save_state("one").result()
    assert client.save_state("same").result().digest == first.digest
    train(client, samples)
    with pytest.raises(CheckpointError, match="/weights/one is there already"):
        client.save_state("one").result()
    with pytest.raises(CheckpointError, match="/weights/same is there already"):
        client.save_state("same", ttl_seconds=5).result()
    (row,) = [row for row in service.list_checkpoints() if row.path == first.path]
    assert row.digest == first.digest
    second = client.save_state("one", overwrite=True).result()
    assert (second.path, second.digest != first.digest) == (first.path, True)
    client.save_weights_for_sampler("one").result()  # of the other kind: another name
    with pytest.raises(CheckpointError, match="/sampler_weights/one is there already"):
        client.save_weights_and_get_sampling_client("one")
    client.save_weights_for_sampler("one", overwrite=True).result()


def test_what_is_loaded_is_what_was_saved(
    service: ServiceClient, spec: ModelSpec, samples: list[Sample]
) -> None:
    """The digest is over all that a run holds: gradients that pend and the cursor with it."""
    dropped = replace(spec, lora=LoraSpec(rank=4, dropout=0.2))
    client = service.create_training_client(dropped, seed=3)
    train(client, samples)
    client.forward_backward([client.datum(samples[1])]).result()
    saved = client.save_state("one", cursor={"row": 3}).result()
    assert client.save_state("other", cursor={"row": 4}).result().digest != saved.digest
    again = service.create_training_client_from_state_with_optimizer(saved.path)
    assert again.restored is not None and again.restored.cursor == {"row": 3}
    assert again.save_state("one", cursor={"row": 3}).result().digest == saved.digest
    for one in (client, again):
        one.optim_step(STEP)
        train(one, samples)
    ends = [one.save_state("end").result().digest for one in (client, again)]
    assert ends[0] == ends[1]


def test_checkpoints_are_listed_given_a_time_and_deleted(
    service: ServiceClient, clock: Clock, spec: ModelSpec, samples: list[Sample]
) -> None:
    client = service.create_training_client(spec, user_metadata={"who": "me"})
    train(client, samples)
    one = client.save_state("one").result()
    clock.now += 1
    two = client.save_weights_for_sampler("two", ttl_seconds=60).result()
    rows = service.list_checkpoints()
    assert [(r.path, r.digest, r.step, r.saved_at, r.expires_at) for r in rows] == [
        (one.path, one.digest, 1, 500.0, None),
        (two.path, two.digest, None, 501.0, 561.0),
    ]
    assert {r.base_model for r in rows} == {spec.language}
    assert rows[0].user_metadata == {"who": "me"} and rows[0].size_bytes > rows[1].size_bytes > 0
    service.set_checkpoint_ttl(one.path, 100)
    service.set_checkpoint_ttl(two.path, None)
    clock.now += 100
    assert [row.path for row in service.list_checkpoints()] == [two.path]
    service.delete_checkpoint(two.path)
    assert service.list_checkpoints() == []
    for call in (service.delete_checkpoint, lambda p: service.set_checkpoint_ttl(p, 5)):
        with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
            call(two.path)
    with pytest.raises(ConfigError, match="a path has the form"):
        service.delete_checkpoint("states")
    for wrong in (0, -3):
        with pytest.raises(ConfigError, match="ttl_seconds must be a number above 0"):
            client.save_state("three", wrong)


@pytest.mark.parametrize("how", ["deleted", "expired"])
def test_sampling_and_loading_what_is_gone_is_refused_by_name(
    service: ServiceClient, clock: Clock, spec: ModelSpec, how: str
) -> None:
    client = service.create_training_client(spec)
    path = client.save_weights_for_sampler("one", ttl_seconds=60).result().path
    open_before = service.create_sampling_client(path)
    if how == "deleted":
        service.delete_checkpoint(path)
    else:
        clock.now += 60
    told = f"{path} (is neither a checkpoint nor a run|has expired)"
    for call in (service.create_sampling_client, client.load_state,
                 service.create_training_client_from_state):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            call(path)
    params = SamplingParams(max_tokens=2, temperature=0)
    assert open_before.sample(client.prompt("which"), 1, params).result().sequences


def test_what_goes_between_the_call_and_its_turn_is_refused_too(
    service: ServiceClient, spec: ModelSpec, samples: list[Sample]
) -> None:
    client = service.create_training_client(spec)
    path = client.save_state("one").result().path
    data = [client.datum(sample) for sample in samples]
    busy = [client.forward_backward(data) for _ in range(10)]
    loading = client.load_state(path)
    service.delete_checkpoint(path)
    busy[-1].result()
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        loading.result()


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(
    service: ServiceClient, spec: ModelSpec, samples: list[Sample], tmp_path: Path
) -> None:
    client = service.create_training_client(spec, seed=3)
    train(client, samples)
    first = client.save_state("first").result()
    train(client, samples)
    second = client.save_state("second").result()
    folder = tmp_path / "states" / second.path.removeprefix("tinker://")
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "encoders.safetensors",
                     "lifetime.json", "manifest.json", "optimizer.safetensors",
                     "preprocessing.json", "state.json", "template.jinja"}  # fmt: skip
    other = service.create_training_client(spec)
    before = other.save_state("before").result().digest
    for name in sorted(names):
        whole = (folder / name).read_bytes()
        middle = len(whole) // 2
        damaged = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        (folder / name).write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError, match=name):
            other.load_state_with_optimizer(second.path).result()
        with pytest.raises(DamagedCheckpointError, match=name):
            service.create_sampling_client(second.path)
        (folder / name).write_bytes(whole)
    assert other.save_state("after").result().digest == before
    other.load_state_with_optimizer(first.path).result()
    train(other, samples)
    assert other.save_state("second").result().digest == second.digest


def test_another_client_of_the_folder_sees_the_same(
    service: ServiceClient, spec: ModelSpec, tmp_path: Path
) -> None:
    client = service.create_training_client(spec)
    saved = client.save_state("one").result()
    with ServiceClient(tmp_path / "states") as other:
        assert [row.digest for row in other.list_checkpoints()] == [saved.digest]
        other.delete_checkpoint(saved.path)
    assert service.list_checkpoints() == []
