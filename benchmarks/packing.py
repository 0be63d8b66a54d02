"""How full packs are on three mixes of lengths, checked in the same run.

    python -m benchmarks.packing --json

The fill is the share of positions that documents take, over all packs, the last and emptiest
too. Padding is measured beside it: the same samples in shuffled batches, each row as long as its
batch's longest. A number is only printed when every sample is in exactly one pack, no pack is
over its capacity, and the packer held back no more samples than its window.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.datasets.packing import WINDOW, Unit, best_fit, fill_of

SAMPLES, CAPACITY, BATCH = 20_000, 8192, 16

Lengths = NDArray[np.int64]


def chat() -> Lengths:
    """Conversations: log-normal, mean 573 positions."""
    r = np.random.default_rng(0)
    return _clipped(r.lognormal(np.log(350), 1.0, SAMPLES), 16)


def vlm() -> Lengths:
    """A text and 0 to 4 pictures of one size, mean 830 positions."""
    r = np.random.default_rng(0)
    text = _clipped(r.lognormal(np.log(120), 0.9, SAMPLES), 8, 4096)
    pictures = r.choice([0, 1, 2, 4], SAMPLES, p=[0.15, 0.60, 0.15, 0.10])
    each = r.choice([256, 576, 1024], SAMPLES, p=[0.5, 0.3, 0.2])
    return _clipped(text + pictures * each, 8)


def video() -> Lengths:
    """A text and 8 to 64 frames of 64 positions, mean 2404 positions."""
    r = np.random.default_rng(0)
    text = _clipped(r.lognormal(np.log(80), 0.7, SAMPLES), 8, 2048)
    return _clipped(text + 64 * r.integers(8, 65, SAMPLES), 8)


def _clipped(values: NDArray[Any], low: int, high: int = CAPACITY) -> Lengths:
    return np.clip(values.astype(np.int64), low, high)


MIXES = {"chat": chat, "vlm": vlm, "video": video}


def padded_fill(lengths: Lengths) -> float:
    """The fill of shuffled batches of 16 rows padded to each batch's longest."""
    order = np.random.default_rng(1).permutation(len(lengths))
    batches = [lengths[order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
    return float(lengths.sum() / sum(int(batch.max()) * len(batch) for batch in batches))


def measure(lengths: Lengths) -> dict[str, Any]:
    """Pack one mix, check the result, and say what it took."""
    read = 0

    def units() -> Iterator[Unit[int]]:
        nonlocal read
        for key, length in enumerate(lengths.tolist()):
            read += 1
            yield Unit((key,), length)

    packs: list[list[int]] = []
    given = held = 0
    started = time.perf_counter()
    for pack in best_fit(units(), capacity=CAPACITY):
        held = max(held, read - given)
        given += len(pack)
        packs.append(pack)
    seconds = time.perf_counter() - started
    taken = [int(lengths[pack].sum()) for pack in packs]
    if sorted(key for pack in packs for key in pack) != list(range(len(lengths))):
        raise SystemExit("packing is wrong: a sample is missing or packed twice")
    if max(taken) > CAPACITY or held > WINDOW:
        raise SystemExit(f"packing is wrong: {max(taken)} positions in a pack, {held} held back")
    return {
        "fill": round(fill_of(taken, CAPACITY), 5),
        "padded_fill": round(padded_fill(lengths), 5),
        "packs": len(packs),
        "held_back": held,
        "mean_length": round(float(lengths.mean()), 1),
        "seconds": round(seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="How full packs are on three mixes of lengths.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    arguments = parser.parse_args()
    found = {name: measure(make()) for name, make in MIXES.items()}
    if not arguments.json:
        for name, facts in found.items():
            print(f"{name:6} packed {facts['fill']:.4f}  padded {facts['padded_fill']:.4f}")
    by_fact = {fact: {name: found[name][fact] for name in found} for fact in found["chat"]}
    print(json.dumps(by_fact | {"capacity": CAPACITY, "window": WINDOW, "samples": SAMPLES}))


if __name__ == "__main__":
    main()
