"""Owners do not see one another's objects, by any route and in any role; read-only keys only read.

Each route that the server has is in one of the tables here: a new one without an entry fails.
"""

import hashlib
import hmac
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from plait.service.app import create_app
from plait.service.catalog import Offer
from plait.service.settings import ServiceSettings
from plait.service.wire import tinker_pb2 as pb
from plait.service.wire.tensors import tensor_to
from plait.trainer.spec import ModelSpec

SECRET = "of the tests alone"
Names = dict[str, str]
Ask = tuple[str, Any]
"""A path, and a body: JSON or bytes."""

WITHOUT = {
    "GET /healthz", "GET /api/v1/healthz", "GET /readyz", "GET /metrics", "GET /api/v1/status",
    "GET /api/v1/audit", "POST /api/v1/client/config", "POST /api/v1/client/dynamic_config",
    "POST /api/v1/create_session", "POST /api/v1/telemetry", "GET /api/v1/sessions",
    "GET /api/v1/get_server_capabilities", "GET /api/v1/training_runs", "GET /api/v1/checkpoints",
    "POST /api/v1/auth/token", "POST /api/v1/copy_weights", "POST /api/v1/sessions/search",
    "GET /api/v1/auth/apikey/me", "DELETE /api/v1/auth/apikey/me",
    "PUT /api/v1/sessions/{_}/project", "GET /api/v1/sessions/{_}/trace_export",
    "GET /api/v1/billing/usage/events", "GET /api/v1/billing/usage/checkpoints/current",
    "GET /api/v1/media", "GET /v1/models",
}  # fmt: skip
"""Routes that name no object: they tell of the caller's own alone, or of the server."""

BY_CONTENT = {"POST /api/v1/media"}
"""An upload is named by its own content, in its owner's folder."""

SIGNED = {"GET /api/v1/files/{run_id}/{kind}/{name}/{file}"}
"""An address that was given out is the key."""


def batch(run: str, loss: str = "cross_entropy", loss_id: str = "", seq: int = 1) -> bytes:
    message = pb.ForwardBackwardRequest(model_id=run, seq_id=seq, loss_fn=loss)
    if loss_id:
        message.loss_fn_config_v2["loss_id"].text = loss_id
    datum = message.data.add()
    datum.model_input.add(
        encoded_text=pb.EncodedTextChunk(tokens=np.arange(5, 9, dtype="<i4").tobytes())
    )
    datum.loss_fn_inputs["target_tokens"].CopyFrom(tensor_to(np.arange(6, 10)))
    datum.loss_fn_inputs["weights"].CopyFrom(tensor_to(np.ones(4, "f4")))
    return message.SerializeToString()


def of_run(route: str, **more: Any) -> Callable[[Names], list[Ask]]:
    body = {"seq_id": 90, **more}
    return lambda n: [(f"/api/v1/{route}", {"model_id": n["run"], **body})]


def at_checkpoint(behind: str = "", body: Any = None) -> Callable[[Names], list[Ask]]:
    kinds = ("weights", "sampler_weights", "external_weights")
    return lambda n: [(f"/api/v1/training_runs/{n['run']}/checkpoints/{kind}/x{behind}", body)
                      for kind in kinds]  # fmt: skip


def sample(n: Names, **more: Any) -> dict[str, Any]:
    return {"sampling_session_id": n["sampler"], "seq_id": 90, "prompt": {"chunks": []}, **more}


GRAPH = {"nodes": [
    {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
    {"op": "call_function", "name": "loss", "target": "torch.sum", "args": [{"ref": "logprobs"}]},
    {"op": "output", "name": "out", "target": "output",
     "args": [{"tuple": [{"ref": "loss"}, {"dict": {}}]}]},
]}  # fmt: skip
LOSS = {"custom_loss_seq_id": 0, "name": "mine", "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": GRAPH}  # fmt: skip
TALK = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}

