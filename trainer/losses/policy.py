"""Policy losses: tokens that a sampler drew, and how much better they were than expected.

Letters are those of `ratios.py`; sg stops a gradient. Names, sums and defaults are the Tinker
API's. Each loss is the sum of `weights` * (terms - objective), with the terms of `terms.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from plait.trainer.losses import policy_metrics, terms
from plait.trainer.losses.base import Config, Inputs, Loss, LossBatch, no_objection, weighted
from plait.trainer.losses.ratios import (
    HIGH,
    LOW,
    RANGES,
    clipped_objective,
    log_ratio,
    sequence_log_ratio,
    truncated,
)

Objective = Callable[[LossBatch], Tensor]
"""(P,): what is to be maximised at each position."""


def importance_sampling(batch: LossBatch) -> Tensor:
    """r A: the policy gradient, corrected for tokens that an older model drew."""
    return log_ratio(batch).exp() * batch.inputs["advantages"]


def ppo(batch: LossBatch) -> Tensor:
    """min(r A, clip(r) A): Schulman et al. 2017 (arXiv 1707.06347), eq. 7."""
    return clipped_objective(log_ratio(batch), batch)


def cispo(batch: LossBatch) -> Tensor:
    """sg(clip(r)) lp A: MiniMax 2025 (arXiv 2506.13585). No token loses its whole gradient."""
    return truncated(log_ratio(batch), batch) * batch.logprobs * batch.inputs["advantages"]


def dro(batch: LossBatch) -> Tensor:
    """lp A - beta/2 (lp - q)²: Richemond et al. 2024 (arXiv 2405.19107), token by token."""
    penalty = batch.config["beta"] / 2 * log_ratio(batch) ** 2
    return batch.logprobs * batch.inputs["advantages"] - penalty


def gspo(batch: LossBatch) -> Tensor:
    """ppo's with r = sg(s) exp(lp - sg(lp)), s = exp(mean of lp - q over sequence_ratio_mask).

    GSPO-token, Zheng et al. 2025 (arXiv 2507.18071), section 4.3: a document's tokens share the
    value of one ratio, and each has the gradient of its own logprob.
    """
    # This difference is 0, with the gradient of the logprob; alone it costs the mean no digit.
    own = batch.logprobs - batch.logprobs.detach()
    return clipped_objective(sequence_log_ratio(batch) + own, batch)


def minimised(objective: Objective, batch: LossBatch) -> Tensor:
    """(D,): the sum of weights * (terms - objective)."""
    return batch.per_document(batch.weights * (terms.terms(batch) - objective(batch)))


def acting(inputs: Inputs, config: Config) -> Any:
    """Positions with a weight; or, where none is given, those that pull or that a term pulls.

    A prompt has neither advantages nor sampled logprobs, so no term reaches it.
    """
    if "weights" in inputs:
        return inputs["weights"] != 0
    pulling = inputs["advantages"] != 0
    return pulling | (inputs["logprobs"] != 0) if terms.wanted(config) else pulling


def acting_or_marked(inputs: Inputs, config: Config) -> Any:
    """Also those that the sequence's ratio reads."""
    return acting(inputs, config) | (inputs["sequence_ratio_mask"] != 0)


def mask_objection(inputs: Inputs) -> str | None:
    """A ratio over no token has no value."""
    if inputs["advantages"].any() and not inputs["sequence_ratio_mask"].any():
        return "sequence_ratio_mask marks the tokens that the ratio is taken over; it is 0 in all"
    return None


def _policy_loss(
    objective: Objective,
    *,
    name: str,
    defaults: Config,
    inputs: tuple[str, ...] = (),
    learned: Callable[[Inputs, Config], Any] = acting,
    objection: Callable[[Inputs], str | None] = no_objection,
    metrics: Callable[[LossBatch], dict[str, Tensor]] = policy_metrics.divergences,
) -> Loss:
    return Loss(
        name=name,
        function=partial(minimised, objective),
        inputs=("logprobs", "advantages", *inputs),
        optional=("weights", *terms.READS_WITH.values()),
        defaults={**defaults, **terms.DEFAULTS},
        ranges={"beta": "(0, inf)", **RANGES, **terms.RANGES},
        reads_with=terms.READS_WITH,
        learned=learned,
        objection=objection,
        metrics=metrics,
    )


IMPORTANCE_SAMPLING = _policy_loss(importance_sampling, name="importance_sampling", defaults={})

PPO = _policy_loss(
    ppo,
    name="ppo",
    defaults={LOW: 0.8, HIGH: 1.2},
    metrics=policy_metrics.with_clipped(log_ratio),
)

CISPO = _policy_loss(
    cispo,
    name="cispo",
    defaults={LOW: 0.0, HIGH: 4.0},
    metrics=policy_metrics.with_truncated,
)

DRO = _policy_loss(
    dro,
    name="dro",
    defaults={"beta": 0.05},
    learned=weighted,  # the penalty pulls wherever lp is not q, whatever the advantage
)

GSPO = _policy_loss(
    gspo,
    name="gspo",
    defaults={LOW: 0.8, HIGH: 1.2},
    inputs=("sequence_ratio_mask",),
    learned=acting_or_marked,
    objection=mask_objection,
    metrics=policy_metrics.with_clipped(sequence_log_ratio),
)
