"""The official client, unchanged and in three versions, computes here what Plait does in process.

Each version runs the scripts of `tinker_scripts` in processes of its own, against a real server.
"""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image as PILImage

import plait
from plait.types import AdamParams, Datum, ImageChunk, ModelInput, SamplingParams

VERSIONS = ("0.25.0", "0.31.0", "0.38.0")


def case(tokens: list[int], **inputs: list[Any]) -> dict[str, Any]:
    return {"tokens": tokens[:-1], "inputs": {"target_tokens": tokens[1:], **inputs}}


PLAIN = [case([5, 6, 7, 8, 9], weights=[1.0, 1.0, 0.5, 1.0]), case([5, 6, 7], weights=[1.0, 1.0])]
SAMPLED = {"logprobs": [-5.0, -6.0, -5.5, -6.2], "advantages": [1.0, -1.0, 0.5, 0.3]}
SOFT = {
    "tokens": [5, 6, 7],
    "inputs": {
        "target_tokens": [[6, 7] + 6 * [0], [7, 8] + 6 * [0], [8, 9] + 6 * [0]],
        "weights": [[0.5, 0.5] + 6 * [0.0], [1.0] + 7 * [0.0], [0.2, 0.8] + 6 * [0.0]],
    },
}
MASKED = case([5, 6, 7, 8, 9], **SAMPLED, sequence_ratio_mask=[0.0, 1.0, 1.0, 1.0])
LOSSES: dict[str, dict[str, Any]] = {
    "dense": {"loss": "cross_entropy", "config": {}, "data": PLAIN},
    "soft": {"loss": "cross_entropy", "config": {}, "data": [SOFT]},
    "importance_sampling": {"loss": "importance_sampling", "config": {}},
    "ppo": {"loss": "ppo", "config": {}},
    "ppo_narrow": {
        "loss": "ppo",
        "config": {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05},
    },
    "cispo": {"loss": "cispo", "config": {}},
    "dro": {"loss": "dro", "config": {"beta": 0.2}},
    "gspo": {"loss": "gspo", "config": {}, "data": [MASKED]},
}
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 4, "temperature": 0.0},
    "seeded": {"max_tokens": 6, "seed": 7},
    "filtered": {"max_tokens": 6, "seed": 8, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
    "stop_ids": {"max_tokens": 8, "seed": 9, "stop": list(range(200))},
    "stop_none": {"max_tokens": 8, "seed": 9, "stop": []},
    "stop_text": {"max_tokens": 8, "seed": 9, "stop": ["e", "a"]},
}
MANY = [case([i % 250 + 3, i % 7 + 3, i % 11 + 3, 9], weights=[1.0] * 3) for i in range(1100)]
"""More than the client puts into one request, so that it sends several, the first one last."""


def asked_of(name: str) -> dict[str, Any]:
    """What a script is given."""
    losses = {
        key: {"data": [case([5, 6, 7, 8, 9], **SAMPLED)], **one} for key, one in LOSSES.items()
    }
    more = {"handle": [case([5, 6, 7, 8, 9], advantages=[1.0, -1.0, 0.5, 0.3])]}
    everything = {
        "train": {
            "plain": PLAIN, "losses": losses, "many": MANY, "unweighted": [case([5, 6, 7, 8])],
            "bad": case([5, 6, 7], weights=[1.0]), **more,
        },
        "sample": {"plain": PLAIN, "draws": DRAWS},
        "states": {"plain": PLAIN},
        "pictures": PICTURE,
    }  # fmt: skip
    return everything[name]


def png() -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (40, 40), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


