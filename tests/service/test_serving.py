"""A server starts, says that it is ready, and stops; commands ask it."""

import signal
from collections.abc import Callable
from typing import Any


def test_health(server: Any) -> None:
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json()["ready"] is True
    assert "plait_engine_up 1.0" in server.get("/metrics").text
    assert "tiny" in server.command("status")
    assert server.command("runs").splitlines()[0].startswith("run")
    assert server.command("checkpoints").splitlines()[0].startswith("path")


def test_a_server_that_is_told_to_stop_stops(new_server: Callable[..., Any]) -> None:
    server = new_server().start()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_others_may_not_reach_a_server_without_keys(new_server: Callable[..., Any]) -> None:
    server = new_server("--host", "0.0.0.0")
    server.start(wait=False)
    assert server.process.wait(60) == 2
    assert "there is no key yet" in server.log.read_text()


def test_keys_are_asked_for_once_there_is_one(new_server: Callable[..., Any]) -> None:
    server = new_server().start()
    assert server.get("/api/v1/status").json()["owner"] == "local"
    key, reader = server.new_key("anna"), server.new_key("anna", "read-only")
    assert server.get("/api/v1/status").status_code == 401
    assert server.get("/api/v1/status", key).json()["owner"] == "anna"
    assert server.get("/api/v1/status", headers={"Authorization": f"Bearer {key}"}).is_success
    assert server.get("/api/v1/status", key[:-1] + "x").status_code == 401
    assert server.get("/api/v1/status", reader).json()["role"] == "read-only"
    body = {"tags": [], "sdk_version": "0.38.0"}
    assert server.post("/api/v1/create_session", body, reader).status_code == 403
    assert server.post("/api/v1/create_session", body, key).is_success
    assert key not in server.log.read_text()
    name = key.split("-")[2]
    assert name in server.command("keys", "list", "--data-dir", str(server.folder))
    server.command("keys", "revoke", name, "--data-dir", str(server.folder))
    assert key.split("-", 3)[3] not in server.command(
        "keys", "list", "--data-dir", str(server.folder)
    )