NAMED: dict[str, Callable[[Names], list[Ask]]] = {
    "POST /api/v1/session_heartbeat":
        lambda n: [("/api/v1/session_heartbeat", {"session_id": n["session"]})],
    "POST /api/v1/sessions/{session_id}/finish":
        lambda n: [(f"/api/v1/sessions/{n['session']}/finish", {"reason": {}})],
    "GET /api/v1/sessions/{session_id}": lambda n: [(f"/api/v1/sessions/{n['session']}", None)],
    "POST /api/v1/create_model": lambda n: [("/api/v1/create_model", {
        "session_id": n["session"], "model_seq_id": 90, "base_model": "tiny"})],
    "POST /api/v1/get_info": lambda n: [("/api/v1/get_info", {"model_id": n["run"]})],
    "POST /api/v1/unload_model": lambda n: [("/api/v1/unload_model", {"model_id": n["run"]})],
    "POST /api/v1/forward_backward": lambda n: [
        ("/api/v1/forward_backward", batch(n["run"])),
        ("/api/v1/forward_backward", batch(n["own run"], "custom", n["loss"], 90))],
    "POST /api/v1/optim_step": lambda n: [
        *of_run("optim_step", adam_params={})(n),
        *of_run("optim_step", adam_params={"learning_rate": -1})(n)],
    "POST /api/v1/save_weights": lambda n: [
        *of_run("save_weights", path="y")(n), *of_run("save_weights", path=".")(n)],
    "POST /api/v1/save_weights_external": lambda n: [
        *of_run("save_weights_external", path="y")(n),
        *of_run("save_weights_external", path="y", age_encryption_recipients=["x"], seq_id=3)(n)],
    "POST /api/v1/save_weights_for_sampler": lambda n: [
        *of_run("save_weights_for_sampler", path="y")(n),
        *of_run("save_weights_for_sampler", kind="inflight", seq_id=3)(n),
        *of_run("save_weights_for_sampler", sampling_session_seq_id=0)(n)],
    "POST /api/v1/load_weights": lambda n: [
        *of_run("load_weights", path=n["weights"])(n),
        ("/api/v1/load_weights", {"session_id": n["own session"], "model_seq_id": 91,
                                  "path": n["weights"]}),
        ("/api/v1/load_weights", {"session_id": n["session"], "model_seq_id": 91, "path": "x"}),
        ("/api/v1/load_weights", {"model_id": n["own run"], "seq_id": 91, "path": n["weights"]})],
    "POST /api/v1/create_custom_loss":
        lambda n: [("/api/v1/create_custom_loss", {"session_id": n["session"], **LOSS})],
    "POST /api/v1/create_sampling_session": lambda n: [
        ("/api/v1/create_sampling_session", {
            "session_id": n["session"], "sampling_session_seq_id": 90, "base_model": "tiny"}),
        ("/api/v1/create_sampling_session", {
            "session_id": n["own session"], "sampling_session_seq_id": 91,
            "model_path": n["weights"]})],
    "POST /api/v1/join_sampling_session": lambda n: [
        ("/api/v1/join_sampling_session", {"sampling_session_id": n["sampler"]})],
    "GET /api/v1/samplers/{sampler_id}": lambda n: [(f"/api/v1/samplers/{n['sampler']}", None)],
    "DELETE /api/v1/samplers/{sampler_id}": lambda n: [(f"/api/v1/samplers/{n['sampler']}", None)],
    "POST /api/v1/asample": lambda n: [("/api/v1/asample", sample(n))],
    "POST /api/v1/stream": lambda n: [("/api/v1/stream", sample(n))],
    "POST /api/v1/retrieve_future":
        lambda n: [("/api/v1/retrieve_future", {"request_id": n["request"]})],
    "POST /api/v1/retrieve_futures": lambda n: [("/api/v1/retrieve_futures", {
        "target": {"sampling_session_id": n["sampler"]}, "timeout": 0})],
    "POST /api/v1/cancel_future":
        lambda n: [("/api/v1/cancel_future", {"request_id": n["request"]})],
    "GET /api/v1/training_runs/{run_id}":
        lambda n: [(f"/api/v1/training_runs/{n['run']}", None)],
    "GET /api/v1/training_runs/{run_id}/checkpoints":
        lambda n: [(f"/api/v1/training_runs/{n['run']}/checkpoints", None)],
    "POST /api/v1/weights_info":
        lambda n: [("/api/v1/weights_info", {"tinker_path": n["weights"]})],
    "DELETE /api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}": at_checkpoint(),
    "POST /api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/publish":
        at_checkpoint("/publish"),
    "DELETE /api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/publish":
        at_checkpoint("/publish"),
    "PUT /api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl":
        at_checkpoint("/ttl", {"ttl_seconds": 1}),
    "GET /api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/archive":
        at_checkpoint("/archive"),
    "GET /api/v1/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls":
        lambda n: [(f"/api/v1/training_runs/{n['run']}/checkpoints/external_weights/x/"
                    "external_weights_urls", None)],
    "GET /api/v1/media/{sha256}": lambda n: [(f"/api/v1/media/{n['upload']}", None)],
    "DELETE /api/v1/media/{sha256}": lambda n: [(f"/api/v1/media/{n['upload']}", None)],
    "POST /api/v1/render": lambda n: [("/api/v1/render", {
        "model": n["run"], "for_generation": False, "parts": [{"type": "text", "text": "x"}]})],
    "GET /api/v1/tokenizer": lambda n: [(f"/api/v1/tokenizer?model={n['run']}", None)],
    "GET /v1/models/{name:path}": lambda n: [
        (f"/v1/models/{n['run']}", None), (f"/v1/models/{n['weights']}", None)],
    "POST /v1/chat/completions": lambda n: [
        ("/v1/chat/completions", {"model": n[one], **TALK}) for one in ("run", "weights")],
    "POST /v1/completions": lambda n: [
        ("/v1/completions", {"model": n[one], "prompt": "x", "max_tokens": 1})
        for one in ("run", "weights")],
}  # fmt: skip


