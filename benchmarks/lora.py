"""One training step of eight adapters over one base: one packed row against passes of their own.

    python -m benchmarks.lora --json

Every adapter brings documents of 256 tokens in all, as long as chat turns and captions are. Ours
packs all of them into one row, which the base reads once. The peers take a pass per adapter with
peft's own forward, that adapter alone active:

- `padded`, `single`: transformers and peft as they are, the adapter's documents in one batch padded
  to the longest, or one document after another. `ratio` is against the faster of these.
- `packed`: the adapter's documents in one row through our attention. `ratio_of_grouping` is
  against this: what is left when packing documents is no difference.

`even` is the same with one document of 256 tokens an adapter, where no side pads.

Weights, dtype and loss (summed over the tokens of every document) are the same on all sides. A
ratio is only printed when losses and the gradient of every adapter tensor agree.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import apart, largest, machine, seconds_of
from plait.encoders import attention
from plait.kernels.interval_attention import Intervals
from plait.trainer.grouped_lora import GroupedLora

ROUNDS = 5
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Relative difference allowed to a loss, and to the norm of a tensor's gradient."""


Losses = dict[str, Tensor]
"""The summed loss of each adapter's documents."""


@dataclass(frozen=True)
class Load:
    """A random Llama, its adapters, and the lengths of the documents that each adapter brings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    ranks: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def positions(self) -> int:
        return sum(map(sum, self.lengths))

    @property
    def fill(self) -> float:
        """The part of the padded batches that is tokens."""
        return self.positions / sum(max(mine) * len(mine) for mine in self.lengths)

    def about(self) -> dict[str, Any]:
        return {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "layers": self.layers,
            "heads": [self.heads, self.key_heads],
            "vocabulary": self.vocabulary,
            "ranks": self.ranks,
            "dtype": str(self.dtype).removeprefix("torch."),
            "documents": [len(mine) for mine in self.lengths],
            "positions": self.positions,
            "padded_fill": round(self.fill, 3),
        }


def lengths_of(adapters: int, tokens: int, mean: float) -> tuple[tuple[int, ...], ...]:
    """Log-normal lengths (sigma 0.6) about `mean`, `tokens` in all for each adapter."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(adapters):
        mine: list[int] = []
        while sum(mine) < tokens:
            length = round(float(draw.lognormal(np.log(mean) - 0.18, 0.6)))
            mine.append(min(max(length, 4), tokens - sum(mine)))
        found.append(tuple(mine))
    return tuple(found)


def cpu_load(lengths: tuple[tuple[int, ...], ...]) -> Load:
    """A fifteenth of SmolLM2-135M: 2 of its 30 layers, and as much of its vocabulary."""
    return Load(
        hidden=576, intermediate=1536, layers=2, heads=9, key_heads=3, vocabulary=3_277,
        ranks=(8, 16, 8, 32, 16, 8, 8, 16), lengths=lengths,
    )  # fmt: skip


