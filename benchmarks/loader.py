"""Samples a second of picture-text rows, against webdataset and litdata, in one run.

    make peers
    python -m benchmarks.loader --json

Every side reads the same JPEG pictures from its own format on the local disk (ours and webdataset
from tars that each wrote itself, litdata from chunks), decodes them, resizes them to 224 x 224 and
gives batches of 32 uint8 tensors with their texts. Each side is a process of its own, started anew
in every round; the clock runs from its first request to its last batch, without imports. Before
anything is timed all tensors are compared: within 1/255 of webdataset's, or there is no number.
Rounds go over all sides in turn, and a ratio is the median over rounds of
seconds(peer) / seconds(ours).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_rows import write_rows
from benchmarks.timing import machine
from plait.datasets.records import open_records
from plait.datasets.records.shards.write import write_shards

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
SIDES = ("ours_0", "ours_2", "webdataset_0", "webdataset_2", "litdata_0", "litdata_2")


def command(side: str, folder: Path, *more: str) -> list[str]:
    """How a side is started; its name ends in the number of its workers."""
    name, workers = side.split("_")
    if name == "ours":
        head = [sys.executable, "-m", "benchmarks.loader_side", str(folder / "ours")]
    else:
        script = ROOT / "benchmarks" / "peers" / f"{name}_side.py"
        head = [str(PEERS), str(script), str(folder / name)]
    return [*head, "--workers", workers, *more]


def started(words: list[str]) -> dict[str, Any]:
    """The JSON object that a side prints last."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[-4:])} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def prepare(folder: Path, count: int) -> None:
    """The pictures in every side's own format."""
    pictures = folder / "pictures"
    pictures.mkdir()
    rows = write_rows(pictures, count)
    inputs = [
        {
            "key": f"{number:05d}",
            "file": str(pictures / row["images"][0]),
            "text": row["messages"][-1]["content"],
        }
        for number, row in enumerate(map(json.loads, rows.read_text().splitlines()))
    ]
    (folder / "inputs.json").write_text(json.dumps(inputs))
    write_shards(open_records(rows), folder / "ours", shard_rows=1000)
    for name in ("webdataset", "litdata"):
        script = str(ROOT / "benchmarks" / "peers" / f"{name}_side.py")
        words = [str(PEERS), script, str(folder / "inputs.json"), "--prepare", str(folder / name)]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)


def check(folder: Path, count: int) -> dict[str, float]:
    """The largest difference of each side's tensors from webdataset's, in 255ths.

    Raises:
        SystemExit: a sample is missing or comes twice, or a value differs by more than one.
    """
    held: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name in ("webdataset", "ours", "litdata"):
        dump = folder / f"{name}.npz"
        started(command(f"{name}_0", folder, "--dump", str(dump)))
        with np.load(dump) as found:
            held[name] = [found[key] for key in sorted(found.files, key=lambda k: int(k))]
        if len(held[name]) != count:
            raise SystemExit(f"{name} gave {len(held[name])} of {count} samples: no number")
        dump.unlink()
    worst = {}
    for name, tensors in held.items():
        pairs = zip(tensors, held["webdataset"], strict=True)
        worst[name] = float(max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in pairs))
        if worst[name] > 1:
            raise SystemExit(f"{name}'s tensors differ by {worst[name]} / 255: no number")
    return worst


def measure(folder: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every side's figures, round by round, the order turned each time."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        turn = number % len(SIDES)
        for side in (*SIDES[turn:], *SIDES[:turn]):
            found[side].append(started(command(side, folder)))
    return found


def ratio(found: dict[str, list[dict[str, Any]]], peer: str) -> float:
    """The median of seconds(peer) / seconds(ours), each side with its better worker count."""

    def better(name: str) -> list[float]:
        sides = [[run["seconds"] for run in found[f"{name}_{workers}"]] for workers in (0, 2)]
        return min(sides, key=statistics.median)

    pairs = zip(better(peer), better("ours"), strict=True)
    return round(statistics.median(theirs / ours for theirs, ours in pairs), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading pictures, against other loaders.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    if not PEERS.is_file():
        raise SystemExit("the peers have an environment of their own: run `make peers` first")
    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        folder = Path(name)
        prepare(folder, words.samples)
        worst = check(folder, words.samples)
        found = measure(folder, words.rounds)
    rates = {
        side: round(statistics.median(run["samples"] / run["seconds"] for run in runs), 1)
        for side, runs in found.items()
    }
    if not words.json:
        for side, rate in rates.items():
            print(f"{side:14} {rate:8.1f} samples/s")
    facts = {
        "ratio_webdataset": ratio(found, "webdataset"),
        "ratio_litdata": ratio(found, "litdata"),
        "samples_per_second": rates,
        "bottleneck": bottleneck(found),
        "largest_difference_255ths": worst,
        "samples": words.samples,
        "rounds": words.rounds,
        "peak_memory_mb": {side: runs[-1]["peak_memory_mb"] for side, runs in found.items()},
    }
    print(json.dumps(facts | {"machine": machine()}))


def bottleneck(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Where our own time goes: the shares of one thread's work, without and with loading."""
    stages = [run["stages"] for run in found["ours_0"]]
    shares = {
        name: round(statistics.median(run[name] / sum(run.values()) for run in stages), 3)
        for name in stages[0]
    }
    return {"is": max(shares, key=lambda name: shares[name]), "shares": shares}


if __name__ == "__main__":
    main()