def routes_of(folder: Path) -> Iterator[tuple[str, Any]]:
    settings = ServiceSettings(models={"tiny": Offer(ModelSpec(language="tiny"))}, data_dir=folder)
    for included in create_app(settings).routes:
        for route in (
            included.original_router.routes if hasattr(included, "original_router") else ()
        ):
            for method in route.methods - {"HEAD"}:
                yield f"{method} {route.path}", route


def changes(method: str, route: Any) -> bool:
    return method != "GET" and not (route.openapi_extra or {}).get("x-reads")


def asked(server: Any, route: str, ask: Ask, key: str) -> httpx.Response:
    path, body = ask
    more = {"content": body} if isinstance(body, bytes) else {} if body is None else {"json": body}
    answer: httpx.Response = server.ask(route.split()[0], path, key, **more)
    return answer


@pytest.fixture(scope="module")
def guarded(new_server: Callable[..., Any]) -> Any:
    return new_server(environment={"PLAIT_JWT_SECRET": SECRET}).start()


@pytest.fixture(scope="module")
def keys(guarded: Any) -> dict[str, str]:
    made = {"anna": guarded.new_key("anna"), "anna reads": guarded.new_key("anna", "read-only")}
    return made | {f"ben {role}": guarded.new_key("ben", role)
                   for role in ("user", "read-only", "admin")}  # fmt: skip


def done(server: Any, key: str, promise: dict[str, Any]) -> Any:
    body = {"request_id": promise["request_id"]}
    answer = server.post("/api/v1/retrieve_future", body, key)
    assert answer.is_success, answer.text
    assert b'"error"' not in answer.content, answer.text
    return promise


def session_of(server: Any, key: str) -> tuple[str, str]:
    body = {"sdk_version": "0.38.0", "user_metadata": {"of": "its owner"}}
    session = server.post("/api/v1/create_session", body, key).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny",
            "lora_config": {"rank": 2}}  # fmt: skip
    return session, done(server, key, server.post("/api/v1/create_model", body, key).json())[
        "model_id"
    ]


@pytest.fixture(scope="module")
def names(guarded: Any, keys: dict[str, str]) -> Names:
    """Anna's objects, one of each kind, and Ben's session and run."""
    key = keys["anna"]
    session, run = session_of(guarded, key)
    trained = guarded.ask("POST", "/api/v1/forward_backward", key, content=batch(run)).json()
    done(guarded, key, trained)
    for seq, route in ((2, "save_weights"),):
        body = {"model_id": run, "seq_id": seq, "path": "x"}
        done(guarded, key, guarded.post(f"/api/v1/{route}", body, key).json())
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = guarded.post("/api/v1/create_sampling_session", body, key).json()
    loss = guarded.post("/api/v1/create_custom_loss", {"session_id": session, **LOSS}, key).json()
    done(guarded, key, loss)
    own_session, own_run = session_of(guarded, keys["ben user"])
    return {"session": session, "run": run, "weights": f"tinker://{run}/weights/x",
            "sampler": sampler["sampling_session_id"], "request": trained["request_id"],
            "loss": f"{session}:loss:0", "upload": uploaded(guarded, key),
            "own session": own_session, "own run": own_run}  # fmt: skip


