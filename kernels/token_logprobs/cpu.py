"""The output layer in plain torch operators: for CPUs, and any machine without Triton.

Everything is computed in float32. Weights of 16 bits are widened a block of the vocabulary at a
time: processors without 16-bit matrix units multiply float32 five times as fast, and the logits
are then not rounded to 16 bits either.

Shape letters: C positions of a chunk, H hidden size, V vocabulary, K targets of a position.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from plait.kernels.token_logprobs.head import Shaping, Slopes, Statistics

CHUNK_BYTES = 64 << 20
"""Float32 logits held at once. Products of few rows read the weight too often: 512 rows of 32,768
tokens come within 10% of the whole product's speed, 128 rows take 1.4 times as long."""

MIN_ROWS = 256
"""Rows of a chunk that are held whatever the vocabulary, for the same reason."""

BLOCK = 2048
"""Rows of a 16-bit weight that are widened at once: 8 MB at H = 1024."""

GROUP_BYTES = 4 << 20
"""Logits that pass through all operators before the next ones do, so that a cache holds them."""

_LOWEST = -1e30
"""Stands for -inf where it is multiplied: by 0 it is 0, and by any slope still finite."""


class Head:
    """See `head.Head`. Logits are held shaped: capped and divided by the temperature."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shaping: Shaping
    ) -> None:
        self._weight = weight
        self._bias = None if bias is None else bias.float()
        self._shaping = shaping
        vocabulary = len(weight)
        wished = max(MIN_ROWS, CHUNK_BYTES // (4 * vocabulary))
        self.rows = max(1, min(wished, len(hidden)))
        self._buffer = hidden.new_empty(self.rows, vocabulary, dtype=torch.float32)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._buffer[: len(hidden)]
        self._multiply(hidden, logits)
        softcap, temperature = self._shaping.softcap, self._shaping.temperature
        for rows in _groups(logits):
            z = logits[rows]
            if self._bias is not None:
                z += self._bias
            if softcap is not None:
                z.div_(softcap).tanh_().mul_(softcap)
            if temperature != 1:
                z /= temperature
        return logits

    def _multiply(self, hidden: Tensor, out: Tensor) -> None:
        """Write the raw logits (C, V)."""
        hidden = hidden.float()
        for part, block in self._blocks():
            torch.mm(hidden, block.T, out=out[:, part])

    def statistics(self, logits: Tensor, ids: Tensor, entropy: bool) -> Statistics:
        lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        spread = torch.empty_like(lse) if entropy else None
        for rows in _groups(logits):
            highest = logits[rows].amax(-1, keepdim=True)
            below = logits[rows] - highest
            if spread is None:
                lse[rows] = highest[:, 0] + below.exp_().sum(-1).log()
                continue
            # A banned token has logit -inf and probability 0: it adds nothing, not 0 * inf.
            finite = below.clamp(min=_LOWEST)
            total = below.exp_().sum(-1)
            lse[rows] = highest[:, 0] + total.log()
            spread[rows] = total.log() - finite.mul_(below).sum(-1) / total
        return Statistics(lse, logits.gather(-1, ids), spread)

    def gradient(
        self, logits: Tensor, ids: Tensor, slopes: Slopes, lse: Tensor, entropy: Tensor | None
    ) -> Tensor:
        by_logprobs = slopes.logprobs / self._shaping.temperature
        at_ids = by_logprobs * self._slope_of_cap(logits.gather(-1, ids))
        for rows in _groups(logits):
            z = logits[rows]
            factor = -by_logprobs[rows].sum(-1, keepdim=True)
            if slopes.entropy is not None:
                assert entropy is not None
                surplus = (z - (lse - entropy)[rows, None]).clamp_(min=_LOWEST)
                turn = slopes.entropy[rows, None] / self._shaping.temperature
                factor = surplus.mul_(-turn).add_(factor)
            if self._shaping.softcap is not None:
                factor = self._slope_of_cap(z) * factor
            z.sub_(lse[rows, None]).exp_().mul_(factor)
        return logits.scatter_add_(-1, ids, at_ids)

    def _slope_of_cap(self, z: Tensor) -> Tensor:
        """d capped / d raw at shaped logits; 1 without a cap."""
        if self._shaping.softcap is None:
            return torch.ones((), device=z.device)
        return 1 - (z * (self._shaping.temperature / self._shaping.softcap)).square_()

    def to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        wide = out.dtype == torch.float32
        total = out.zero_() if wide else torch.zeros_like(out, dtype=torch.float32)
        for part, block in self._blocks():
            total.addmm_(gradient[:, part], block)
        if not wide:
            out.copy_(total)

    def add_to_weight(self, gradient: Tensor, hidden: Tensor, total: Tensor) -> None:
        total.addmm_(gradient.T, hidden.float())

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary with their rows of the weight in float32."""
        if self._weight.dtype == torch.float32:
            yield slice(None), self._weight
            return
        for start in range(0, len(self._weight), BLOCK):
            part = slice(start, start + BLOCK)
            yield part, self._weight[part].float()


def _groups(logits: Tensor) -> Iterator[slice]:
    """Slices of rows of about GROUP_BYTES."""
    size = max(1, GROUP_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), size):
        yield slice(start, start + size)
