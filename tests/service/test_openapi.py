"""Requests made up from the server's own description: none of them makes it fail."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = 12
SECONDS = 40
HURRIED = ("--set", "hold_seconds=0.2", "--set", "gap_seconds=0.5")
LEFT_OUT = "^/api/v1/(sessions/[{]_[}]/.*|forward_backward)$"
"""Paths that are refused whatever they hold, and the one whose bodies are protobuf."""


def test_no_described_request_fails(new_server: Callable[..., Any], tmp_path: Path) -> None:
    """Schemathesis, in a process of its own."""
    try_described_requests(new_server(*HURRIED).start(), tmp_path)


@pytest.mark.slow
def test_no_described_request_fails_with_postgresql(
    new_server: Callable[..., Any], postgresql: str, tmp_path: Path
) -> None:
    server = new_server(*HURRIED, "--database", postgresql).start()
    try_described_requests(server, tmp_path)
    server.stop()


def try_described_requests(server: Any, folder: Path) -> None:
    command = [
        Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json",
        "--checks", "not_a_server_error", "--max-examples", str(EXAMPLES), "--seed", "1",
        "--phases", "examples,coverage,fuzzing", "--generation-deterministic",
        "--exclude-path-regex", LEFT_OUT, "--request-timeout", "20", "--no-color",
        "--max-time", str(SECONDS), "--suppress-health-check", "all",
    ]  # fmt: skip
    environment = {**os.environ, "NO_PROXY": "*"}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False,
        timeout=10 * SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[:6000] + done.stdout[-3000:] + done.stderr[-2000:]
    assert server.get("/readyz").is_success
    log = server.log.read_text()
    assert "unforeseen_error" not in log and "periodic_work_failed" not in log