def uploaded(server: Any, key: str) -> str:
    file = BytesIO()
    PIL.Image.new("RGB", (8, 8), "red").save(file, "PNG")
    name = hashlib.sha256(file.getvalue()).hexdigest()
    path = f"/api/v1/media?sha256={name}&size={len(file.getvalue())}"
    assert server.ask("POST", path, key, content=file.getvalue()).is_success
    return name


def absent(names: Names) -> Names:
    """Names of the same form that nobody has."""
    nobody = {**names, "request": "0" * 32, "upload": "0" * 64}
    for kind in ("session", "run", "weights", "sampler", "loss"):
        nobody[kind] = names[kind].replace(names["session"], "0" * 32)
    return nobody


def test_every_route_is_in_a_table(tmp_path: Path) -> None:
    routes = {name for name, _ in routes_of(tmp_path)}
    tables = [WITHOUT, set(NAMED), BY_CONTENT, SIGNED]
    assert routes == set.union(*tables)
    assert sum(map(len, tables)) == len(routes)


@pytest.mark.parametrize("role", ["user", "read-only", "admin"])
def test_what_is_another_owners_is_not_there(
    guarded: Any, keys: dict[str, str], names: Names, role: str, tmp_path: Path
) -> None:
    key, nobody = keys[f"ben {role}"], absent(names)
    for route, table in routes_of(tmp_path):
        for theirs, none in zip(NAMED.get(route, lambda _: [])(names),
                                NAMED.get(route, lambda _: [])(nobody), strict=True):  # fmt: skip
            told, plain = (asked(guarded, route, ask, key) for ask in (theirs, none))
            forbidden = role == "read-only" and changes(route.split()[0], table)
            said = f"{route} {theirs[0]}: {told.status_code} {told.text[:300]}"
            assert told.status_code == (403 if forbidden else 404), said
            assert told.status_code == plain.status_code, said
            text, other = told.text, plain.text
            for kind in ("upload", "request", "session"):
                text = text.replace(names[kind], "?")
                other = other.replace(nobody[kind], "?")
            assert text == other, said


def test_lists_tell_of_ones_own(guarded: Any, keys: dict[str, str], names: Names) -> None:
    paths = ("/api/v1/sessions", "/api/v1/training_runs", "/api/v1/checkpoints", "/api/v1/media",
             "/v1/models")  # fmt: skip
    for path in paths:
        assert names["session"] in guarded.get(path, keys["anna"]).text or "media" in path
        for role in ("user", "read-only", "admin"):
            text = guarded.get(path, keys[f"ben {role}"]).text
            assert names["session"] not in text
            assert names["upload"] not in text
    assert names["upload"] in guarded.get("/api/v1/media", keys["anna"]).text


def test_anothers_upload_cannot_be_read(guarded: Any, keys: dict[str, str], names: Names) -> None:
    key = keys["ben user"]
    body = {"session_id": names["own session"], "sampling_session_seq_id": 5, "base_model": "tiny"}
    sampler = guarded.post("/api/v1/create_sampling_session", body, key).json()
    prompt = {"chunks": [{"type": "image", "sha256": names["upload"]}]}
    body = {"seq_id": 1, "prompt": prompt, **sampler}
    promise = guarded.post("/api/v1/asample", {**body, "type": "sample"}, key).json()
    body = {"request_id": promise["request_id"]}
    assert "there is no upload" in guarded.post("/api/v1/retrieve_future", body, key).text


def test_what_others_asked_changed_nothing(
    guarded: Any, keys: dict[str, str], names: Names
) -> None:
    """Numbers that another owner named are still the run's own."""
    body = {"model_id": names["run"], "seq_id": 3, "adam_params": {"learning_rate": 0.01}}
    done(guarded, keys["anna"], guarded.post("/api/v1/optim_step", body, keys["anna"]).json())


