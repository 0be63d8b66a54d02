"""The official client's own command line lists checkpoints here, and downloads them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = [{"tokens": [5, 6, 7], "inputs": {"target_tokens": [6, 7, 8], "weights": [1.0] * 3}}]

COMMAND = """
import os, runpy, sys

code = 0
try:
    runpy.run_module("tinker.cli", run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
sys.stdout.flush()
os._exit(code or 0)
"""
"""`python -m tinker.cli`, but for the interpreter's end, where its threads may abort."""


@pytest.mark.parametrize("version", ["0.25.0", "0.31.0", "0.38.0"])
def test_the_command_line(
    version: str, server: Any, run_tinker: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    made = run_tinker(server, version, "cli", {"plain": PLAIN})

    def tinker(*words: str) -> Any:
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT / f".venv/tinker-{version}"), "NO_PROXY": "*",
            "TINKER_API_KEY": "tml-x", "TINKER_BASE_URL": server.url,
        }  # fmt: skip
        command = [sys.executable, "-P", "-W", "ignore", "-c", COMMAND, "-f", "json", *words]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    run, state, sampling = made["run"], made["state"], made["sampling"]
    assert run in {one["training_run_id"] for one in tinker("run", "list")["runs"]}
    assert tinker("run", "info", run)["lora_rank"] == 4
    listed = tinker("checkpoint", "list", "--run-id", run)["checkpoints"]
    assert {one["tinker_path"] for one in listed} == {state, sampling}
    everything = tinker("checkpoint", "list")["checkpoints"]
    assert {state, sampling} <= {one["tinker_path"] for one in everything}
    info = tinker("checkpoint", "info", state)
    assert info["checkpoint_type"] == "training" and info["lora_rank"] == 4
    tinker("checkpoint", "download", state, "--output", str(tmp_path))
    files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
