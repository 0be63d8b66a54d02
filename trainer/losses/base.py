"""What a loss reads, and what a loss is.

Shape letters: P learned positions of a stream, D documents, K soft targets of a position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plait.errors import DataError

Inputs = Mapping[str, Any]
"""The loss inputs of one datum by name, all numpy arrays or all tensors: (N,) or (N, K)."""

Config = Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class LossBatch:
    """P learned positions of D documents, in the order of their stream."""

    logprobs: Tensor
    """(P,) or (P, K) float32, of the targets; differentiable."""

    weights: Tensor
    """(P,) or (P, K) float32. Where a datum gave none: 1 where `Loss.learned`, 0 elsewhere."""

    inputs: Mapping[str, Tensor]
    """Further inputs at these positions, (P,) or (P, K) float32."""

    lengths: Tensor
    """(D,) int64: how many of the positions are each document's, which may be none."""

    config: Config
    """Every key of the loss, as `config_of` fills it in."""

    entropy: Tensor | None = None
    """(P,) of each position's distribution, in nats, where `Loss.needs_entropy`."""

    def per_document(self, values: Tensor) -> Tensor:
        """(P,) or (P, K) -> (D,): the sum over each document's positions, 0 where it has none.

        Differentiable. Every sum has one order and no atomics, is taken in float64 and rounded
        once, so that it does not depend on the documents beside it.
        """
        wide = values.double()
        rows = wide if wide.ndim == 1 else wide.sum(-1)
        sums = torch.segment_reduce(rows, "sum", lengths=self.lengths)
        return sums.to(self.logprobs.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """(D,) -> (P,): each document's value at each of its positions, as a constant."""
        return values.detach().repeat_interleave(self.lengths, output_size=len(self.logprobs))

    def pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(D,) -> (D/2,) of the chosen and of the rejected: documents 2i and 2i + 1.

        Raises:
            DataError: a document has no partner.
        """
        if len(values) % 2:
            raise DataError(
                "a loss over pairs needs an even number of documents, chosen and rejected by "
                f"turns; it was given {len(values)}"
            )
        return values[0::2], values[1::2]


def weighted(inputs: Inputs, config: Config) -> Any:
    """(N,) bool: the positions with a weight; all where none is given."""
    del config
    if "weights" not in inputs:
        return everywhere(inputs)
    mask = inputs["weights"] != 0
    return mask if mask.ndim == 1 else mask.any(-1)


def everywhere(inputs: Inputs) -> Any:
    """(N,) bool: all positions, in the kind of the inputs, which are finite."""
    mask = next(iter(inputs.values())) * 0 == 0
    return mask if mask.ndim == 1 else mask.all(-1)


def no_objection(inputs: Inputs) -> None:
    """For losses that can use any finite numbers of the right shapes."""
    del inputs


def no_metrics(batch: LossBatch) -> dict[str, Tensor]:
    """For losses with nothing more to say than their sum."""
    del batch
    return {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loss:
    """A loss, what it reads, and what may be set."""

    name: str

    function: Callable[[LossBatch], Tensor]
    """The loss of each document, (D,): a sum, never normalised."""

    inputs: tuple[str, ...]
    """What a datum must bring besides target_tokens."""

    optional: tuple[str, ...] = ()
    """What it may bring too."""

    target_ranks: tuple[int, ...] = (1,)
    """The ranks that target_tokens may have: 1 is (N,), 2 is (N, K)."""

    per_target: tuple[str, ...] = ()
    """Inputs in the shape of target_tokens; the others are (N,)."""

    defaults: Config = field(default_factory=dict)
    """The keys of loss_fn_config, with what they are where it does not name them."""

    ranges: Mapping[str, str] = field(default_factory=dict)
    """The intervals that keys lie in ("[0, 1)"); a key without one may be any finite number."""

    reads_with: Mapping[str, str] = field(default_factory=dict)
    """An optional input that a datum must bring where this key of the config is not 0."""

    paired: bool = False
    """Documents come in pairs: 2i is the chosen one, 2i + 1 the rejected."""

    learned: Callable[[Inputs, Config], Any] = weighted
    """(N,) bool of one datum: the positions without which the loss or its gradient would differ.

    Media are not its affair. It may only compare and combine, which arrays and tensors both can.
    """

    objection: Callable[[Inputs], str | None] = no_objection
    """What is wrong with numpy inputs of the right shapes, as a rule and a value."""

    metrics: Callable[[LossBatch], dict[str, Tensor]] = no_metrics
    """Further facts of each document, (D,) by name and detached, made to be summed."""

    def required(self, config: Config) -> tuple[str, ...]:
        """Every input that a datum must bring under a config, target_tokens first."""
        more = [name for key, name in self.reads_with.items() if config[key] != 0]
        return ("target_tokens", *self.inputs, *more)

    def needs_entropy(self, config: Config) -> bool:
        """Whether `LossBatch.entropy` is read, which costs a second look at the logits."""
        return config.get("entropy_coefficient", 0.0) != 0
