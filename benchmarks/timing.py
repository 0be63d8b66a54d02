"""What the side-by-side benchmarks share: alternating clocks, and the facts of the machine."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

LIBRARIES = ("torch", "transformers", "peft", "numpy")


def seconds_of(step: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def alternate(
    pairs: Sequence[tuple[Callable[[], object], Callable[[], object]]], rounds: int
) -> list[tuple[float, float]]:
    """(ours, peer) seconds of each round over all pairs of steps.

    Within a round the two sides of a pair run one after the other, and who goes first changes
    with every pair and round, so that what else the machine does falls on both.
    """
    found = []
    for number in range(rounds):
        ours = peer = 0.0
        for at, (our_step, peer_step) in enumerate(pairs):
            if (number + at) % 2:
                peer += seconds_of(peer_step)
                ours += seconds_of(our_step)
            else:
                ours += seconds_of(our_step)
                peer += seconds_of(peer_step)
        found.append((ours, peer))
    return found


def summary(rounds: list[tuple[float, float]]) -> dict[str, Any]:
    """The median of the rounds' ratios peer / ours, and what it was taken from."""
    ratios = [peer / ours for ours, peer in rounds]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "rounds": [round(ratio, 3) for ratio in ratios],
        "seconds": round(statistics.median(ours for ours, _ in rounds), 3),
        "peer_seconds": round(statistics.median(peer for _, peer in rounds), 3),
    }


def apart(have: Tensor, want: Tensor) -> float:
    """The norm of the difference, as a share of the norm of `want`."""
    have, want = have.detach().double(), want.detach().double()
    return float((have - want).norm() / want.norm())


def largest(values: Iterable[float]) -> float:
    """The largest value, or NaN where one is: Python's `max` passes it over."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # a GPU's machine needs torch alone for most programs
        return None


def machine() -> dict[str, Any]:
    """Threads, cores, versions and the load a measurement shared the machine with."""
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": {library: _version(library) for library in LIBRARIES},
    }
