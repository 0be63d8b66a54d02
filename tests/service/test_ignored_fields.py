"""Nothing is accepted and ignored: what a request would not use is refused, by its name."""

import time
from typing import Any

import pytest


@pytest.fixture(scope="module")
def session(server: Any) -> str:
    body = {"tags": ["a tag"], "sdk_version": "0.38.0", "display_name": "shown"}
    name: str = server.post("/api/v1/create_session", body).json()["session_id"]
    return name


@pytest.fixture(scope="module")
def run(server: Any, session: str) -> str:
    body = {
        "session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4},
    }  # fmt: skip
    made: str = server.post("/api/v1/create_model", body).json()["model_id"]
    return made


def refused(server: Any, path: str, body: dict[str, Any], words: str) -> None:
    answer = server.post(f"/api/v1/{path}", body)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["error"] and answer.json()["category"] == "user"


def test_what_a_session_says_is_told(server: Any, session: str) -> None:
    told = server.get(f"/api/v1/sessions/{session}").json()
    assert told["tags"] == ["a tag"] and told["display_name"] == "shown"


def test_projects(server: Any) -> None:
    refused(server, "create_session", {"tags": [], "project_id": "a"}, "project_id")
    answer = server.get("/api/v1/training_runs?project_id=a")
    assert answer.status_code == 422 and "project_id" in answer.json()["error"]
    assert server.get("/api/v1/training_runs?access_scope=accessible").is_success
    assert server.get("/api/v1/training_runs?access_scope=every").status_code == 422


@pytest.mark.parametrize("field", ["base_model", "model_path"])
def test_a_sample_s_model(server: Any, session: str, field: str) -> None:
    body = {"sampling_session_id": f"{session}:sample:0", "seq_id": 0, field: "tiny",
            "prompt": {"chunks": []}}  # fmt: skip
    refused(server, "asample", body, field)


@pytest.mark.parametrize(
    ("field", "value"), [("ttl_seconds", 7200), ("user_metadata", {"a": "b"}), ("path", "x")]
)
def test_a_sampler_s_own_weights(server: Any, run: str, field: str, value: Any) -> None:
    body = {"model_id": run, "seq_id": 90, "sampling_session_seq_id": 5, field: value}
    refused(server, "save_weights_for_sampler", body, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_model", "tiny"), ("user_metadata", {"a": "b"}), ("model_seq_id", 4),
     ("optimizer_config", {"type": "adamw"}), ("weights_access_token", "a")],
)  # fmt: skip
def test_a_load_in_place(server: Any, run: str, field: str, value: Any) -> None:
    body = {"model_id": run, "seq_id": 91, "path": "tinker://a/weights/b", "optimizer": False}
    refused(server, "load_weights", {**body, field: value}, field)


def test_optimisers(server: Any, run: str) -> None:
    body = {"model_id": run, "seq_id": 92, "optimizer_params": {"type": "dimuon"}}
    refused(server, "optim_step", body, "dimuon")


def test_a_number_whose_request_was_malformed_is_not_waited_for(server: Any, session: str) -> None:
    body = {
        "session_id": session, "model_seq_id": 1, "base_model": "tiny", "lora_config": {"rank": 4},
    }  # fmt: skip
    run = server.post("/api/v1/create_model", body).json()["model_id"]
    bad = {"model_id": run, "seq_id": 1, "path": "x", "ttl_seconds": -1}
    assert server.post("/api/v1/save_weights", bad).status_code == 422
    promised = server.post("/api/v1/save_weights", {"model_id": run, "seq_id": 2, "path": "x"})
    begun = time.monotonic()
    name = promised.json()["request_id"]
    answer = server.post("/api/v1/retrieve_future", {"request_id": name})
    assert answer.json()["path"].endswith("/weights/x") and time.monotonic() - begun < 25
