"""Every field of every body with every kind of wrong value: 422 that says where, never 500."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from plait.service import bodies
from plait.service.app import create_app
from plait.service.catalog import Offer
from plait.service.settings import ServiceSettings
from plait.trainer.spec import ModelSpec

DEEP = "[" * 200 + "]" * 200
HALF = '"\\ud800"'
"""Half of a character that takes two."""

WRONG = [
    "null", "true", "-1", "0.5", str(2**63), "1" + "0" * 400, "NaN", "Infinity", "-Infinity", '""',
    '"x"', '"\\u0000"', HALF, json.dumps("x" * 100_000), "[]", "[null]", '["x"]', f"[{HALF}]",
    "[[[1]]]", "{}", '{"a": 1}', '{"a": {"b": null}}', f'{{"a": {DEEP}}}', f'{{{HALF}: "x"}}',
    f'{{"a": {HALF}}}', '{"a": NaN}', DEEP,
]  # fmt: skip


def routes_of(application: Any) -> Iterator[Any]:
    for route in application.routes:
        yield from route.original_router.routes if hasattr(route, "original_router") else [route]


def bodies_of(folder: Path) -> dict[str, type[BaseModel]]:
    """By path, the model of the JSON body; only those of `service/bodies.py`."""
    settings = ServiceSettings(models={"tiny": Offer(ModelSpec(language="tiny"))}, data_dir=folder)
    found = {}
    for route in routes_of(create_app(settings)):
        field = getattr(route, "body_field", None)
        model = getattr(getattr(field, "field_info", None), "annotation", None)
        if isinstance(model, type) and issubclass(model, bodies.Body):
            found[f"{next(iter(route.methods))} {route.path}"] = model
    return found


GOOD: dict[str, Any] = {
    "sdk_version": "0.38.0", "session_id": "none", "model_id": "none", "model_seq_id": 1,
    "seq_id": 1, "sampling_session_seq_id": 1, "sampling_session_id": "none", "request_id": "none",
    "base_model": "tiny", "path": "x", "reason": {"type": "success"}, "name": "x",
    "target": {"sampling_session_id": "none"}, "custom_loss_seq_id": 1, "tinker_path": "x",
    "inputs": [{"name": "logprobs", "rank": 1}], "graph": {"nodes": []}, "ttl_seconds": 60,
    "prompt": {"chunks": []},
}  # fmt: skip


def good(model: type[BaseModel], **ids: str) -> dict[str, Any]:
    needed = [name for name, field in model.model_fields.items() if field.is_required()]
    return {name: ids.get(name, GOOD[name]) for name in needed}


def fields(model: type[BaseModel], body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field with each wrong value: the JSON of the whole body."""
    for name in [*model.model_fields, "unknown_field"]:
        for value in WRONG:
            others = {key: one for key, one in body.items() if key != name}
            text = json.dumps(others)
            yield name, f"{text[:-1]}{', ' if others else ''}{json.dumps(name)}: {value}}}"
    for name in body:
        yield name, json.dumps({key: one for key, one in body.items() if key != name})


def rejected(model: type[BaseModel], text: str) -> bool:
    try:
        model.model_validate(json.loads(text))
    except (ValidationError, ValueError):
        return True
    return False


def check_error(answer: httpx.Response) -> None:
    """An error in the documented form, which tells nothing of the server's inside."""
    said = answer.json()
    assert isinstance(said["error"], str)
    assert said["error"]
    assert said["category"] in ("user", "server", "unknown")
    for word in ("Traceback", ".py", "site-packages", "/tmp/", "sqlite", "SELECT"):
        assert word not in answer.text, answer.text[:500]
    assert len(answer.text) < 5000


@pytest.fixture(scope="module")
def ids(server: Any) -> dict[str, str]:
    return new_ids(server)


def new_ids(server: Any) -> dict[str, str]:
    """A session and a run of it, which is made."""
    said = server.post("/api/v1/create_session", {"sdk_version": "0.38.0"}).json()
    session = {"session_id": said["session_id"]}
    body = {**session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}}
    promise = server.post("/api/v1/create_model", body).json()
    assert outcome(server, promise)["model_id"] == promise["model_id"]
    return {**session, "model_id": promise["model_id"]}


def test_every_field_with_every_wrong_value(
    server: Any, ids: dict[str, str], tmp_path: Path
) -> None:
    try_every_field(server, ids, tmp_path)


@pytest.mark.slow
def test_every_field_with_postgresql(
    new_server: Callable[..., Any], postgresql: str, tmp_path: Path
) -> None:
    """Which takes less than SQLite does: no zero characters, no numbers beyond 64 bits."""
    server = new_server("--database", postgresql).start()
    ids = new_ids(server)
    try_every_field(server, ids, tmp_path)
    test_what_was_accepted_can_be_read(server, ids)
    server.stop()


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800"])
def test_names_that_no_database_takes(name: str) -> None:
    with pytest.raises(ValidationError):
        bodies.OfModel(model_id=name)
    with pytest.raises(ValidationError):
        bodies.WeightsInfo(tinker_path=name)


def try_every_field(server: Any, ids: dict[str, str], folder: Path) -> None:
    found = bodies_of(folder)
    assert len(found) >= 18
    headers = {"content-type": "application/json"}
    count = 0
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        for place, model in found.items():
            method, path = place.split(" ")
            path = path.format(session_id="none", run_id="none", kind="weights", name="x")
            for name, text in fields(model, good(model, **ids)):
                answer = client.request(method, path, content=text, headers=headers)
                count += 1
                told = f"{place} {name}: {text[:200]} -> {answer.status_code} {answer.text[:300]}"
                assert answer.status_code < 500, told
                if rejected(model, text):
                    assert answer.status_code in (400, 404, 422), told
                if answer.is_error:
                    check_error(answer)
    assert count > 2500
    assert server.get("/readyz").is_success


