"""Two recipes of the Tinker cookbook, unchanged, run to their end here and offline."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PYTHON = Path(__file__).parents[2] / ".venv-cookbook" / "bin" / "python"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cookbook_server(new_server: Callable[..., Any], tiny_language: Path) -> Any:
    """Offers a model under a name that is a folder too, relative to where the recipes run."""
    return new_server(models=[f"local/tiny={tiny_language}"]).start()


@pytest.fixture
def recipe(
    cookbook_server: Any, tiny_language: Path, tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """Runs a recipe; the lines of its metrics."""
    assert PYTHON.is_file(), "make cookbook installs what this needs"
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "tiny").symlink_to(tiny_language)

    def run(module: str, *words: str) -> list[dict[str, Any]]:
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "*",
            "TINKER_API_KEY": "tml-x", "TINKER_BASE_URL": cookbook_server.url,
            "OMP_NUM_THREADS": "1", "PYTHONPATH": "",
        }  # fmt: skip
        words = (
            *words, f"base_url={cookbook_server.url}", "model_name=local/tiny", "lora_rank=4",
            "renderer_name=role_colon", f"log_path={tmp_path / 'log'}",
            "behavior_if_log_dir_exists=delete",
        )  # fmt: skip
        done = subprocess.run(
            [str(PYTHON), "-P", "-m", f"tinker_cookbook.recipes.{module}.train", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        lines = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
        saved = (tmp_path / "log" / "checkpoints.jsonl").read_text().splitlines()
        assert json.loads(saved[-1])["name"] == "final"
        return [json.loads(line) for line in lines]

    return run


def test_chat_sl(recipe: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [
        {"role": "user", "content": "the red disc"},
        {"role": "assistant", "content": "a big blue square"},
    ]
    chats.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(40)))
    metrics = recipe(
        "chat_sl", f"dataset={chats}", "batch_size=4", "max_length=128", "max_steps=8",
        "learning_rate=0.01", "save_every=4", "eval_every=4",
    )  # fmt: skip
    losses = [line["train_mean_nll"] for line in metrics if "train_mean_nll" in line]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5


def test_math_rl(recipe: Callable[..., list[dict[str, Any]]]) -> None:
    metrics = recipe(
        "math_rl", "env=arithmetic", "group_size=4", "groups_per_batch=4", "max_tokens=5",
        "loss_fn=importance_sampling", "max_steps=2", "save_every=1", "eval_every=0",
    )  # fmt: skip
    assert sum("optim/grad_norm:mean" in line or "progress/batch" in line for line in metrics) >= 2
