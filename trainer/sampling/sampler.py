"""Greedy and temperature sampling from a cached continuation, with the model's own logprobs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.stream import Document, ItemInputs, Layout
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.continuation import read_on


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How tokens are chosen."""

    max_tokens: int = 64
    """Tokens generated at most, the stop token included."""

    temperature: float = 1.0
    """0 takes the most probable token; otherwise logits are divided by it before drawing."""

    seed: int = 0
    """Each sequence draws from a generator of its own, made of the seed and of its number among
    the samples of its prompt, so that what is sampled beside it changes nothing."""

    stop: tuple[int, ...] | None = None
    """Token ids that end a sequence; None is the tokenizer's end token, () stops at nothing."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1; it is {self.max_tokens}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 or more; it is {self.temperature}")


@dataclass(slots=True)
class Generated:
    """Tokens with their logprobs under the raw distribution; `stopped` by a stop token."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


def stop_tokens(tokenizer: Any, settings: SamplerSettings) -> frozenset[int]:
    if settings.stop is not None:
        return frozenset(settings.stop)
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


@torch.inference_mode()
def generate(
    model: PlaitModel,
    tokenizer: Any,
    layout: Layout,
    prompts: Sequence[Document],
    inputs: Sequence[Sequence[ItemInputs]],
    settings: SamplerSettings,
    samples: int = 1,
) -> list[list[Generated]]:
    """`samples` continuations of each prompt.

    Logprobs are of the raw distribution (temperature 1, nothing banned), as the trainer computes
    them. Media ids, and ids that the tokenizer does not have, are never generated.
    """
    model.eval()
    copies = [samples] * len(prompts)
    continuation = read_on(model, layout, prompts, inputs, copies, settings.max_tokens)
    rows = [Generated() for _ in range(sum(copies))]
    draws = [
        torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        for _ in prompts
        for number in range(samples)
    ]
    stops = stop_tokens(tokenizer, settings)
    banned = _banned(model, tokenizer, layout)
    active, hidden = list(range(len(rows))), continuation.last_hidden()
    while active:
        logits = model.logits(hidden)
        raw = logits.log_softmax(-1)
        chosen = _choose(logits.masked_fill(banned, -torch.inf), settings.temperature,
                         [draws[i] for i in active])  # fmt: skip
        for place, (row, token) in enumerate(zip(active, chosen, strict=True)):
            rows[row].tokens.append(token)
            rows[row].logprobs.append(float(raw[place, token]))
            rows[row].stopped = token in stops
        going = [
            i for i in active if not rows[i].stopped and len(rows[i].tokens) < settings.max_tokens
        ]
        if going:
            hidden = continuation.push([[rows[i].tokens[-1]] for i in going], going)
        active = going
    grouped = iter(rows)
    return [[next(grouped) for _ in range(samples)] for _ in prompts]


def _banned(model: PlaitModel, tokenizer: Any, layout: Layout) -> Tensor:
    """(V,) bool: media ids, and rows of a padded vocabulary that no token has."""
    size = model.output_weight.shape[0]
    banned = torch.arange(size) >= len(tokenizer)
    for token in layout.banned_ids:
        banned[token] = True
    return banned.to(model.device)


def _choose(logits: Tensor, temperature: float, draws: list[torch.Generator]) -> list[int]:
    if temperature == 0:
        return [int(token) for token in logits.argmax(-1)]
    probabilities = (logits / temperature).softmax(-1).cpu()
    return [
        int(torch.multinomial(row, 1, generator=draw))
        for row, draw in zip(probabilities, draws, strict=True)
    ]
