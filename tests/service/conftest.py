"""Real servers: `plait serve` in a process of its own, on loopback, with a tiny model."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

START_SECONDS = 300
"""The first start after an install compiles what it imports, beside whatever else runs."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """One server's process, which may be killed and started again on the same folder."""

    folder: Path
    models: list[str]
    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self, *, wait: bool = True) -> "Server":
        words = [word for model in self.models for word in ("--model", model)]
        command = [
            sys.executable, "-P", "-m", "plait.cli", "serve", *words, "--threads", "1",
            "--data-dir", str(self.folder), "--port", str(self.port), *self.options,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "*", **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
        if wait:
            self.wait()
        return self

    def wait(self, path: str = "/readyz") -> None:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                if self.get(path).is_success:
                    return
            except httpx.HTTPError:
                pass
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def get(self, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        return self.ask("GET", path, key, **options)

    def post(self, path: str, body: Any = None, key: str | None = None) -> httpx.Response:
        return self.ask("POST", path, key, json={} if body is None else body)

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {**({"X-API-Key": key} if key else {}), **options.pop("headers", {})}
        return httpx.request(
            method, f"{self.url}{path}", headers=headers, timeout=60, trust_env=False, **options
        )

    def kill(self, sign: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(sign)
            self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill(signal.SIGTERM)

    def command(self, *words: str) -> str:
        """Another command of Plait on this server's folder."""
        command = [sys.executable, "-P", "-m", "plait.cli", *words]
        environment = {**os.environ, "PLAIT_BASE_URL": self.url, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def new_key(self, owner: str, role: str = "user") -> str:
        told = self.command("keys", "create", owner, "--role", role, "--data-dir", str(self.folder))
        return told.split()[-1]


@pytest.fixture(scope="session")
def new_server(
    tiny_language: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """Makes servers that offer `tiny`, not started yet; all are stopped in the end."""
    made: list[Server] = []

    def make(*options: str, models: list[str] | None = None, **more: Any) -> Server:
        folder = tmp_path_factory.mktemp("server") / "data"
        server = Server(folder, models or [f"tiny={tiny_language}"], list(options), **more)
        made.append(server)
        return server

    yield make
    for server in made:
        server.stop()


@pytest.fixture(scope="session")
def server(new_server: Callable[..., Server]) -> Server:
    """One server for the tests that leave it as it is."""
    return new_server().start()


@pytest.fixture(scope="session")
def seeing_recipe(
    tiny_language: Path, tiny_vision: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model that reads pictures, sounds and films."""
    encoders = {
        "image": {"name": "hf_vision", "weights": str(tiny_vision), "grid": [2, 2]},
        "audio": {"name": "mel"},
        "video": {"name": "tubelets"},
    }
    values = {
        "name": "seeing",
        "data": {"path": "none"},
        "model": {"language": str(tiny_language), "encoders": encoders},
    }
    file = tmp_path_factory.mktemp("recipe") / "seeing.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="session")
def seeing(new_server: Callable[..., Server], seeing_recipe: Path) -> Server:
    """One server of that model, for the tests that leave it as it is."""
    return new_server(models=[str(seeing_recipe)]).start()


@pytest.fixture
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty database of a PostgreSQL that goes with the test."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is not installed here (Debian: apt-get install postgresql)")
    # Its server refuses to be run by root, and must reach its folder.
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    user = user if os.geteuid() == 0 else []
    folder = Path("/tmp") / f"plait-postgresql-{os.getpid()}"
    folder.mkdir()
    if user:
        shutil.chown(folder, "postgres", "postgres")
    binaries, port = found[-1].parent, free_port()
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"

    def call(*words: str) -> None:
        subprocess.run([*user, *words], check=True, cwd="/", capture_output=True)

    try:
        call(str(binaries / "initdb"), "-D", f"{folder}/data", "-A", "trust", "-U", "plait")
        log = f"{folder}/log"
        control = [str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-w"]
        call(*control, "-l", log, "-o", options, "start")
        try:
            yield f"postgresql://plait@127.0.0.1:{port}/postgres"
        finally:
            call(*control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run_tinker(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Server, str, str, Any], dict[str, Any]]:
    """Runs a script of `tinker_scripts` with a version of the official client: what it told."""
    scripts = Path(__file__).parent / "tinker_scripts"

    def run(server: Server, version: str, name: str, asked: Any) -> dict[str, Any]:
        client = ROOT / f".venv/tinker-{version}"
        assert client.is_dir(), "make .venv/tinker installs the clients"
        folder = tmp_path_factory.mktemp(name)
        (folder / "asked.json").write_text(json.dumps(asked))
        environment = {
            **os.environ, "PYTHONPATH": f"{client}{os.pathsep}{scripts}", "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", str(scripts / f"{name}.py"), server.url,
             str(folder / "asked.json"), str(folder / "told.json")],
            env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        told: dict[str, Any] = json.loads((folder / "told.json").read_text())
        return told

    return run