def gpu_load() -> Load:
    """Two layers of an 8B model's width in bf16, 1024 tokens an adapter."""
    return Load(
        hidden=4096, intermediate=14_336, layers=2, heads=32, key_heads=8, vocabulary=8_192,
        ranks=(8, 16, 64, 32, 16, 8, 64, 16), lengths=lengths_of(8, 1024, 160),
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip


class Bench:
    """The model of a load, its documents, and a step of every side."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.names = [f"run{number}" for number in range(len(load.ranks))]
        self.ours, self.theirs = self._model(attention.NAME), self._model("sdpa")
        draw = torch.Generator().manual_seed(1)
        self.documents = [
            [torch.randint(load.vocabulary, (n,), generator=draw).to(load.device) for n in mine]
            for mine in load.lengths
        ]
        self.adapters = GroupedLora(self.ours)
        self.row = [(n, ids) for n, mine in zip(self.names, self.documents, strict=True)
                    for ids in mine]  # fmt: skip

    def _model(self, implementation: str) -> Any:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import LlamaConfig, LlamaForCausalLM

        attention.register()
        load = self.load
        config = LlamaConfig(
            vocab_size=load.vocabulary, hidden_size=load.hidden,
            intermediate_size=load.intermediate, num_hidden_layers=load.layers,
            num_attention_heads=load.heads, num_key_value_heads=load.key_heads,
            tie_word_embeddings=True, attn_implementation=implementation,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(load.dtype).requires_grad_(False)
            for name, rank in zip(self.names, load.ranks, strict=True):
                lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
                inject_adapter_in_model(lora, model, adapter_name=name)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
                    parameter.requires_grad_(True)
                    if "lora_B" in name:  # which peft makes zero: no gradient would reach A
                        parameter.data.normal_(std=0.02)
        return model.to(load.device)

    def _activate(self, model: Any, name: str) -> None:
        """Make one adapter active; cheaper than peft's own switch, in the peers' favour."""
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module._active_adapter = [name]

    def together(self) -> Losses:
        """Ours: every document in one row."""
        names = [name for name, _ in self.row]
        with self.adapters.on(names, _bounds([ids for _, ids in self.row])):
            losses = _row_losses(self.ours, [ids for _, ids in self.row])
            _backward(losses)
        return _by_name(names, losses)

    def padded(self) -> Losses:
        """A padded batch for each adapter."""
        found: Losses = {}
        for name, mine in zip(self.names, self.documents, strict=True):
            self._activate(self.theirs, name)
            ids = nn.utils.rnn.pad_sequence(mine, batch_first=True)
            lengths = torch.tensor([len(document) for document in mine], device=ids.device)
            mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            logits = self.theirs(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
            loss = _nll(logits[:, :-1].flatten(0, 1), targets.flatten())
            _backward([loss])
            found[name] = loss.detach()
        return found

    def single(self) -> Losses:
        """Every document in a pass of its own, without a mask."""
        found: Losses = {}
        for name, mine in zip(self.names, self.documents, strict=True):
            self._activate(self.theirs, name)
            losses = []
            for ids in mine:
                logits = self.theirs(input_ids=ids[None], use_cache=False).logits[0]
                losses.append(_nll(logits[:-1], ids[1:]))
                _backward(losses[-1:])
            found |= _by_name([name] * len(losses), losses)
        return found

    def packed(self) -> Losses:
        """A row for each adapter, through our attention and peft's own forward."""
        found: Losses = {}
        for name, mine in zip(self.names, self.documents, strict=True):
            self._activate(self.ours, name)
            losses = _row_losses(self.ours, mine)
            _backward(losses)
            found |= _by_name([name] * len(losses), losses)
        return found

    def sides(self) -> dict[str, Callable[[], Losses]]:
        return {
            "ours": self.together,
            "padded": self.padded,
            "single": self.single,
            "packed": self.packed,
        }

    def model_of(self, side: str) -> Any:
        return self.ours if side in ("ours", "packed") else self.theirs

    def clear(self) -> None:
        for model in (self.ours, self.theirs):
            model.zero_grad(set_to_none=True)


def _bounds(documents: list[Tensor]) -> list[tuple[int, int]]:
    stops = np.cumsum([len(ids) for ids in documents]).tolist()
    return [(stop - len(ids), stop) for stop, ids in zip(stops, documents, strict=True)]


def _row_losses(model: Any, documents: list[Tensor]) -> list[Tensor]:
    """Each document's summed loss, all of them in one row."""
    bounds = _bounds(documents)
    ids = torch.cat(documents)
    lo = torch.cat([torch.full((stop - start,), start) for start, stop in bounds])
    at = torch.arange(len(ids))
    logits = model(
        input_ids=ids[None],
        position_ids=(at - lo)[None].to(ids.device),
        visible=Intervals(lo, at + 1).to(ids.device),
        use_cache=False,
    ).logits[0]
    targets = ids.roll(-1)
    targets[[stop - 1 for _, stop in bounds]] = -100
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return [losses[start:stop].sum() for start, stop in bounds]


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def _backward(losses: list[Tensor]) -> None:
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]