def test_a_read_only_key_changes_nothing(
    guarded: Any, keys: dict[str, str], names: Names, tmp_path: Path
) -> None:
    """The owner's own objects, too."""
    key, count = keys["anna reads"], 0
    for route, table in routes_of(tmp_path):
        if not changes(route.split()[0], table):
            continue
        places = {"session_id": names["session"], "run_id": names["run"], "kind": "weights",
                  "sampler_id": names["sampler"], "sha256": names["upload"]}  # fmt: skip
        path = table.path.format(**places, name="x")
        asks = NAMED.get(route, lambda _: [])(names) or [(path, {"sha256": "0" * 64})]
        for ask in asks:
            answer = asked(guarded, route, ask, key)
            assert answer.status_code in (403, 422), (route, answer.text[:300])
            count += 1
    assert count > 25
    for route in ("GET /api/v1/sessions/{session_id}", "POST /api/v1/get_info"):
        assert asked(guarded, route, NAMED[route](names)[0], key).is_success


def test_a_published_checkpoint_is_read_and_not_changed(
    guarded: Any, keys: dict[str, str], names: Names
) -> None:
    place, other = f"/api/v1/training_runs/{names['run']}/checkpoints/weights/x", keys["ben user"]
    assert guarded.post(f"{place}/publish", key=keys["anna"]).is_success
    try:
        read = {"tinker_path": names["weights"]}
        assert guarded.post("/api/v1/weights_info", read, other).is_success
        assert guarded.get(f"{place}/archive", other).is_success
        assert guarded.ask("DELETE", place, other).status_code == 404
        assert guarded.ask("DELETE", f"{place}/publish", other).status_code == 404
        ttl = {"ttl_seconds": 1}
        assert guarded.ask("PUT", f"{place}/ttl", other, json=ttl).status_code == 404
    finally:
        guarded.ask("DELETE", f"{place}/publish", keys["anna"])
    assert guarded.get(f"{place}/archive", other).status_code == 404


def test_an_address_that_was_not_given_out_tells_nothing(guarded: Any, names: Names) -> None:
    for run in (names["run"], absent(names)["run"]):
        path = f"/api/v1/files/{run}/weights/x/manifest.json?until={2**40}&signature={'0' * 64}"
        assert guarded.get(path).status_code == 403


def test_a_revoked_key_is_refused_within_seconds(guarded: Any) -> None:
    key = guarded.new_key("carl")
    assert guarded.get("/api/v1/status", key).is_success
    guarded.command("keys", "revoke", key.split("-")[2], "--data-dir", str(guarded.folder))
    until = time.monotonic() + 10.5
    while guarded.get("/api/v1/status", key).status_code != 401:
        assert time.monotonic() < until
        time.sleep(0.5)


def token(claims: Any, alg: str = "HS256", secret: str = SECRET) -> str:
    head, said = (
        urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
        for part in ({"alg": alg, "typ": "JWT"}, claims)
    )
    signed = hmac.new(secret.encode(), f"{head}.{said}".encode(), hashlib.sha256).digest()
    return f"{head}.{said}.{urlsafe_b64encode(signed).rstrip(b'=').decode()}"


def test_tokens(guarded: Any, keys: dict[str, str], names: Names) -> None:
    later = time.time() + 600
    good = {"sub": "anna", "exp": later}
    assert guarded.get("/api/v1/status", token(good)).json()["owner"] == "anna"
    assert guarded.get(f"/api/v1/sessions/{names['session']}", token(good)).is_success
    reader = token({**good, "role": "read-only"})
    assert guarded.post("/api/v1/create_session", {}, reader).status_code == 403
    bad = [
        token(good, secret="another"), token(good, alg="none"), token({**good, "exp": 1}),
        token({"exp": later}), token({**good, "sub": ""}), token({**good, "sub": 3}),
        token({"sub": "anna"}), token({**good, "role": "root"}), token({**good, "nbf": later}),
        token([]), token(good).rpartition(".")[0] + ".", token(good) + "x", "eyJ", "eyJ.eyJ.eyJ",
        token(good).rpartition(".")[0], "eyJé.x.y",
    ]  # fmt: skip
    for one in bad:
        answer = guarded.get("/api/v1/status", one.encode("utf-8"))
        assert answer.status_code == 401, one
        assert answer.json()["category"] == "user"