def test_what_was_accepted_can_be_read(server: Any, ids: dict[str, str]) -> None:
    """Of the many sessions that the fields made, none breaks a list or its own page."""
    listed = server.get("/api/v1/sessions?limit=1000").json()["sessions"]
    assert ids["session_id"] in listed
    for name in listed[:50]:
        assert server.get(f"/api/v1/sessions/{name}").is_success
    assert server.get("/api/v1/training_runs?limit=1000").is_success


SAMPLE = {"sampling_session_id": "none", "seq_id": 1, "prompt": {"chunks": []}}


@pytest.mark.parametrize("value", WRONG)
def test_samples_with_wrong_values(server: Any, value: str) -> None:
    for name in (*SAMPLE, "num_samples", "sampling_params", "prompt_logprobs", "unknown_field"):
        others = json.dumps({key: one for key, one in SAMPLE.items() if key != name})
        text = f'{others[:-1]}, "{name}": {value}}}'
        answer = server.ask("POST", "/api/v1/asample", content=text)
        assert answer.status_code in (404, 422), (text[:200], answer.text[:300])
        check_error(answer)
    for name in ("max_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "stop", "other"):
        given = f'{{"{name}": {value}}}'
        text = f'{json.dumps(SAMPLE)[:-1]}, "sampling_params": {given}}}'
        answer = server.ask("POST", "/api/v1/asample", content=text)
        assert answer.status_code in (404, 422), (text[:200], answer.text[:300])
        check_error(answer)


@pytest.fixture(scope="module")
def sampler(server: Any, ids: dict[str, str]) -> str:
    session = ids["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 7, "base_model": "tiny"}
    name: str = server.post("/api/v1/create_sampling_session", body).json()["sampling_session_id"]
    return name


def outcome(server: Any, promise: dict[str, Any]) -> Any:
    answer = server.post("/api/v1/retrieve_future", {"request_id": promise["request_id"]})
    assert answer.status_code == 200, answer.text
    return answer.json() if "json" in answer.headers["content-type"] else None


PROMPTS: list[Any] = [
    None, 3, [], {}, {"chunks": 3}, {"chunks": [None]}, {"chunks": [{"type": "odd"}]},
    {"chunks": [{"type": "encoded_text", "tokens": [-1]}]},
    {"chunks": [{"type": "encoded_text", "tokens": [10**30]}]},
    {"chunks": [{"type": "encoded_text", "tokens": [2**31 - 1]}]},
    {"chunks": [{"type": "encoded_text", "tokens": [1.5]}]},
    {"chunks": [{"type": "encoded_text", "tokens": "abc"}]},
    {"chunks": [{"type": "image", "data": "?"}]}, {"chunks": [{"type": "image", "data": "é"}]},
    {"chunks": [{"type": "image", "data": "AAAA"}]},
    {"chunks": [{"type": "image", "sha256": "../../plait.db"}]},
    {"chunks": [{"type": "image", "sha256": "a" * 64}]},
    {"chunks": [{"type": "audio", "data": "AAAA", "options": {"source": "/etc/passwd"}}]},
    {"chunks": [{"type": "audio", "data": "AAAA", "options": {"start": "now"}}]},
    {"chunks": [{"type": "video", "data": "AAAA", "options": {"sampling": {"count": 10**12}}}]},
    {"chunks": [{"type": "dmel", "dmel": "AAAA"}]},
]  # fmt: skip


def test_prompts_that_cannot_be_used(server: Any, sampler: str) -> None:
    for number, prompt in enumerate(PROMPTS):
        body = {"sampling_session_id": sampler, "seq_id": number, "prompt": prompt}
        answer = server.post("/api/v1/asample", body)
        if answer.status_code == 422:
            check_error(answer)
            continue
        said = outcome(server, answer.json())
        assert said is not None, prompt
        assert said["category"] == "user", (prompt, said)
        for word in ("Traceback", ".py", "/etc", "/tmp"):
            assert word not in said["error"], said


@pytest.mark.parametrize(
    ("more", "fine"),
    [
        ({"topk_prompt_logprobs": 10**9}, False),
        ({"topk_prompt_logprobs": "x"}, False),
        ({"prompt_logprobs_last_n": -1}, False),
        ({"prompt_logprobs_last_n": 10**9, "prompt_logprobs": True}, True),
        ({"sampling_params": {"max_tokens": 10**12}}, False),
        ({"sampling_params": {"max_tokens": 2, "stop": [10**12]}}, False),
    ],
)
def test_settings_of_samples(server: Any, ids: Any, more: Any, fine: bool) -> None:
    session = ids["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 8, "base_model": "tiny"}
    sampler = server.post("/api/v1/create_sampling_session", body).json()["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    number = abs(hash(json.dumps(more))) % 10**9
    given = {"sampling_params": {"max_tokens": 2}, **more}
    body = {"sampling_session_id": sampler, "seq_id": number, "prompt": prompt, **given}
    answer = server.post("/api/v1/asample", body)
    said = answer.json() if answer.is_error else outcome(server, answer.json())
    assert (said is None) == fine, said
    if not fine:
        assert said["category"] == "user" and said["error"]
