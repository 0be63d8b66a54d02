"""Losses over a large vocabulary: ours against plain torch and liger-kernel, in one run.

    make peers
    python -m benchmarks.logprobs --json

Two tasks over a frozen output layer, forward and backward: fine-tuning (`weighted_nll` against
cross entropy on all logits) and reinforcement learning (`token_logprobs` and a clipped ratio
against liger-kernel's fused GRPO loss, compiled and not, in a process of its own environment).
Losses and gradients are compared before anything is timed, or there is no number. Rounds go over
all sides in turn, and a ratio is the median over rounds of seconds(peer) / seconds(ours).
Memory is the peak resident size of a fresh process above what its inputs take. With a GPU the same
losses run there too, in bf16 and large, under "gpu".
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.logprobs_sides import STEPS, Batch, Size, make, nll, plain_nll, rl
from benchmarks.timing import apart, largest, machine, seconds_of

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
GPU_SIZE = Size(positions=8192, hidden=4096, vocabulary=131_072)
LIGER_CHUNK = 2
"""Sequences of its chunk. On a quiet machine 1 (its default), 2 and 8 differ by less than the
noise; with a busy neighbour 1 is slower."""

Clock = Callable[[], float]
"""Runs one step and says how many seconds it took."""


class Liger:
    """The peer's process, asked for one step at a time."""

    def __init__(self, batch: Batch, folder: Path, threads: int) -> None:
        self._folder = folder
        torch.save(by_sequence(batch), folder / "inputs.pt")
        script = ROOT / "benchmarks" / "peers" / "liger.py"
        words = [str(PEERS), str(script), str(folder / "inputs.pt"), "--threads", str(threads)]
        words += ["--chunk-size", str(LIGER_CHUNK)]
        self._process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line; see `peers/liger.py`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        said = self._process.stdout.readline()
        if not said:
            raise SystemExit(f"liger-kernel's process ended at {line!r}; its error stands above")
        found: dict[str, Any] = json.loads(said)
        return found

    def result(self, side: str) -> tuple[Tensor, Tensor]:
        """Loss and dL/d hidden of a side; compiles it where it is to be compiled."""
        file = self._folder / f"{side}.pt"
        self.ask(f"check {side} {file}")
        found = torch.load(file, weights_only=True)
        return found["loss"], found["gradient"]

    def clock(self, side: str) -> Clock:
        return lambda: float(self.ask(f"step {side}")["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def by_sequence(batch: Batch) -> dict[str, Tensor]:
    """A batch as liger-kernel takes it: (sequences, positions of one, ...)."""
    shape = (batch.size.sequences, -1)
    return {
        "hidden": batch.hidden.reshape(*shape, batch.size.hidden),
        "weight": batch.weight,
        "targets": batch.targets.reshape(shape),
        "old_logprobs": batch.old_logprobs.reshape(shape),
        "advantages": batch.advantages,
    }


def difference(ours: tuple[Tensor, Tensor], peer: tuple[Tensor, Tensor]) -> float:
    """The larger relative difference: of the losses, or of the gradients' norms."""
    return largest(
        apart(have.flatten(), want.flatten()) for have, want in zip(ours, peer, strict=True)
    )


def checked(pairs: dict[str, tuple[Any, Any]], limit: float) -> dict[str, float]:
    """The differences of named (ours, peer) results.

    Raises:
        SystemExit: one is larger than `limit`, or not a number.
    """
    found = {name: difference(*pair) for name, pair in pairs.items()}
    for name, value in found.items():
        if not value <= limit:
            raise SystemExit(f"ours and {name} differ by {value:.2e}: no number")
    return found


def in_turn(sides: dict[str, Clock], rounds: int) -> dict[str, list[float]]:
    """Every side's seconds, round by round; who goes first turns."""
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            found[name].append(sides[name]())
    return found


def ratio(found: dict[str, list[float]], peer: str, ours: str) -> float:
    pairs = zip(found[peer], found[ours], strict=True)
    return round(statistics.median(theirs / mine for theirs, mine in pairs), 3)


def medians(found: dict[str, list[float]], digits: int) -> dict[str, float]:
    return {name: round(statistics.median(times), digits) for name, times in found.items()}


def extra_memory(step: str, threads: int) -> float:
    """Megabytes that a step of a fresh process takes above its inputs."""
    words = [sys.executable, "-m", "benchmarks.logprobs_sides", step, "--threads", str(threads)]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["extra_kb"]) / 1024


def on_cpu(rounds: int, threads: int) -> dict[str, Any]:
    """Both tasks at the CPU's size."""
    if not PEERS.is_file():
        raise SystemExit("liger-kernel has an environment of its own: run `make peers` first")
    memory = {step: round(extra_memory(step, threads), 1) for step in STEPS}
    batch = make(Size())
    with tempfile.TemporaryDirectory(prefix="logprobs-") as name:
        liger = Liger(batch, Path(name), threads)
        try:
            ours = rl(batch)
            differences = checked(
                {
                    "plain torch": (nll(batch), plain_nll(batch)),
                    "liger-kernel": (ours, liger.result("compiled")),
                    "liger-kernel uncompiled": (ours, liger.result("plain")),
                },
                1e-4,
            )
            sides = {
                "nll": lambda: seconds_of(lambda: nll(batch)),
                "plain_nll": lambda: seconds_of(lambda: plain_nll(batch)),
                "rl": lambda: seconds_of(lambda: rl(batch)),
                "liger": liger.clock("compiled"),
                "liger_uncompiled": liger.clock("plain"),
            }
            in_turn(sides, 1)  # warm; liger-kernel compiled in the check
            found = in_turn(sides, rounds)
            peer = liger.ask("facts")
        finally:
            liger.close()
    return {
        "ratio_naive": ratio(found, "plain_nll", "nll"),
        "memory_share": round(memory["nll"] / memory["plain_nll"], 3),
        "ratio_liger": ratio(found, "liger", "rl"),
        "ratio_liger_uncompiled": ratio(found, "liger_uncompiled", "rl"),
        "seconds": medians(found, 3),
        "extra_memory_mb": memory,
        "largest_difference": differences,
        "size": vars(batch.size),
        "peer": peer,
    }


def on_gpu(rounds: int) -> dict[str, Any]:
    """The same losses in bf16; liger-kernel's where this Python has it, its fused cross entropy
    (`liger_nll`) too. Float32 products may use TF32, for all sides alike.
    """
    torch.set_float32_matmul_precision("high")
    batch = make(GPU_SIZE, "cuda", torch.bfloat16)
    steps: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "nll": lambda: nll(batch),
        "plain_nll": lambda: plain_nll(batch),
        "rl": lambda: rl(batch),
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        from benchmarks.peers import liger

        steps["liger"] = liger.Grpo(by_sequence(batch), True, LIGER_CHUNK).step
        steps["liger_nll"] = liger.Nll(batch.hidden, batch.weight, batch.targets).step
    memory, results = {}, {}
    for name, step in steps.items():
        step()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results[name] = step()
        memory[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    ours_of = {"plain_nll": "nll", "liger_nll": "nll", "liger": "rl"}
    pairs = {p: (results[mine], results[p]) for p, mine in ours_of.items() if p in results}
    # The peers round their logits to bf16.
    differences = checked(pairs, 2e-2)

    def clock(step: Callable[[], object]) -> Clock:
        def whole() -> None:
            step()
            torch.cuda.synchronize()

        return lambda: seconds_of(whole)

    found = in_turn({name: clock(step) for name, step in steps.items()}, max(10, rounds))
    return {
        "device": torch.cuda.get_device_name(),
        "ratios": {p: ratio(found, p, mine) for p, mine in ours_of.items() if p in found},
        "memory_share": {p: round(memory[ours_of[p]] / memory[p], 3) for p in pairs},
        "seconds": medians(found, 5),
        "extra_memory_mb": memory,
        "largest_difference": differences,
        "size": vars(batch.size),
        "dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses over a large vocabulary.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("cpu", "gpu"), help="one machine of the two")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    facts: dict[str, Any] = {"rounds": words.rounds}
    if words.only != "gpu":
        facts |= on_cpu(words.rounds, words.threads)
    if words.only != "cpu" and torch.cuda.is_available():
        facts["gpu"] = on_gpu(words.rounds)
    if not words.json:
        for place in (facts, facts.get("gpu", {})):
            for name, seconds in place.get("seconds", {}).items():
                print(f"{name:18} {seconds:9.4f} s")
    print(json.dumps(facts | {"machine": machine()}))


if __name__ == "__main__":
    main()
