"""A server starts, says that it is ready, and stops; commands ask it."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import plait
from plait.cli.main import main


def test_health(server: Any) -> None:
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json()["ready"] is True
    assert "plait_engine_up 1.0" in server.get("/metrics").text
    assert "tiny" in server.command("status")
    assert server.command("runs").splitlines()[0].startswith("run")
    assert server.command("checkpoints").splitlines()[0].startswith("path")


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_its_description_needs_no_internet(server: Any, page: str) -> None:
    text = server.get(page).text
    named = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert any(name.endswith(".js") for name in named), text
    for name in [*named, "/openapi.json"]:
        assert name.startswith("/"), name
        assert server.get(name).is_success, name


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "99999"], "port must be"),
        (["--threads", "0"], "threads must be"),
        (["--devices", "0"], "devices must be"),
        (["--database", "mysql://u:secret@x/y"], "got mysql://x/y"),
        (["--database", "postgresql://u:secret@127.0.0.1:1/y"], "127.0.0.1:1/y cannot be used"),
        (["--model", "=x"], "--model is"),
        (["--model", "a b=x"], "a name has no spaces"),
        (["--model", "x=none/at/all"], "'none/at/all' is none of them"),
        (["--model", "x=README.md"], "'README.md' is none of them"),
        (["--model", "x=none.yaml"], "none.yaml is no recipe that can be read"),
        (["--tls-cert", "none.pem", "--tls-key", "none.key"], "none.pem and none.key are no"),
        (["--data-dir", "/dev/null/x"], "/dev/null/x cannot be the folder"),
        (["--host", "192.0.2.1"], "there is no key yet"),
        (["--host", "localhost", "--port", "USED"], "cannot be listened on"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    tiny_language: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], told: str,
) -> None:  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        given = ["--model", f"tiny={tiny_language}", "--data-dir", str(tmp_path), *words]
        assert main(["serve", *(port if word == "USED" else word for word in given)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[-1] and lines[-1].startswith("error: "), lines
    assert "secret" not in "".join(lines)


def test_a_folder_that_another_server_uses(new_server: Callable[..., Any], server: Any) -> None:
    other = new_server("--data-dir", str(server.folder)).start(wait=False)
    assert other.process.wait(120) == 2
    assert "another server uses" in other.log.read_text().splitlines()[-1]


def test_tables_say_what_is_there(new_server: Callable[..., Any], tmp_path: Path) -> None:
    """Whole, for they are copied, and without colours or pictures made of what users wrote."""
    server = new_server().start()
    data = ["--data-dir", str(server.folder)]
    server.command("keys", "create", "anna", "--label", "[/x] :cat: [red]y[/red]", *data)
    assert "[/x] :cat: [red]y[/red]" in server.command("keys", "list", *data)
    key = server.new_key("anna")
    with plait.ServiceClient(server.url, key) as service:
        client = service.create_lora_training_client("tiny", rank=2)
        path = client.save_state("a-name-that-is-as-long-as-names-may-well-be").result().path
    for name, word in (("runs", client.run_id), ("checkpoints", path)):
        assert word in server.command(name, "--key", key).split()


def test_a_group_that_is_told_to_stop_answers_first(new_server: Callable[..., Any]) -> None:
    """As systemd does it: the engine is told as well, and goes on until all is answered."""
    server = new_server().start()
    engine = psutil.Process(server.process.pid).children()[0]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 300, "temperature": 0.0, "stop": ["\0"]}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, "/v1/completions", body)
        time.sleep(1.0)
        for sign in (signal.SIGINT, signal.SIGTERM):
            engine.send_signal(sign)
        server.process.send_signal(signal.SIGTERM)
        assert asked.result().is_success, asked.result().text
    assert server.process.wait(60) == 0
    assert not engine.is_running()
    assert "Traceback" not in server.log.read_text()


def test_the_server_s_own_process_is_small() -> None:
    """Numbers are the engine's: torch would make it start ten times as slowly."""
    program = (
        "import sys, plait.cli.main, plait.service.serve\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert "torch" not in done.stdout and "transformers" not in done.stdout