PICTURE: dict[str, Any] = {
    "picture": base64.b64encode(png()).decode(),
    "tokens": [5, 6, 7, 8],
    "targets": [0, 0, 0, 5, 6, 7, 8, 9],
    "weights": [0, 0, 0, 0, 1, 1, 1, 1],
}

Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def tinker_server(
    new_server: Callable[..., Any], tiny_language: Path, tiny_values: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:  # fmt: skip
    """Offers `tiny`, and `seeing`, which reads pictures."""
    recipe = tmp_path_factory.mktemp("recipe") / "seeing.yaml"
    recipe.write_text(yaml.safe_dump(tiny_values))
    return new_server(models=[f"tiny={tiny_language}", str(recipe)]).start()


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    named: str = request.param
    return named


@pytest.fixture(scope="module")
def run(version: str, tinker_server: Any, run_tinker: Callable[..., dict[str, Any]]) -> Run:
    """Runs a script with this version of the client: what it told."""
    return lambda name: run_tinker(tinker_server, version, name, asked_of(name))


def datum(one: dict[str, Any]) -> Datum:
    return Datum(ModelInput.from_ints(one["tokens"]), one["inputs"])


def said(result: Any) -> dict[str, Any]:
    """A ForwardBackwardOutput in the scripts' form."""
    rows = [row["logprobs"].tolist() for row in result.loss_fn_outputs]
    return {"logprobs": rows, "metrics": dict(result.metrics)}


def squares(data: Any, logprobs: list[torch.Tensor]) -> Any:
    del data
    loss = torch.stack([(row**2).sum() for row in logprobs]).sum()
    return loss, {"custom/squares:sum": float(loss.detach())}


def traced(data: Any, logprobs: list[torch.Tensor]) -> Any:
    """What the script's traced loss computes on the server."""
    rows = [torch.tensor(one.loss_fn_inputs["advantages"].tolist()) for one in data]
    each = [
        -(torch.exp(row.clamp(-5, 5)) * advantages).sum()
        for row, advantages in zip(logprobs, rows, strict=True)
    ]
    return sum(each), {}


@pytest.fixture(scope="module")
def here(tiny_language: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """New training clients in this process, of the same model and the same seed."""
    service = plait.ServiceClient(tmp_path_factory.mktemp("here"))

    def client() -> Any:
        return service.create_lora_training_client(
            str(tiny_language), rank=4, seed=3, train_unembed=True
        )

    return client


@pytest.fixture(scope="module")
def expected(here: Callable[[], Any]) -> dict[str, Any]:
    """What `tinker_scripts/train.py` must tell, computed in process."""
    torch.set_num_threads(1)
    asked, client, told = asked_of("train"), here(), {}
    plain = [datum(one) for one in asked["plain"]]
    step = AdamParams(learning_rate=1e-2)
    told["forward"] = said(client.forward(plain, "cross_entropy").result())
    told["losses"] = {
        name: said(
            client.forward_backward(
                [datum(one) for one in each["data"]], each["loss"], each["config"] or None
            ).result()
        )
        for name, each in asked["losses"].items()
    }
    told["step"] = client.optim_step(
        AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)
    ).result().metrics  # fmt: skip
    told["after"] = said(client.forward(plain, "cross_entropy").result())
    many = client.forward_backward([datum(one) for one in asked["many"]], "cross_entropy")
    client.optim_step(AdamParams(learning_rate=1e-2, weight_decay=0.1))
    told["many"] = said(many.result())
    client.forward_backward_custom([datum(one) for one in asked["unweighted"]], squares).result()
    client.forward_backward_custom(plain, squares).result()
    client.optim_step(step).result()
    told["after_custom"] = said(client.forward(plain, "cross_entropy").result())
    handle = [datum(one) for one in asked["handle"]]
    client.forward_backward_custom(handle, traced).result()
    client.optim_step(step).result()
    told["after_handle"] = said(client.forward(plain, "cross_entropy").result())
    return told


def close(given: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Logprobs agree; metrics of the same names do, relative to their size."""
    for row, right in zip(given["logprobs"], wanted["logprobs"], strict=True):
        torch.testing.assert_close(
            torch.tensor(row), torch.tensor(right), atol=tolerance, rtol=tolerance
        )
    for name in given["metrics"].keys() & wanted["metrics"].keys():
        assert given["metrics"][name] == pytest.approx(
            wanted["metrics"][name], rel=tolerance, abs=tolerance
        ), name


def test_training(version: str, run: Run, expected: dict[str, Any]) -> None:
    told = run("train")
    assert told["info"]["is_lora"] and told["info"]["lora_rank"] == 4
    assert told["tokens"]
    for name in ("forward", "after", "many", "after_custom"):
        close(told[name], expected[name])
    assert told["losses"].keys() == expected["losses"].keys()
    for name, output in told["losses"].items():
        close(output, expected["losses"][name])
    norm = next(iter(expected["step"].values()))
    assert told["step"]["grad_norm:mean"] == pytest.approx(norm, rel=1e-5)
    assert told["custom"]["metrics"]["custom/squares:sum"] > 0
    assert ("after_handle" in told) == (version == "0.38.0")
    if "after_handle" in told:
        close(told["after_handle"], expected["after_handle"])
        assert told["handle"]["metrics"]["custom/ratio:mean"] > 0
    failures = told["failures"]
    assert failures["model"]["kind"] == "NotFoundError" and "'tiny'" in failures["model"]["says"]
    assert "did you mean 'cross_entropy'" in failures["loss"]["says"]
    for name, words in {"data": "weights", "setting": "beta", "step": "one failed"}.items():
        assert failures[name]["kind"] == "RequestFailedError"
        assert failures[name]["category"] == "user"
        assert words in failures[name]["says"]
    assert told["later"]["metrics"]["loss:sum"] < expected["forward"]["metrics"]["loss:sum"]


def test_samples(run: Run, here: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    told, client = run("sample"), here()
    prompt = ModelInput.from_ints([5, 6, 7])
    data = [datum(one) for one in PLAIN]
    assert_scores(told["base"], client.save_weights_and_get_sampling_client(), prompt)
    assert told["base_model"] == "tiny"
    client.forward_backward(data, "cross_entropy")
    client.optim_step(AdamParams(learning_rate=1e-2)).result()
    sampler = client.save_weights_and_get_sampling_client()
    for name, settings in DRAWS.items():
        drawn = sampler.sample(prompt, 2, SamplingParams(**settings)).result().sequences
        for given, wanted in zip(told["draws"][name], drawn, strict=True):
            assert given["tokens"] == list(wanted.tokens), name
            assert given["stop_reason"] == wanted.stop_reason, name
            assert given["logprobs"] == pytest.approx(wanted.logprobs, abs=1e-5), name
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    scored = sampler.sample(
        prompt, 1, greedy, include_prompt_logprobs=True, topk_prompt_logprobs=3
    ).result()
    assert told["prompt_logprobs"][0] is None and told["topk"][0] is None
    assert told["prompt_logprobs"][1:] == pytest.approx(scored.prompt_logprobs[1:], abs=1e-5)
    for row, wanted in zip(told["topk"][1:], scored.topk_prompt_logprobs[1:], strict=True):
        assert [token for token, _ in row] == [token for token, _ in wanted]
        assert [number for _, number in row] == pytest.approx([n for _, n in wanted], abs=1e-5)
    for name in ("scores", "scores_later", "scores_saved"):
        assert_scores(told[name], sampler, prompt)
    assert told["scores_now"][1:] != pytest.approx(told["scores"][1:], abs=1e-2)
    assert len({tuple(tokens) for tokens in told["many"]}) == 1
    failures = told["failures"]
    assert failures["stop"]["category"] == "user" and "100000" in failures["stop"]["says"]
    assert "temperature" in failures["temperature"]["says"]
    assert "kept-not" in failures["path"]["says"]


def assert_scores(given: list[float | None], client: Any, prompt: ModelInput) -> None:
    wanted = client.compute_logprobs(prompt).result()
    assert given[0] is None and wanted[0] is None
    assert given[1:] == pytest.approx(wanted[1:], abs=1e-5)


def test_states(version: str, run: Run, tinker_server: Any) -> None:
    told = run("states")
    close(told["from_state"], told["saved"], 0.0)
    close(told["loaded"], told["saved"], 0.0)
    close(told["whole"], told["kept"], 1e-6)
    close(told["went_on"], told["kept"], 1e-6)
    assert told["weights"]["logprobs"] != told["kept"]["logprobs"]  # its optimiser is new
    assert told["again"]["category"] == "user" and "overwrite" in told["again"]["says"]
    failures = told["failures"]
    assert "one-not" in failures["path"]["says"] and "'a/b'" in failures["name"]["says"]
    assert failures["run"]["kind"] == "NotFoundError"
    if version != "0.25.0":  # which cannot say that it ends
        ended = {"session_id": told["listing"]["session"], "type": "session_heartbeat"}
        assert tinker_server.post("/api/v1/session_heartbeat", ended).status_code == 410
    check_listing(told["listing"], told["path"], told["sampling_path"])


def check_listing(said: dict[str, Any], path: str, sampling: str) -> None:
    run, session = said["run"], said["session"]
    for one in (said["one_run"], said["by_path"]):
        assert one["training_run_id"] == run and one["base_model"] == "tiny"
        assert one["is_lora"] and one["lora_rank"] == 4 and one["user_metadata"] == {"a": "b"}
        assert one["last_checkpoint"]["tinker_path"] == path
        assert one["last_sampler_checkpoint"]["tinker_path"] == sampling
    runs = {one["training_run_id"]: one for one in said["runs"]["training_runs"]}
    assert {run, f"{session}:train:1", f"{session}:train:2"} <= runs.keys()
    assert runs[f"{session}:train:2"]["user_metadata"] == {"c": "d"}
    assert said["runs"]["cursor"]["total_count"] == len(runs)
    saved = {one["tinker_path"]: one for one in said["of_run"]["checkpoints"]}
    assert saved.keys() == {path, sampling}
    assert saved[path]["checkpoint_type"] == "training"
    assert saved[path]["checkpoint_id"] == "weights/one"
    assert saved[path]["expires_at"] is not None and saved[sampling]["expires_at"] is None
    assert saved[sampling]["checkpoint_type"] == "sampler" and saved[path]["size_bytes"] > 1000
    assert {path, sampling} <= {one["tinker_path"] for one in said["of_user"]["checkpoints"]}
    assert session in said["sessions"]["sessions"]
    assert run in said["one_session"]["training_run_ids"]
    assert said["one_session"].get("user_metadata", {"who": "a test"}) == {"who": "a test"}
    assert said["info"]["base_model"] == "tiny" and said["info"]["lora_rank"] == 4
    offered = said["capabilities"]["supported_models"]
    assert {one["model_name"]: one["max_context_length"] for one in offered} == {
        "tiny": 512, "seeing": 512,
    }  # fmt: skip
    assert said["sampler"]["model_path"] == sampling and said["sampler_base"] == "tiny"
    assert said["published"] == {path: True, sampling: False}
    changed = {one["tinker_path"]: one for one in said["changed"]["checkpoints"]}
    assert changed[path]["expires_at"] is None and changed[path]["public"] is False
    assert said["left"] == [path]
    assert said["deleted"]["kind"] == "NotFoundError"


def test_pictures(run: Run, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    told = run("pictures")
    model = tiny_values["model"]
    client = plait.ServiceClient(tmp_path).create_lora_training_client(
        model["language"], rank=4, seed=3, train_unembed=True,
        encoders={"image": plait.EncoderSpec(**model["encoders"]["image"])},
    )  # fmt: skip
    picture = ImageChunk(base64.b64decode(PICTURE["picture"]), "png", 4)
    prompt = ModelInput((picture, *ModelInput.from_ints(PICTURE["tokens"]).chunks))
    inputs = {"target_tokens": PICTURE["targets"], "weights": PICTURE["weights"]}
    one = Datum(prompt, inputs)
    close(told["before"], said(client.forward_backward([one] * 2, "cross_entropy").result()))
    client.optim_step(AdamParams(learning_rate=1e-2)).result()
    close(told["after"], said(client.forward([one], "cross_entropy").result()))
    sampler = client.save_weights_and_get_sampling_client()
    greedy = SamplingParams(max_tokens=4, temperature=0.0)
    wanted = sampler.sample(prompt, 1, greedy).result().sequences[0].tokens
    assert told["sample"] == list(wanted)
    assert told["failure"]["category"] == "user" and "4" in told["failure"]["says"]
