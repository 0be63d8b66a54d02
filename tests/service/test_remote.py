"""Plait's client over HTTP computes what it computes in process, with every medium."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import plait
from plait.client.remote.media import file_of
from plait.errors import ConfigError, DataError, ModelError
from plait.service.catalog import offer_of_argument, training_spec


@pytest.fixture(scope="module")
def samples(
    tmp_path_factory: pytest.TempPathFactory,
    write_sound: Callable[[Path, int], None],
    write_film: Callable[[Path, int], None],
) -> list[plait.Sample]:
    folder = tmp_path_factory.mktemp("media")
    write_sound(folder / "tone.wav", 3)
    write_film(folder / "film.mp4", 4)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 30, 3), np.uint8)
    media = [
        plait.Image(pixels),
        plait.Audio(folder / "tone.wav", start=0.1),
        plait.Video(folder / "film.mp4", sampling=plait.FrameSampling(count=2)),
    ]
    answer = plait.Message("assistant", "a red disc")
    return [plait.Sample((plait.Message("user", ["which: ", one]), answer)) for one in media]


@pytest.fixture
def remote(seeing: Any) -> Iterator[Any]:
    with plait.ServiceClient(seeing.url) as service:
        yield service


@pytest.fixture
def local(seeing_recipe: Path) -> Iterator[Callable[..., Any]]:
    with plait.ServiceClient() as service:

        def make(**lora: Any) -> Any:
            spec, seed = training_spec(offer_of_argument(str(seeing_recipe))[1], lora)
            return service.create_training_client(spec, seed=seed)

        yield make


def test_a_loop_is_the_same_loop(
    remote: Any, local: Callable[..., Any], samples: list[plait.Sample]
) -> None:
    """Losses, steps, saved states, samples, scores, streams and custom losses."""
    lora = {"rank": 4, "seed": 3, "train_unembed": False}
    told = []
    for client in (remote.create_lora_training_client("seeing", **lora), local(**lora)):
        data = [client.datum(sample) for sample in samples]
        futures = []
        for _ in range(3):
            futures.append(client.forward_backward(data))
            client.optim_step(plait.AdamParams(learning_rate=1e-2), divide_by_weight=True)
        outputs = [future.result() for future in futures]
        sampler = client.save_weights_and_get_sampling_client()
        prompt = sampler.prompt("which: ", samples[0].media()[0])
        greedy = plait.SamplingParams(max_tokens=4, temperature=0.0)
        answer = sampler.sample(prompt, 2, greedy, True, 2).result()
        streamed = [one.token for one in sampler.stream(prompt, 1, greedy)]
        assert streamed == answer.sequences[0].tokens
        text = plait.Datum(plait.ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8]})
        custom = client.forward_backward_custom(
            [text], lambda _, logprobs: ((logprobs[0] ** 2).sum(), {"one": 1.0})
        ).result()
        words = sampler.get_tokenizer()("a red").input_ids
        scored = sampler.compute_logprobs(prompt).result()
        trainable = client.get_info().trainable
        told.append((data, outputs, answer, custom.metrics, words, scored, trainable))
    mine, right = told
    for a, b in zip(mine[0], right[0], strict=True):
        assert a.model_input.length == b.model_input.length
        assert (
            a.loss_fn_inputs["target_tokens"].tolist() == b.loss_fn_inputs["target_tokens"].tolist()
        )
    for a, b in zip(mine[1], right[1], strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=1e-5)
        for one, other in zip(a.loss_fn_outputs, b.loss_fn_outputs, strict=True):
            found, wanted = one["logprobs"].data, other["logprobs"].data
            read = wanted != 0  # the server gives them also where the loss reads none
            np.testing.assert_allclose(found[read], wanted[read], atol=1e-5)
            assert (found != 0).sum() > read.sum()
    assert [one.tokens for one in mine[2].sequences] == [one.tokens for one in right[2].sequences]
    for one, other in ((mine[2].prompt_logprobs, right[2].prompt_logprobs), (mine[5], right[5])):
        assert scores(one) == pytest.approx(scores(other), abs=1e-5)
    assert mine[3] == pytest.approx(right[3], rel=1e-4)
    assert mine[4] == right[4] and mine[6] == right[6]


def scores(values: list[float | None]) -> list[float]:
    return [1.0 if value is None else value for value in values]


def test_states_come_back_with_their_cursor(remote: Any) -> None:
    client = remote.create_lora_training_client("seeing", rank=2, user_metadata={"why": "test"})
    data = [plait.Datum(plait.ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8]})]
    client.forward_backward(data)
    client.optim_step(plait.AdamParams(learning_rate=1e-2))
    saved = client.save_state("here", cursor={"row": 7}).result()
    before = client.forward(data).result().metrics
    again = remote.create_training_client_from_state_with_optimizer(saved.path)
    assert again.restored.cursor == {"row": 7}
    assert again.forward(data).result().metrics == before
    client.forward_backward(data)
    client.optim_step(plait.AdamParams(learning_rate=1e-1)).result()
    assert client.load_state_with_optimizer(saved.path).result().cursor == {"row": 7}
    assert client.forward(data).result().metrics == before
    assert saved.path in [one.path for one in remote.list_checkpoints()]
    remote.set_checkpoint_ttl(saved.path, 3600)
    remote.delete_checkpoint(saved.path)
    assert saved.path not in [one.path for one in remote.list_checkpoints()]
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        remote.create_sampling_client(saved.path)
    assert client.get_info().user_metadata == {"why": "test"}


def test_a_large_call_is_sent_in_parts_and_large_files_once(
    remote: Any, monkeypatch: pytest.MonkeyPatch, samples: list[plait.Sample]
) -> None:
    client = remote.create_lora_training_client("seeing", rank=2)
    data = [client.datum(samples[number % 3]) for number in range(7)]
    whole = client.forward(data).result()
    monkeypatch.setattr("plait.client.remote.training.CALL_BYTES", 1)
    monkeypatch.setattr("plait.client.remote.inputs.UPLOAD_BYTES", 100)
    parts = client.forward(data).result()
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)
    for one, other in zip(parts.loss_fn_outputs, whole.loss_fn_outputs, strict=True):
        np.testing.assert_allclose(one["logprobs"].data, other["logprobs"].data, atol=1e-5)
    assert len(client._transport._sent) == 3


def test_what_is_wrong_is_told_as_in_process(remote: Any) -> None:
    client = remote.create_lora_training_client("seeing", rank=2)
    short = plait.Datum(plait.ModelInput.from_ints([5, 6]), {"target_tokens": [6]})
    with pytest.raises(DataError, match="datum 0: target_tokens needs one value per position"):
        client.forward_backward([short]).result()
    with pytest.raises(ConfigError, match="did you mean 'cross_entropy'"):
        client.forward_backward([short], "cross_entrpy")
    with pytest.raises(ConfigError, match="over HTTP a loss is named"):
        client.forward_backward([short], lambda batch: batch.logprobs)
    with pytest.raises(ConfigError, match="encoders is chosen by the server's recipe"):
        remote.create_lora_training_client("seeing", encoders={})
    with pytest.raises(ConfigError, match="unknown model of this server 'seing'; did you mean"):
        remote.create_lora_training_client("seing")
    with pytest.raises(ConfigError, match="devices is the server's to choose"):
        plait.ServiceClient(remote._transport.url, devices=2)
    with pytest.raises(ConfigError, match="a key is for a server"):
        plait.ServiceClient(key="tml-x")


def test_an_upload_goes_on_where_it_was_torn_off(
    remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the server has bytes whose answer was lost."""
    monkeypatch.setattr("plait.client.remote.transport._BLOCK", 1000)
    pixels = np.random.default_rng(5).integers(0, 255, (60, 60, 3), np.uint8)
    data = file_of(plait.Image(pixels))
    transport, sent = remote._transport, []
    request = transport._client.request

    async def torn(method: str, path: str, **options: Any) -> Any:
        answer = await request(method, path, **options)
        sent.append((method, answer.status_code))
        if method == "POST" and answer.is_success and sent.count((method, 200)) in (2, 5):
            sent.append(("lost", 0))
            raise httpx.ReadError("the connection broke")
        return answer

    monkeypatch.setattr(transport._client, "request", torn)
    sha256 = transport.run(transport.upload(data)).result()
    assert sent.count(("POST", 409)) == sent.count(("lost", 0)) == 2
    assert transport.call("GET", f"/api/v1/media/{sha256}") == {
        "sha256": sha256, "received": len(data), "complete": True,
    }  # fmt: skip


