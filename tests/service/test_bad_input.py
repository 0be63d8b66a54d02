"""What a server is sent and should not be: it says so in its documented form, and goes on."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import zstandard

from plait.service.wire import tinker_pb2 as pb
from plait.service.wire.tensors import tensor_to

LIMIT = 4_000_000
FB = "/api/v1/forward_backward"
JSON = {"content-type": "application/json"}
PROTO = {"content-type": "application/x-protobuf"}


@pytest.fixture(scope="module")
def small(new_server: Callable[..., Any]) -> Any:
    """A server that takes small bodies, and waits briefly."""
    words = (f"body_bytes={LIMIT}", "gap_seconds=2", "hold_seconds=20")
    return new_server(*(word for one in words for word in ("--set", one))).start()


@pytest.fixture(scope="module")
def session(small: Any) -> str:
    said = small.post("/api/v1/create_session", {"sdk_version": "0.38.0"})
    name: str = said.json()["session_id"]
    return name


@pytest.fixture
def run(small: Any, session: str, number: Iterator[int]) -> str:
    body = {"session_id": session, "model_seq_id": next(number), "base_model": "tiny",
            "lora_config": {"rank": 2}}  # fmt: skip
    promise = small.post("/api/v1/create_model", body).json()
    assert "error" not in outcome(small, promise)
    name: str = promise["model_id"]
    return name


@pytest.fixture(scope="module")
def number() -> Iterator[int]:
    return iter(range(1, 1000))


@pytest.fixture(autouse=True)
def _goes_on(small: Any) -> Iterator[None]:
    yield
    assert small.get("/readyz").is_success
    log = small.log.read_text()
    assert "unforeseen_error" not in log, log[-3000:]
    assert "Traceback" not in log, log[-3000:]


def outcome(server: Any, promise: dict[str, Any]) -> Any:
    body = {"request_id": promise["request_id"]}
    answer = server.post("/api/v1/retrieve_future", body)
    assert answer.status_code == 200, answer.text
    return answer.json() if "json" in answer.headers["content-type"] else {}


def check_error(answer: httpx.Response, status: int, category: str = "user") -> None:
    assert answer.status_code == status, answer.text[:500]
    said = answer.json()
    assert said["category"] == category
    assert said["error"]
    for word in ("Traceback", ".py", "site-packages", "/tmp/", "sqlite"):
        assert word not in answer.text


def batch(run: str, seq: int = 1, tokens: int = 4) -> pb.ForwardBackwardRequest:
    message = pb.ForwardBackwardRequest(model_id=run, seq_id=seq, loss_fn="cross_entropy")
    datum = message.data.add()
    ids = np.arange(tokens, dtype="<i4") % 50 + 5
    datum.model_input.add(encoded_text=pb.EncodedTextChunk(tokens=ids.tobytes()))
    datum.loss_fn_inputs["target_tokens"].CopyFrom(tensor_to(ids.astype(np.int64)))
    datum.loss_fn_inputs["weights"].CopyFrom(tensor_to(np.ones(tokens, "f4")))
    return message


def send(server: Any, message: pb.ForwardBackwardRequest) -> httpx.Response:
    answer: httpx.Response = server.ask(
        "POST", FB, content=message.SerializeToString(), headers=PROTO
    )
    return answer


def work(server: Any, run: str, seq: int, tokens: int = 4) -> Any:
    """A promise that is kept whatever came before it."""
    answer = send(server, batch(run, seq, tokens))
    assert answer.is_success, answer.text
    return answer.json()


def step(run: str, seq: int, rate: float = 0.01) -> dict[str, Any]:
    return {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": rate}}


# Bodies


def test_bodies_that_are_no_protobuf(small: Any, run: str) -> None:
    whole = batch(run).SerializeToString()
    for body in (b"", b"\xff" * 50, b'{"model_id": "x"}', os.urandom(500), whole[:-3]):
        answer = small.ask("POST", FB, content=body, headers=PROTO)
        assert answer.status_code in (400, 404, 422), answer.text
        check_error(answer, answer.status_code)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b'{"a": "\xff"}', b"[" * 100_000, b'{"a":' * 50_000, b"nul",
     b'{"sdk_version": "0.38.0"}}', b'"x"', b"1" * 10_000, os.urandom(200)],
)  # fmt: skip
def test_bodies_that_are_no_json(small: Any, body: bytes) -> None:
    for path in ("/api/v1/create_session", "/api/v1/asample", "/api/v1/telemetry"):
        answer = small.ask("POST", path, content=body, headers=JSON)
        assert answer.status_code in (400, 422), (path, answer.text)
        check_error(answer, answer.status_code)


def test_compressed_bodies(small: Any, run: str) -> None:
    headers = {**PROTO, "content-encoding": "zstd"}
    packed = zstandard.compress(batch(run).SerializeToString())
    for body in (b"", b"x", packed[:-2], packed + packed):
        check_error(small.ask("POST", FB, content=body, headers=headers), 400)
    bomb = zstandard.compress(bytes(3_000_000_000))
    assert len(bomb) < LIMIT
    before = memory(small)
    check_error(small.ask("POST", FB, content=bomb, headers=headers), 413)
    assert memory(small) - before < 100_000_000
    odd = {**PROTO, "content-encoding": "gzip"}
    check_error(small.ask("POST", FB, content=packed, headers=odd), 415)
    answer = small.ask("POST", FB, content=packed, headers=headers)
    assert "error" not in outcome(small, answer.json())


def memory(server: Any) -> int:
    size: int = psutil.Process(server.process.pid).memory_info().rss
    return size


def test_bodies_over_the_limit(small: Any) -> None:
    body = b" " * (LIMIT + 1)
    check_error(small.ask("POST", "/api/v1/create_session", content=body, headers=JSON), 413)

    def parts() -> Iterator[bytes]:  # without a content-length
        yield body[:-1]
        yield b"  "

    check_error(small.ask("POST", "/api/v1/create_session", content=parts(), headers=JSON), 413)


def test_a_gigabyte_is_refused_early(small: Any) -> None:
    before, sent = memory(small), 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        block = bytes(1 << 20)
        for _ in range(1000):
            sent += len(block)
            yield block

    try:
        answer = small.ask("POST", FB, content=parts(), headers=PROTO)
        check_error(answer, 413)
    except httpx.WriteError:  # it was closed in the client's face
        pass
    assert sent < 900_000_000
    assert memory(small) - before < 100_000_000
    said = raw(small, b"POST " + FB.encode() + b" HTTP/1.1\r\nhost: x\r\n"
               b"content-length: 1000000000\r\n\r\n")  # fmt: skip
    assert b" 413 " in said


def raw(server: Any, data: bytes, wait: float = 10.0) -> bytes:
    """What comes back until the server closes, or for so long."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(data)
        connection.settimeout(wait)
        said = b""
        try:
            while part := connection.recv(1 << 16):
                said += part
        except TimeoutError:
            pass
        return said


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /api/v1/create_session HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /api/v1/create_session HTTP/1.1\r\nhost: x\r\ncontent-length: "
        + b"9" * 5000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /api/v1/create_session HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz"
        b"\r\n",
        b"GET /api/v1/sessions/%00 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_request(small: Any, data: bytes) -> None:
    said = raw(small, data)
    assert said.startswith((b"HTTP/1.1 4", b"")), said[:300]
    assert b" 500 " not in said
    assert b" 200 " not in said


