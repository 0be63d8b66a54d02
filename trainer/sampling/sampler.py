"""Greedy and random sampling from a cached continuation, with the model's own logprobs.

Shape letters: B sequences, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plait.ranges import SAMPLING, check_number, check_numbers
from plait.stream import Document, ItemInputs, Layout
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.continuation import read_on
from plait.trainer.sampling.stopping import Stops

MOST_TOKENS = 1024
"""Tokens of a sequence whose length nobody bounds, in a model with room for more."""


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How tokens are chosen."""

    max_tokens: int | None = 64
    """Tokens generated at most, the stop token included; None is what the model's context has room
    for after the longest prompt, and never over `MOST_TOKENS`."""

    temperature: float = 1.0
    """0 takes the most probable token; otherwise logits are divided by it before drawing."""

    top_k: int = -1
    """Draw from this many of the most probable tokens; -1 is no limit."""

    top_p: float = 1.0
    """Draw from the fewest tokens that hold this share of what `top_k` left; 1 is no limit."""

    seed: int = 0
    """Each sequence draws from a generator of its own, made of the seed and of its number among
    the samples of its prompt, so that what is sampled beside it changes nothing."""

    stop: tuple[int | str, ...] | None = None
    """Token ids or texts that end a sequence; None is the tokenizer's end token, () stops at
    nothing. Ids take the end token's place, texts come beside it."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_number("max_tokens", self.max_tokens, "[1, inf)", whole=True)
        if self.top_k != -1:
            check_number("top_k, where it is not -1,", self.top_k, "[1, inf)", whole=True)
        check_number("seed", self.seed, "[0, inf)", whole=True)
        check_numbers(self, SAMPLING)


@dataclass(slots=True)
class Generated:
    """Tokens with their logprobs under the raw distribution; `stopped` by one of its ends."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


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
    room = _room(model, prompts, settings)
    continuation = read_on(model, layout, prompts, inputs, copies, room)
    rows = [Generated() for _ in range(sum(copies))]
    draws = [
        torch.Generator().manual_seed((settings.seed * 1_000_003 + number) % 2**63)
        for _ in prompts
        for number in range(samples)
    ]
    stops = Stops(tokenizer, settings.stop)
    banned = _banned(model, tokenizer, layout)
    active, hidden = list(range(len(rows))), continuation.last_hidden()
    while active:
        logits = model.logits(hidden)
        raw = logits.log_softmax(-1)
        allowed = logits.masked_fill(banned, -torch.inf)
        chosen = _choose(allowed, settings, [draws[i] for i in active])
        for place, (row, token) in enumerate(zip(active, chosen, strict=True)):
            rows[row].tokens.append(token)
            rows[row].logprobs.append(float(raw[place, token]))
            rows[row].stopped = stops.reached(rows[row].tokens)
        going = [i for i in active if not rows[i].stopped and len(rows[i].tokens) < room]
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


def _room(model: PlaitModel, prompts: Sequence[Document], settings: SamplerSettings) -> int:
    if settings.max_tokens is not None:
        return settings.max_tokens
    config = model.language.config.get_text_config()
    context: int | None = getattr(config, "max_position_embeddings", None)
    if context is None:
        return MOST_TOKENS
    return max(1, min(MOST_TOKENS, context - max(prompt.length for prompt in prompts)))


def _choose(
    logits: Tensor, settings: SamplerSettings, draws: Sequence[torch.Generator]
) -> list[int]:
    if settings.temperature == 0:
        return [int(token) for token in logits.argmax(-1)]
    probabilities = (logits / settings.temperature).softmax(-1).cpu()
    return [
        int(torch.multinomial(row, 1, generator=draw))
        for row, draw in zip(_likeliest(probabilities, settings), draws, strict=True)
    ]


def _likeliest(probabilities: Tensor, settings: SamplerSettings) -> Tensor:
    """(B, V): what `top_k` and then `top_p` leave, not scaled to 1 again; the rest is 0."""
    if settings.top_k == -1 and settings.top_p == 1:
        return probabilities
    values, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if settings.top_k != -1:
        values[:, settings.top_k :] = 0
    before = values.cumsum(-1) - values
    values[before >= settings.top_p * values.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(probabilities).scatter_(-1, order, values)
