"""Learning a teacher's distribution, of which the K likeliest tokens are known.

Shape letters: P learned positions, D documents, K tokens of a position.
"""

import numpy as np
from torch import Tensor

from plait.trainer.losses.base import Inputs, Loss, LossBatch

FLOOR = 1e-5
"""The least mass of all other tokens together.

Logprobs in float32 sum to 1 only to some 1e-6, so less than this cannot be told from none; and no
gradient through its logarithm is larger than 1 / FLOOR.
"""


def distillation(batch: LossBatch) -> Tensor:
    """(D,): the sum of weight * KL(teacher || student), all tokens beyond the K as a single one.

    With p_k the teacher's probabilities (input `target_logprobs` of the targets) and s_k the
    student's: sum of p_k log(p_k / s_k) + p_0 log(p_0 / s_0), where p_0 = max(1 - sum p_k, FLOOR)
    and s_0 alike; a student below the floor has no gradient through s_0. Cells of probability 0
    (logprob -99999) fill up positions with fewer than K tokens: they are counted nowhere.
    """
    teacher = batch.inputs["target_logprobs"]
    shares = teacher.exp()
    student_shares = batch.logprobs.exp() * (shares > 0)
    rest, student_rest = _rest(shares), _rest(student_shares)
    known = (shares * (teacher - batch.logprobs)).sum(-1)
    return batch.per_document(batch.weights * (known + rest * (rest / student_rest).log()))


def _rest(shares: Tensor) -> Tensor:
    """(P, K) -> (P,): the mass of all other tokens."""
    return (1 - shares.sum(-1)).clamp(min=FLOOR)


def mass_objection(inputs: Inputs) -> str | None:
    """Logprobs of different tokens of one distribution cannot sum to more than 1."""
    mass = np.exp(inputs["target_logprobs"].astype(np.float64)).sum(-1)
    if mass.max(initial=0) > 1.01:
        return (
            "target_logprobs are the teacher's of different tokens, whose probabilities sum to 1 "
            f"at most; at position {mass.argmax()} they sum to {mass.max():.3g}"
        )
    return None


DISTILLATION = Loss(
    name="distillation",
    function=distillation,
    inputs=("target_logprobs", "weights"),
    target_ranks=(2,),
    per_target=("target_logprobs",),
    objection=mass_objection,
)