@pytest.mark.parametrize(
    "path",
    ["/api/v1/sessions/%ff%fe", "/api/v1/sessions/..%2f..%2fetc",
     "/api/v1/training_runs/" + "x" * 5000,
     "/api/v1/sessions?limit=x", "/api/v1/training_runs?offset=" + "9" * 40,
     "/api/v1/checkpoints?limit=-1&offset=-5", "/api/v1/sessions?offset=" + "9" * 5000,
     "/api/v1/files/a/weights/b/c?until=1&signature=%ff", "/api/v1/audit?limit=" + "9" * 30,
     "/api/v1/training_runs/x/checkpoints/odd/y/archive", "/nowhere", "//", "/api/v1/%2e%2e/x"],
)  # fmt: skip
def test_paths_and_queries(small: Any, path: str) -> None:
    answer = small.get(path)
    assert answer.status_code < 500, answer.text
    if answer.is_error:
        check_error(answer, answer.status_code)


# Names, numbers and order


def test_unknown_names(small: Any, session: str) -> None:
    no = "0" * 32
    model = {"session_id": session, "model_seq_id": 999, "base_model": "odd"}
    for path, body in (
        ("create_model", model), ("get_info", {"model_id": f"{no}:train:0"}),
        ("create_model", {**model, "session_id": no}), ("optim_step", step(no, 1)),
        ("session_heartbeat", {"session_id": no}), ("retrieve_future", {"request_id": no}),
        ("asample", {"sampling_session_id": no, "seq_id": 1, "prompt": {"chunks": []}}),
        ("weights_info", {"tinker_path": "tinker://a/weights/b"}),
    ):  # fmt: skip
        check_error(small.post(f"/api/v1/{path}", body), 404)
    check_error(send(small, batch(no)), 404)


