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

PROGRAMS = {
    "attention": ["benchmarks.attention", "--json", "--only", "gpu"],
    "logprobs": ["benchmarks.logprobs", "--json", "--only", "gpu"],
    "lora": ["benchmarks.lora", "--json", "--only", "gpu"],
    "step_large": ["benchmarks.step_large", "--json"],
}
LEAST_SECONDS = 20
"""A program is not begun with less time than this."""


def chip() -> str:
    """The GPU's name as a folder's: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def run(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit status and what was printed; the errors go where ours go."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, done.stdout


def tests() -> list[str]:
    """The kernels' own tests, which need no fixture of ours, over all cores."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/kernels"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]
    return [*command, "tests/kernels"]


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
    status, said = run(tests(), ends - time.monotonic())
    print(said)
    if status:
        print("a kernel's test is red: nothing is measured")
        return 1
    failed = []
    for name, command in PROGRAMS.items():
        left = ends - time.monotonic()
        status, said = (124, "") if left < LEAST_SECONDS else run(["-m", *command], left)
        if status:
            failed.append(name)
            print(f"{name}: {'no time was left' if status == 124 else f'exit {status}'}\n{said}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        found = last_object(said)
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {folder.relative_to(ROOT) / name}.json")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
