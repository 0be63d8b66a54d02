"""Learning texts as they are."""

from torch import Tensor

from plait.trainer.losses.base import Loss, LossBatch


def cross_entropy(batch: LossBatch) -> Tensor:
    """(D,): -sum of weight * logprob; over K soft targets the weights are their probabilities."""
    return batch.per_document(-batch.weights * batch.logprobs)


CROSS_ENTROPY = Loss(
    name="cross_entropy",
    function=cross_entropy,
    inputs=(),
    optional=("weights",),
    target_ranks=(1, 2),
    per_target=("weights",),
)