def test_names_with_signs_are_those_of_no_other_checkpoint(remote: Any) -> None:
    client = remote.create_lora_training_client("seeing", rank=2)
    for name in ("best", "best#2", "best?x=1", "best%23"):
        client.save_state(name).result()
    for name in ("best#2", "best?x=1", "best%23"):
        path = f"tinker://{client.run_id}/weights/{name}"
        remote.set_checkpoint_ttl(path, 600)
        remote.delete_checkpoint(path)
    mine = [one for one in remote.list_checkpoints() if client.run_id in one.path]
    assert [(one.path.split("/")[-1], one.expires_at) for one in mine] == [("best", None)]


def test_a_closed_client_says_so(seeing: Any) -> None:
    service = plait.ServiceClient(seeing.url)
    client = service.create_lora_training_client("seeing", rank=2)
    service.close()
    service.close()
    client.close()
    with pytest.raises(ModelError, match="closed"):
        client.optim_step(plait.AdamParams(learning_rate=1e-3))
    with pytest.raises(ModelError, match="closed"):
        service.list_checkpoints()


def test_weights_behind_a_path_are_those_that_were_saved_last(seeing: Any, remote: Any) -> None:
    client = remote.create_lora_training_client("seeing", rank=4)
    body = {"messages": [{"role": "user", "content": "which"}], "temperature": 0.0,
            "max_tokens": 8}  # fmt: skip
    told = []
    for _ in range(2):
        path = client.save_state("here", overwrite=True).result().path
        said = seeing.post("/v1/chat/completions", {"model": path, **body}).json()
        told.append(said["choices"][0]["message"]["content"])
        learned = (plait.Message("user", "which"), plait.Message("assistant", "a red disc"))
        for _ in range(30):
            client.forward_backward([client.datum(plait.Sample(learned))])
            client.optim_step(plait.AdamParams(learning_rate=2e-2))
    assert told[0] != told[1]
