"""What the chunked computation asks of a machine: an output layer on a few positions at a time.

`cpu.Head` and `triton.Head` answer; `chunked.py` walks the chunks and knows no machine.

Shape letters: C positions of a chunk, H hidden size, V vocabulary, K targets of a position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Shaping:
    """How raw logits become the ones that are normalised: z = softcap tanh(raw / softcap) / T."""

    softcap: float | None = None
    """Bound on the size of a logit, as in Gemma 2; None for none."""
    temperature: float = 1.0
    """T above; it divides what the cap has left, as a sampler does."""


class Statistics(NamedTuple):
    """Of each row of logits, in float32."""

    lse: Tensor
    """(C,) log-sum-exp of the shaped logits."""
    picked: Tensor
    """(C, K) shaped logits at the ids asked for."""
    entropy: Tensor | None
    """(C,) in nats; None where not asked."""


class Slopes(NamedTuple):
    """What is wanted of a loss's gradient: its derivatives by logprobs and entropies."""

    logprobs: Tensor
    """(C, K) float32, one for each id."""
    entropy: Tensor | None = None
    """(C,) float32."""


class Head(Protocol):
    """The output layer of one call, with the buffers for one chunk of its logits."""

    rows: int
    """Positions of a chunk, at least one."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (C, H) -> (C, V) float32, in the head's own form and buffer, monotone in raw.

        The next call overwrites it.
        """

    def statistics(self, logits: Tensor, ids: Tensor, entropy: bool) -> Statistics:
        """One look at `logits`, which stay as they are. ids (C, K)."""

    def gradient(
        self, logits: Tensor, ids: Tensor, slopes: Slopes, lse: Tensor, entropy: Tensor | None
    ) -> Tensor:
        """dL/d raw logits (C, V), in a type that the products below take; spends `logits`."""

    def to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        """Write dL/d hidden (C, H) into `out`."""

    def add_to_weight(self, gradient: Tensor, hidden: Tensor, total: Tensor) -> None:
        """Add dL/d weight of this chunk to `total` (V, H) float32."""


HeadFactory = Callable[[Tensor, Tensor, Tensor | None, Shaping], Head]
"""hidden (T, H), weight (V, H), bias (V,), shaping -> a head for this call."""
