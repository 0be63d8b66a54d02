"""An export against the checkpoint it is of: logits from a process that knows nothing of Plait."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.errors import CheckpointError

SCRIPT = Path(__file__).with_name("reloading.py")

TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 1e-2}
"""Largest difference of a logit, in parts of the largest logit, by the dtype of the weights: a
merged weight is rounded to it, and in float32 sums come in another order."""

_NO_CHANGE = 1e-6
"""In the same parts: training that changed less cannot be told from none."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the other process loads and computes; see `reloading`."""

    model: Path
    adapter: Path | None
    tokenizer: Path
    rows: list[list[int]]
    messages: list[dict[str, str]] | None
    quantize: str | None = None
    """How the model that the adapter belongs to is quantized."""


@dataclass(frozen=True, slots=True)
class Compared:
    """How near the logits are, over all positions of all rows."""

    positions: int
    largest_difference: float
    largest_logit: float
    mean_difference: float
    trained_change: float
    """Mean difference between the checkpoint's logits and those before it was trained."""


def compare(
    job: Job, trained: Sequence[Tensor], untrained: Sequence[Tensor], tokenizer: Any, dtype: str
) -> Compared:
    """Load an export in another process and require the checkpoint's logits of it.

    Args:
        trained: (T, V) of each row of the job, by the checkpoint.
        untrained: By the model before it was trained. Where rounding is coarse, an export that
            lost what was trained could be near enough: it must be nearer to `trained`.
        dtype: In which the export's weights are kept.

    Raises:
        CheckpointError: it does not load, or computes or renders something else.
    """
    reloaded, facts = _reload(job)
    ours, before, theirs = (
        torch.cat(list(rows)).double() for rows in (trained, untrained, reloaded)
    )
    apart, change = (theirs - ours).abs(), (before - ours).abs().mean().item()
    found = Compared(
        positions=len(ours),
        largest_difference=apart.max().item(),
        largest_logit=ours.abs().max().item(),
        mean_difference=apart.mean().item(),
        trained_change=change,
    )
    allowed = TOLERANCES[dtype] * found.largest_logit
    if not found.largest_difference <= allowed:  # NaN is no number that is small enough
        raise CheckpointError(
            f"an export must compute what its checkpoint computes; loaded again, its logits differ "
            f"by {found.largest_difference:.2g}, and {allowed:.2g} is allowed: nothing was kept"
        )
    if change > _NO_CHANGE * found.largest_logit and not found.mean_difference < change / 2:
        raise CheckpointError(
            f"an export must hold what was trained; loaded again, its logits differ by "
            f"{found.mean_difference:.2g} on average from the checkpoint's, which training changed "
            f"by {change:.2g}: nothing was kept; export in float32 where {dtype} is too coarse"
        )
    _check_text(job, facts, tokenizer)
    return found


def _check_text(job: Job, facts: dict[str, Any], tokenizer: Any) -> None:
    if job.messages is None:
        return
    text = tokenizer.apply_chat_template(job.messages, tokenize=False)
    if facts["text"] != text:
        raise CheckpointError(
            f"an export must render what its checkpoint renders; loaded again, its template writes "
            f"{facts['text'][:60]!r} and not {text[:60]!r}: nothing was kept"
        )


def _reload(job: Job) -> tuple[list[Tensor], dict[str, Any]]:
    """Logits (T, V) of each row, and what else the other process says."""
    with tempfile.TemporaryDirectory(prefix="plait-export-") as name:
        folder = Path(name)
        asked = {**asdict(job), "logits": folder / "logits.safetensors", "facts": folder / "facts"}
        # The other process is elsewhere, and takes a relative folder for a name on the hub.
        asked = {k: v.resolve() if isinstance(v, Path) else v for k, v in asked.items()}
        file = folder / "job.json"
        file.write_text(json.dumps(asked, default=str), encoding="utf-8")
        quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            # Isolated: neither this checkout nor PYTHONPATH helps it.
            [sys.executable, "-I", str(SCRIPT), str(file)],
            cwd=folder, env=os.environ | quiet | {"HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise CheckpointError(
                "an export must load in plain transformers, and this one does not: "
                f"{lines[-1] if lines else f'exit code {done.returncode}'}; nothing was kept"
            )
        logits = load_file(folder / "logits.safetensors")
        facts = json.loads((folder / "facts").read_text(encoding="utf-8"))
    return [logits[str(number)] for number in range(len(job.rows))], facts
