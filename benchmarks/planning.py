"""How long a million rows take to plan, and how much memory, checked in the same run.

    python -m benchmarks.planning --json

The rows are of the `vlm` mix of benchmarks/packing.py: a text, and no, one, two or four pictures.
`seconds` is from counted rows to the packs of an epoch: columns, screening, the fingerprint that a
resumed run is held against, packing under every budget, the order of the packs. `rows_seconds` is
what holding the rows costs before, one by one as headers bring them. `memory_mb` is by how much
the peak of a fresh process grows over all of it. A number is only printed when every row is in
exactly one pack, no pack is over a budget, and two ranks have equally many packs and all rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.datasets.columns import Measured, MeasuredRow, RowCounts
from plait.datasets.packing import fill_of
from plait.datasets.planning import costs_of, screen
from plait.datasets.policy import FailurePolicy
from plait.datasets.schedule import Block, Schedule, over_ranks
from plait.datasets.settings import LoaderSettings
from plait.errors import Origin

ROWS = 1_000_000
CAPACITY = 8192
BUDGETS = {
    "one": LoaderSettings(capacity=CAPACITY),
    "four": LoaderSettings(
        capacity=CAPACITY, max_documents=64, max_patches=7168, max_squares=24_000_000
    ),
    "decreasing": LoaderSettings(capacity=CAPACITY, packing="decreasing"),
}
"""`four` bind all: of a pack that is full of positions 78 % are pictures' in the mean."""


def rows(count: int) -> Iterator[MeasuredRow]:
    """The vlm mix, row by row, as `measure` finds them."""
    r = np.random.default_rng(0)
    text = np.clip(r.lognormal(np.log(120), 0.9, count).astype(np.int64), 8, 4096)
    pictures = r.choice([0, 1, 2, 4], count, p=[0.15, 0.60, 0.15, 0.10])
    each = r.choice([256, 576, 1024], count, p=[0.5, 0.3, 0.2])
    facts = zip((pictures * each).tolist(), text.tolist(), strict=True)
    for row, (patches, words) in enumerate(facts):
        yield MeasuredRow(
            row,
            Origin("vlm", row),
            RowCounts(
                positions={"text": words, "image": patches}, patches=patches, media_end=patches
            ),
            id=f"pictures/{row:07d}.jpg",
        )


def plan(measured: Measured, settings: LoaderSettings) -> tuple[Measured, Block, float]:
    """The packs of epoch 1, and the seconds that they took."""
    started = time.perf_counter()
    policy = FailurePolicy("skip", max_total=None, max_consecutive=None, too_long="drop")
    usable = screen(measured, limits=settings, policy=policy)
    schedule = Schedule(usable, settings)
    schedule.fingerprint()
    block = schedule.block(1)
    return usable, block, time.perf_counter() - started


def check(measured: Measured, block: Block, settings: LoaderSettings) -> dict[str, Any]:
    """Refuse a wrong plan; say how full it is."""
    if not np.array_equal(np.sort(block.places), np.arange(len(measured))):
        raise SystemExit("planning is wrong: a row is missing or packed twice")
    costs = costs_of(measured, settings)[block.places]
    taken: NDArray[np.int64] = np.add.reduceat(costs, block.starts[:-1], axis=0)
    most = np.array(list(settings.given().values()))
    if (taken > most).any():
        raise SystemExit(f"planning is wrong: {taken.max(axis=0)} in a pack of at most {most}")
    shares = taken.mean(axis=0) / most
    named = zip(settings.given(), shares.tolist(), strict=True)
    return {
        "fill": round(fill_of(taken[:, 0].tolist(), CAPACITY), 5),
        "shares": {name: round(share, 4) for name, share in named},
        "packs": len(block),
        "dropped": len(measured.refused),
    }


def check_ranks(measured: Measured, block: Block) -> None:
    """Refuse a wrong split over two ranks."""
    first, second = over_ranks(block, measured, 2)
    places = [place for packs in (first, second) for pack in packs for place in pack]
    if len(first) != len(second) or sorted(places) != list(range(len(measured))):
        raise SystemExit("planning is wrong: two ranks do not have equal packs and all rows")


def measure(name: str, count: int) -> dict[str, Any]:
    """Plan once in this process, which should be a fresh one."""
    before = _peak_mb()
    started = time.perf_counter()
    measured = Measured.of(rows(count))
    held = time.perf_counter() - started
    settings = BUDGETS[name]
    usable, block, seconds = plan(measured, settings)
    memory = _peak_mb() - before
    found = check(usable, block, settings)
    check_ranks(usable, block)
    return {
        **found,
        "seconds": round(seconds, 2),
        "rows_seconds": round(held, 2),
        "memory_mb": round(memory),
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a million rows take to plan.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--only", choices=BUDGETS, help="plan one of them in this process")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.rows)))
        return
    found = {}
    for name in BUDGETS:
        command = [sys.executable, "-m", "benchmarks.planning", "--only", name]
        ran = subprocess.run(
            [*command, "--rows", str(arguments.rows)], stdout=subprocess.PIPE, text=True
        )
        if ran.returncode:
            raise SystemExit(ran.returncode)
        found[name] = json.loads(ran.stdout)
        if not arguments.json:
            facts = found[name]
            print(f"{name:10} {facts['seconds']:5.1f} s {facts['memory_mb']:5} MB", facts["shares"])
    by_fact = {fact: {name: found[name][fact] for name in found} for fact in found["one"]}
    print(json.dumps(by_fact | {"rows": arguments.rows, "capacity": CAPACITY}))


if __name__ == "__main__":
    main()
