"""Wall time and peak memory of a run's phases, of the process and its children."""

import threading
import time
from collections.abc import Iterator, Mapping
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
    _began: dict[str, float] = field(default_factory=dict, init=False)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(name, done), daemon=True)
        self._began[name] = time.monotonic()
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            spent = time.monotonic() - self._began.pop(name)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def _watch(self, name: str, done: threading.Event) -> None:
        while True:
            self.memory_mb[name] = max(self.memory_mb.get(name, 0.0), resident_mb())
            if done.wait(POLL_SECONDS):
                return

    def state(self, *names: str) -> dict[str, dict[str, float]]:
        """What a resumed run adds of these phases, their present stretch included."""
        now = time.monotonic()
        seconds = {
            name: self.seconds.get(name, 0.0) + now - self._began.get(name, now) for name in names
        }
        return {"seconds": seconds, "memory_mb": {n: self.memory_mb.get(n, 0.0) for n in names}}

    def add(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Count what an earlier process of the same run needed."""
        for name, seconds in state["seconds"].items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for name, memory in state["memory_mb"].items():
            self.memory_mb[name] = max(self.memory_mb.get(name, 0.0), memory)

    @property
    def peak_memory_mb(self) -> float:
        return max(self.memory_mb.values(), default=0.0)
