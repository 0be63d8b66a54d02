"""`make gpu`: the kernels' tests, and every GPU benchmark, on this machine's own Python and torch.

    python -m benchmarks.gpu

Creates no environment and downloads nothing: torch, triton, numpy and pytest must be there;
transformers and peft for the cases that load a model. Results go to `benchmarks/results/<chip>/`,
one file a program, each written only when it has found its results right. Nothing is measured
where a test is red. All of it ends within nine minutes.
"""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 520
"""For everything; what has not begun by then is left out, and said."""

STOPPED = 124
TEST_SECONDS = 200
PROGRAMS = {
    "step_large": ["benchmarks.step_large", "--json"],
    "lora": ["benchmarks.lora", "--json", "--only", "gpu"],
    "logprobs": ["benchmarks.logprobs", "--json", "--only", "gpu"],
    "attention": ["benchmarks.attention", "--json", "--only", "gpu"],
}
SHARE_SECONDS = 100
"""Of each program but attention, which stops between its many cases and takes what is left."""

ATTENTION_LEAVES = 40
"""Seconds for the case that attention has begun when its time is over."""

LEAST_SECONDS = 20
"""A program is not begun with less time than this."""


def chip() -> str:
    """The GPU's name as a folder's: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def run(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit status, 124 when it was stopped, and what was printed; errors go where ours go."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout or b""  # bytes here, also with text=True
        return STOPPED, said.decode(errors="replace") if isinstance(said, bytes) else said
    return done.returncode, done.stdout


def tests() -> list[str]:
    """The kernels' own tests, which need no fixture of ours, over all cores."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/kernels"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]
    return [*command, "tests/kernels"]


def measured(name: str, command: list[str], left: float) -> tuple[str, str]:
    """Run a program within the `left` seconds: what went wrong, or "", and what it printed."""
    if left < LEAST_SECONDS:
        return "no time was left to begin it", ""
    if name == "attention":
        command = [*command, "--seconds", str(max(1, round(left - ATTENTION_LEAVES)))]
    else:
        left = min(left, SHARE_SECONDS)
    status, said = run(["-m", *command], left)
    if status == STOPPED:
        return f"stopped after {left:.0f} seconds", said
    return f"exit {status}" if status else "", said


def last_object(text: str) -> dict[str, Any]:
    """The JSON object in the last line of a program's output."""
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("make gpu needs a GPU that torch can use; this machine has none")
        return 2
    ends = time.monotonic() + SECONDS
    folder = ROOT / "benchmarks" / "results" / chip()
    status, said = run(tests(), TEST_SECONDS)
    print(said)
    if status:
        reason = "their time is over" if status == STOPPED else "one is red"
        print(f"the kernels' tests: {reason}: nothing is measured")
        return 1
    failed = []
    for name, command in PROGRAMS.items():
        problem, said = measured(name, command, ends - time.monotonic())
        if problem:
            failed.append(name)
            print(f"{name}: {problem}\n{said}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        found = last_object(said)
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {folder.relative_to(ROOT) / name}.json")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
