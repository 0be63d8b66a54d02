"""Clocks of a GPU: events on its own stream, sides in turn, medians."""

import statistics
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], object]


def seconds_on_gpu(step: Step, repeats: int) -> float:
    """Mean seconds of a call, of `repeats` calls one behind another."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / repeats


def medians(steps: Mapping[str, Step], rounds: int = 5, seconds: float = 0.05) -> dict[str, float]:
    """Median seconds of each step. All take their turn in every round, first the one, then the
    other way round; a round repeats a step until it has run for about `seconds`.
    """
    repeats = {}
    for name, step in steps.items():
        step()  # compiles, and fills caches
        once = seconds_on_gpu(step, 1)
        repeats[name] = max(1, min(50, round(seconds / max(once, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps)[:: 1 if number % 2 else -1]
        for name in names:
            found[name].append(seconds_on_gpu(steps[name], repeats[name]))
    return {name: statistics.median(values) for name, values in found.items()}


def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations a second of a bf16 product (size, size) x (size, size)."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = medians({"matmul": lambda: left @ right})
    return 2 * size**3 / found["matmul"]