def _by_name(names: list[str], losses: list[Tensor]) -> Losses:
    found: Losses = {}
    for name, loss in zip(names, losses, strict=True):
        found[name] = found[name] + loss.detach() if name in found else loss.detach()
    return found


def _finished(step: Callable[[], Losses], device: str) -> None:
    """Run a step to its end: no side waits for the GPU before."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()


def differences(bench: Bench) -> dict[str, dict[str, float]]:
    """For every peer, the largest relative difference of a loss and of a tensor's gradient."""
    losses: dict[str, Losses] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for side, step in bench.sides().items():
        bench.clear()
        losses[side] = step()
        parameters = bench.model_of(side).named_parameters()
        gradients[side] = {n: p.grad.clone() for n, p in parameters if p.grad is not None}
    found = {}
    for peer in ("padded", "single", "packed"):
        if gradients[peer].keys() != gradients["ours"].keys():
            found[peer] = {"loss": torch.inf, "gradient": torch.inf}
            continue
        off = [apart(gradients["ours"][n], value) for n, value in gradients[peer].items()]
        away = [apart(losses["ours"][n], value) for n, value in losses[peer].items()]
        found[peer] = {"loss": largest(away), "gradient": largest(off)}
    return found


def measure(load: Load, rounds: int) -> dict[str, Any]:
    """Check one load, time it, and say what was measured.

    Raises:
        SystemExit: the sides are not the same step.
    """
    bench = Bench(load)
    found = differences(bench)  # also what warms every side up
    allowed = TOLERANCE[load.dtype]
    for peer, values in found.items():
        for name, value in values.items():
            if not value <= allowed:
                raise SystemExit(
                    f"the sides must take the same step: {name} of {peer} differs by {value:.2e}, "
                    f"allowed {allowed:.0e}; no number is given"
                )
    taken = _alternate(bench, rounds)
    middle = {side: statistics.median(seconds) for side, seconds in taken.items()}
    peer = min(("padded", "single"), key=lambda side: middle[side])
    ratios = {
        side: [theirs / ours for theirs, ours in zip(taken[side], taken["ours"], strict=True)]
        for side in ("padded", "single", "packed")
    }
    return {
        "ratio": round(statistics.median(ratios[peer]), 3),
        "peer": peer,
        "ratio_of_grouping": round(statistics.median(ratios["packed"]), 3),
        "rounds": {side: [round(r, 3) for r in values] for side, values in ratios.items()},
        "seconds": {side: round(value, 4) for side, value in middle.items()},
        "differences": {
            side: {name: float(f"{value:.2g}") for name, value in values.items()}
            for side, values in found.items()
        },
        **load.about(),
    }


def _alternate(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round; who goes first changes from round to round."""
    sides = list(bench.sides().items())
    taken: dict[str, list[float]] = {side: [] for side, _ in sides}
    for number in range(rounds):
        turn = number % len(sides)
        for side, step in sides[turn:] + sides[:turn]:
            bench.clear()
            taken[side].append(seconds_of(lambda step=step: _finished(step, bench.load.device)))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapters in one row, against a pass for each.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed steps of every side")
    parser.add_argument("--threads", type=int, default=2, help="threads of a CPU step")
    parser.add_argument("--only", choices=("cpu", "gpu"), help="leave the other machine out")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    found: dict[str, Any] = {}
    if words.only != "gpu":
        found = measure(cpu_load(lengths_of(8, 256, 40)), words.rounds)
        found["even"] = measure(cpu_load(((256,),) * 8), words.rounds)
        if not words.json:
            print(f"{found['ratio']:.2f} times as fast as a pass per adapter ({found['peer']})")
            print(f"{found['ratio_of_grouping']:.2f} times as fast as a packed pass per adapter")
            print(f"{found['even']['ratio']:.2f} times as fast where no side has to pad")
    if words.only != "cpu" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for float32 factors, on every side
        found["gpu"] = measure(gpu_load(), words.rounds) | {"device": torch.cuda.get_device_name()}
    print(json.dumps(found | machine()))


if __name__ == "__main__":
    main()
