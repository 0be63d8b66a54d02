"""From logits to tokens, for many sequences at once, each with its own settings and draws.

Shape letters: B sequences, V tokens of the vocabulary, K likeliest of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from plait.trainer.sampling.settings import SamplerSettings

_FIRST_LOOK = 1024
"""Likeliest tokens that are sorted before the whole vocabulary is: nearly always enough."""

_COLDEST = 1e-30
"""A temperature that a float32 holds; 0 never divides."""

_HOTTEST = torch.finfo(torch.float32).max
"""By infinity nothing that is excluded could be divided."""


class Chosen(NamedTuple):
    """A token for each sequence, and its logprob under the raw distribution."""

    tokens: list[int]
    logprobs: list[float]


class Draws:
    """Numbers in [0, 1) for one sequence: its own, whatever is sampled beside it.

    Args:
        number: The sequence's among the samples of its prompt.
    """

    def __init__(self, seed: int, number: int) -> None:
        key = np.array([seed % 2**64, number], dtype=np.uint64)  # a list may become floats
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def next(self) -> float:
        return float(self._generator.random())


class Turn:
    """One sequence's next number: the same however often its token is chosen."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._drawn: float | None = None

    def next(self) -> float:
        if self._drawn is None:
            self._drawn = self._draws.next()
        return self._drawn


def choose(
    logits: Tensor,
    settings: Sequence[SamplerSettings],
    draws: Sequence[Draws | Turn],
    banned: Tensor,
) -> Chosen:
    """logits (B, V) float32 -> a token for each row.

    Args:
        banned: Token ids (N,) that are never chosen. Logprobs count them all the same.
    """
    normaliser = logits.logsumexp(-1)
    allowed = logits.index_fill(-1, banned, -torch.inf)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    drawn = [i for i, s in enumerate(settings) if s.temperature > 0]
    greedy = [i for i, s in enumerate(settings) if s.temperature == 0]
    if greedy:
        tokens[greedy] = _rows(allowed, greedy).argmax(-1)
    for few in (False, True):
        rows = [i for i in drawn if _cut(settings[i], logits.shape[1]) == few]
        if rows:
            uniform = [draws[i].next() for i in rows]
            tokens[rows] = _draw(
                _rows(allowed, rows), [settings[i] for i in rows], uniform, sort=few
            )
    logprobs = allowed.gather(-1, tokens[:, None])[:, 0] - normaliser
    return Chosen(tokens.tolist(), logprobs.tolist())


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    return values if len(rows) == len(values) else values[rows]


def _cut(settings: SamplerSettings, vocabulary: int) -> bool:
    """Whether less than the whole vocabulary is drawn from, by rank."""
    return 0 < settings.top_k < vocabulary or settings.top_p < 1


def _draw(
    logits: Tensor, settings: Sequence[SamplerSettings], uniform: Sequence[float], sort: bool
) -> Tensor:
    """(B,) tokens where the distribution function passes `uniform`."""
    device = logits.device
    temperature = torch.tensor([s.temperature for s in settings], device=device)
    # Below the highest: divided by next to nothing, it stays finite.
    lower = logits - logits.amax(-1, keepdim=True)
    probabilities = lower.div(temperature.clamp(_COLDEST, _HOTTEST)[:, None]).softmax(-1)
    order: Tensor | None = None
    if sort:
        probabilities, order = _likeliest(probabilities, settings)
    least = torch.tensor([s.min_p for s in settings], device=device)
    if least.any():
        highest = probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= least[:, None] * highest, 0)
    below = probabilities.double().cumsum(-1)
    target = torch.tensor(uniform, dtype=torch.float64, device=device) * below[:, -1]
    # The first whose sum is greater has a probability of its own; rounding may pass the last.
    place = torch.searchsorted(below, target[:, None], right=True)[:, 0]
    last = (below < below[:, -1:]).sum(-1)
    place = torch.minimum(place, last)
    return place if order is None else order.gather(-1, place[:, None])[:, 0]


def _likeliest(probabilities: Tensor, settings: Sequence[SamplerSettings]) -> tuple[Tensor, Tensor]:
    """(B, K) probabilities in falling order, 0 where `top_k` and then `top_p` cut, and tokens."""
    device, vocabulary = probabilities.device, probabilities.shape[1]
    ranks = torch.tensor([vocabulary if s.top_k == -1 else s.top_k for s in settings],
                         device=device)  # fmt: skip
    shares = torch.tensor([s.top_p for s in settings], device=device, dtype=torch.float64)
    look = min(_FIRST_LOOK, vocabulary)
    values, order = probabilities.topk(look)
    # A share of what `top_k` leaves is known once all of that is sorted.
    enough = (ranks <= look) | ((ranks >= vocabulary) & (values.double().sum(-1) > shares))
    if not bool(enough.all()):
        # The other rows keep their order, in which equally likely tokens may stand differently.
        rest = ~enough
        values, order = (nn.functional.pad(t, (0, vocabulary - look)) for t in (values, order))
        values[rest], order[rest] = probabilities[rest].sort(dim=-1, descending=True)
    rank = torch.arange(values.shape[1], device=device)
    values = values.masked_fill(rank >= ranks[:, None], 0)
    exact = values.double()
    sums = exact.cumsum(-1)
    whole = torch.where(ranks >= vocabulary, 1.0, sums[:, -1])
    return values.masked_fill(sums - exact >= (shares * whole)[:, None], 0), order
