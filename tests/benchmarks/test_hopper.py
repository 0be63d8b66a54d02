"""The kernels compile for a Hopper chip without one, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton")


def compiled(*words: str) -> dict[str, object]:
    """What `python -m benchmarks.hopper` prints last; Triton must not interpret there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.hopper", "--json", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_kernels_use_tensor_cores_and_spill_nothing() -> None:
    found = compiled("--quick")
    assert found["problems"] == []
    resources = found["resources"]
    assert isinstance(resources, list)
    names = [made["name"] for made in resources]
    for kernel in ("forward", "backward_queries", "backward_keys"):
        for size in (64, 128):
            assert f"attention {kernel}, head {size}, bf16" in names
    assert all(made["registers"] > 0 for made in resources)
    for room in ("logprobs", "lora"):
        assert any(room in name for name in names), names


@pytest.mark.slow
def test_every_kernel_at_every_size() -> None:
    assert compiled()["problems"] == []


PROGRAM = """
from benchmarks.hopper.compiling import Case, Resources
case = Case("k", None, {}, {}, tensor_cores=True)
assert Resources("k", 100, 0, 0, 1024, 3).problems(case) == []
for text in Resources("k", 255, 8, 0, 300_000, 0).problems(case):
    print(text)
"""


def test_spills_too_much_memory_and_missing_tensor_cores_are_told() -> None:
    """In a process of its own, started at the root, because plait takes the root off `sys.path`."""
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, check=True, text=True, capture_output=True
    ).stdout
    assert said.splitlines() == [
        "k spills 8 bytes a thread",
        "k takes 300000 bytes of shared memory",
        "k multiplies without tensor cores",
    ]
