"""Wall time and peak memory of a run's phases, of the process and its children."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

POLL_SECONDS = 0.05
"""Between two readings of resident memory; a peak shorter than this can be missed."""


def resident_mb() -> float:
    """Resident memory of this process and its children, in MB (10^6 bytes)."""
    me = psutil.Process()
    total = me.memory_info().rss
    for child in me.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return float(total) / 1e6


@dataclass(slots=True)
class Phases:
    """`with phases("train"): ...` adds to `seconds["train"]` and raises `memory_mb["train"]`."""

    seconds: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(name, done), daemon=True)
        start = time.monotonic()
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def _watch(self, name: str, done: threading.Event) -> None:
        while True:
            self.memory_mb[name] = max(self.memory_mb.get(name, 0.0), resident_mb())
            if done.wait(POLL_SECONDS):
                return

    @property
    def peak_memory_mb(self) -> float:
        return max(self.memory_mb.values(), default=0.0)
