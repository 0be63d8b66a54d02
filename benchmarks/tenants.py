"""Eight runs on one language model: one mixed row against eight steps of their own.

    python -m benchmarks.tenants --json

Every run has an adapter of its own rank and brings a few short documents a step, as a tenant's
loop does while seven others wait. `mixed` sends all eight `forward_backward` at once, which the
engine packs into one row; `solo` sends them one after another, each waiting for the one before.
Both then step all eight optimisers. `ratio` is solo's time over mixed's.

`idle_share` is how much longer one run's step takes beside 64 runs that exist and do nothing.

First guarantee 10 is checked on the same model: the gradients of each run in the mixed row are
those of the run alone, and so are its weights after ten SGD steps. A ratio is only printed then.
"""

import argparse
import json
import statistics
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import alternate, apart, largest, machine, summary
from plait.modalities import Limits
from plait.stream import Document
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine
from plait.trainer.engine.runs import Run
from plait.trainer.optimiser import StepSettings
from plait.trainer.spec import LoraSpec, ModelSpec

RANKS = (8, 16, 8, 32, 16, 4, 8, 64)
TOKENS = 48
"""Of a run's step, in two documents: where a GPU, or a wide weight, would be half idle."""

IDLE = 64
ROUNDS = 7
GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-6
SGD = StepSettings(optimizer="sgd", learning_rate=1e-4)


def save_language(folder: Path) -> str:
    """A random Llama of SmolLM2-135M's widths with 4 of its 30 layers, and its tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{number}": number for number in range(4096)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return str(folder)


class Bench:
    """An engine with the eight runs, and their documents."""

    def __init__(self, language: str) -> None:
        self.engine = Engine()
        self.language = language
        self.runs = [self.created(rank, seed) for seed, rank in enumerate(RANKS)]
        draw = np.random.default_rng(0)
        self.documents = [
            [document(draw, TOKENS // 3), document(draw, TOKENS - TOKENS // 3)] for _ in RANKS
        ]

    def created(self, rank: int, seed: int) -> Run:
        spec = ModelSpec(language=self.language, lora=LoraSpec(rank=rank), train=("language",))
        name, built = self.engine.create_run(spec, seed, Limits())
        generator = torch.Generator().manual_seed(seed)
        for _, part, parameter in built.model.trainable():
            if "lora_B" in part:
                parameter.data.normal_(std=0.02, generator=generator)
        return self.engine.executor.runs[name]

    def send(self, number: int) -> Any:
        return self.engine.forward_backward(self.runs[number].name, self.documents[number])

    def step_all(self, settings: StepSettings) -> None:
        futures = [self.engine.submit(commands.OptimStep(run.name, settings)) for run in self.runs]
        for future in futures:
            future.result()

    def mixed(self, settings: StepSettings = SGD) -> None:
        with held(self.engine):
            futures = [self.send(number) for number in range(len(self.runs))]
        for future in futures:
            future.result()
        self.step_all(settings)

    def solo(self, settings: StepSettings = SGD) -> None:
        for number in range(len(self.runs)):
            self.send(number).result()
        self.step_all(settings)

    def one(self) -> None:
        self.send(0).result()
        self.engine.submit(commands.OptimStep(self.runs[0].name, SGD)).result()


class held:  # noqa: N801  (reads as a phrase)
    """While inside, the engine takes commands and begins none: they are all there at its end."""

    def __init__(self, engine: Engine) -> None:
        self._work = engine._work
        self._gate = threading.Event()

    def __enter__(self) -> None:
        turn = self._work._turn

        def waiting() -> None:
            self._gate.wait()
            self._work._turn = turn  # type: ignore[method-assign]
            turn()

        self._work._turn = waiting  # type: ignore[method-assign]

    def __exit__(self, *failure: object) -> None:
        self._gate.set()


def document(draw: np.random.Generator, length: int) -> Document:
    ids = draw.integers(2, 4096, length + 1)
    return Document(
        token_ids=ids[:-1],
        targets=ids[1:],
        weights=np.ones(length, dtype=np.float32),
        positions=np.arange(length),
    )


def gradients(run: Run) -> list[Tensor]:
    found = [gradient.clone() for gradient in run.gradients if gradient is not None]
    run.clear()
    return found


def check(bench: Bench, language: str) -> dict[str, float]:
    """Guarantee 10; the largest relative difference of a gradient, and of a weight.

    Raises:
        SystemExit: one is too large.
    """
    with held(bench.engine):
        futures = [bench.send(number) for number in range(len(RANKS))]
    for future in futures:
        future.result()
    together = [gradients(run) for run in bench.runs]
    found = []
    for number, run in enumerate(bench.runs):
        bench.send(number).result()
        found += [apart(a, b) for a, b in zip(together[number], gradients(run), strict=True)]
    differences = {"gradient": largest(found), "weight": _after_ten_steps(language)}
    for name, bound in (("gradient", GRADIENT_TOLERANCE), ("weight", WEIGHT_TOLERANCE)):
        if not differences[name] <= bound:
            raise SystemExit(f"a {name} differs by {differences[name]:.1e}: no number")
    return {name: float(f"{value:.1e}") for name, value in differences.items()}


def _after_ten_steps(language: str) -> float:
    """The largest difference of a weight between mixed and solo steps."""
    sides: list[Sequence[Tensor]] = []
    for way in (Bench.mixed, Bench.solo):
        bench = Bench(language)
        for _ in range(10):
            way(bench)
        sides.append([p.detach().clone() for run in bench.runs for *_, p in run.trainable])
        bench.engine.close()
    return largest(float((a - b).abs().max()) for a, b in zip(*sides, strict=True))


def idle_share(bench: Bench, rounds: int) -> dict[str, Any]:
    """One run's step beside the eight, and beside 64 more that do nothing; interleaved by
    creating and dropping them would measure that: the two sides are two engines."""
    crowded = Bench(bench.language)
    for number in range(IDLE):
        crowded.created(RANKS[number % len(RANKS)], 100 + number)
    crowded.one(), bench.one()
    few_each = [
        (lambda: [crowded.one() for _ in range(5)], lambda: [bench.one() for _ in range(5)])
    ]
    timed = alternate(few_each, rounds)
    crowded.engine.close()
    shares = [ours / peer - 1 for ours, peer in timed]
    return {"idle_share": round(statistics.median(shares), 4),
            "idle_rounds": [round(share, 4) for share in shares]}  # fmt: skip


def measure(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        language = save_language(Path(folder))
        bench = Bench(language)
        differences = check(bench, language)
        bench.mixed(), bench.solo()
        timed = alternate([(bench.mixed, bench.solo)], rounds)
        found = summary(timed) | idle_share(bench, rounds)
        bench.engine.close()
    return {
        "benchmark": "tenants",
        "ranks": RANKS,
        "tokens_a_run": TOKENS,
        "idle_runs": IDLE,
        "differences": differences,
        **found,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    print(json.dumps(found, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
