"""Terms that any policy loss may add: closeness to a reference model, and entropy.

Both are 0 unless `loss_fn_config` has their coefficient. Shape letter: P learned positions.
"""

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.trainer.losses.base import Config, LossBatch

KL, ENTROPY = "kl_coefficient", "entropy_coefficient"
DEFAULTS = {KL: 0.0, ENTROPY: 0.0}
RANGES = {KL: "[0, inf)", ENTROPY: "[0, inf)"}
READS_WITH = {KL: "reference_logprobs"}


def wanted(config: Config) -> bool:
    """Whether a term is added at all."""
    return any(config[key] != 0 for key in DEFAULTS)


def k3(log_ratio: Tensor) -> Tensor:
    """exp(d) - 1 - d for d = log(p / q): an estimate of KL(q || p) from tokens that q drew.

    Never below 0, unbiased, and of low variance near p = q (Schulman 2020, "Approximating KL
    divergence"). `expm1` keeps the digits that exp(d) - 1 would lose there.
    """
    return torch.expm1(log_ratio) - log_ratio


def terms(batch: LossBatch) -> Tensor:
    """(P,): kl_coefficient * k3(reference - logprob) - entropy_coefficient * entropy.

    The first estimates KL(model || reference), and is unbiased if the model itself drew the
    tokens. Its gradient is biased even then: (1 - exp(d)) grad logprob is on average the gradient
    of the opposite KL(reference || model), which agrees to first order where the two are close.
    With tokens of an older sampler both are off by its distance; no ratio corrects them.

    Raises:
        ModelError: the entropy is wanted and was not computed.
    """
    added = torch.zeros_like(batch.logprobs)
    if batch.config[KL] != 0:
        log_ratio = batch.inputs["reference_logprobs"] - batch.logprobs
        added = added + batch.config[KL] * k3(log_ratio)
    if batch.config[ENTROPY] != 0:
        if batch.entropy is None:
            raise ModelError(
                f"a loss with {ENTROPY} reads entropies, and this batch has none; compute them "
                "where Loss.needs_entropy says so"
            )
        added = added - batch.config[ENTROPY] * batch.entropy
    return added