def test_a_number_that_never_comes_is_given_up(small: Any, run: str) -> None:
    begun = time.monotonic()
    work(small, run, 2)
    said = outcome(small, small.post("/api/v1/optim_step", step(run, 3)).json())
    assert 1 < time.monotonic() - begun < 15
    assert said["category"] == "user"
    assert "never came" in said["error"]
    check_error(send(small, batch(run, 1)), 422)
    assert "error" not in outcome(small, work(small, run, 4))


def test_one_number_is_one_request(small: Any, run: str) -> None:
    first = work(small, run, 1)
    assert work(small, run, 1) == first
    check_error(send(small, batch(run, 1, tokens=5)), 422)
    check_error(small.post("/api/v1/optim_step", step(run, 1)), 422)
    check_error(send(small, batch(run, -1)), 422)
    check_error(send(small, batch(run, 0)), 422)
    assert "error" not in outcome(small, first)
    assert work(small, run, 1) == first


def test_a_bad_request_under_a_number_that_waits_loses_nothing(small: Any, run: str) -> None:
    waiting = [work(small, run, seq) for seq in (3, 2)]
    for seq in (3, 2):
        check_error(small.post("/api/v1/optim_step", step(run, seq, -1)), 422)
    for promise in (work(small, run, 1), *waiting):
        assert "error" not in outcome(small, promise)


def test_samplers_of_one_number_are_one(small: Any, session: str, run: str) -> None:
    body = {"session_id": session, "sampling_session_seq_id": 1, "base_model": "tiny"}
    first = small.post("/api/v1/create_sampling_session", body).json()
    assert small.post("/api/v1/create_sampling_session", body).json() == first
    view = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 1}
    check_error(small.post("/api/v1/save_weights_for_sampler", view), 422)
    view |= {"seq_id": 2, "sampling_session_seq_id": 2}
    taken = small.post("/api/v1/save_weights_for_sampler", view).json()
    assert "error" not in outcome(small, taken)
    assert small.post("/api/v1/save_weights_for_sampler", view).json() == taken
    check_error(small.post("/api/v1/save_weights_for_sampler", {**view, "seq_id": 3}), 422)
    body["sampling_session_seq_id"] = 2
    check_error(small.post("/api/v1/create_sampling_session", body), 422)


def test_a_checkpoint_ends(small: Any, run: str) -> None:
    body = {"model_id": run, "seq_id": 1, "path": "brief", "ttl_seconds": 1.0}
    path = outcome(small, small.post("/api/v1/save_weights", body).json())["path"]
    time.sleep(1.5)
    check_error(small.post("/api/v1/weights_info", {"tinker_path": path}), 404)
    load = {"model_id": run, "seq_id": 2, "path": path}
    check_error(small.post("/api/v1/load_weights", load), 404)
    assert "brief" not in small.get(f"/api/v1/training_runs/{run}/checkpoints").text
    assert "error" not in outcome(small, work(small, run, 3))


def test_tensors_of_huge_shapes(small: Any, run: str) -> None:
    children = psutil.Process(small.process.pid).children()
    engine = max(children, key=lambda one: one.memory_info().rss)
    before = engine.memory_info().rss
    for shape in ([1, 2**40], [2**31, 2**31], [1, 2**26], [-1, 5], [2**62] * 9, [0]):
        message = batch(run, 1)
        tensor = message.data[0].loss_fn_inputs["weights"]
        tensor.ClearField("dense")
        tensor.shape[:] = shape
        tensor.sparse_csr.crow_indices = bytes(16)
        answer = send(small, message)
        if answer.is_success:
            assert outcome(small, answer.json())["category"] == "user"
    assert engine.memory_info().rss - before < 700_000_000


# Clients that are slow, or go away


def test_clients_that_vanish_in_the_middle(small: Any, run: str) -> None:
    head = f"POST {FB} HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n".encode()
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", small.port)) as connection:
            connection.sendall(head + bytes(500_000))
    promise = work(small, run, 2)  # waits for 1
    asked = json.dumps({"request_id": promise["request_id"]}).encode()
    poll = (b"POST /api/v1/retrieve_future HTTP/1.1\r\nhost: x\r\ncontent-type: application/json"
            b"\r\ncontent-length: " + str(len(asked)).encode() + b"\r\n\r\n" + asked)  # fmt: skip
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", small.port)) as connection:
            connection.sendall(poll)
    for one in (work(small, run, 1), promise):
        assert "error" not in outcome(small, one)


def test_slow_clients_keep_nobody_waiting(small: Any) -> None:
    slow = [socket.create_connection(("127.0.0.1", small.port)) for _ in range(100)]
    try:
        for number, connection in enumerate(slow):
            half = b"POST /api/v1/create_session HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
            connection.sendall(half[: 20 + number])
        begun = time.monotonic()
        assert small.get("/healthz").is_success
        assert time.monotonic() - begun < 5
    finally:
        for connection in slow:
            connection.close()
