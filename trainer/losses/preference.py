"""Preference losses: answers that people prefer, against what a reference model thought of them.

An answer's log-ratio is the sum of weights * (logprob - reference_logprob) over its document; the
weights are 1 in the answer and 0 in the prompt. Shape letter: D documents.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plait.trainer.losses.base import Inputs, Loss, LossBatch


def log_ratios(batch: LossBatch) -> Tensor:
    """(D,): each document's log-ratio."""
    apart = batch.logprobs - batch.inputs["reference_logprobs"]
    return batch.per_document(batch.weights * apart)


def dpo(batch: LossBatch) -> Tensor:
    """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin), the chosen document's; 0 the other's.

    margin = beta * (log-ratio of the chosen - log-ratio of the rejected): Rafailov et al. 2023
    (arXiv 2305.18290), eq. 7. With e = label_smoothing, the share of pairs taken to be labelled
    the wrong way round, it is Mitchell's conservative DPO.
    """
    margin, smoothing = _margin(batch), batch.config["label_smoothing"]
    losses = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    return _to_chosen(losses)


def _margin(batch: LossBatch) -> Tensor:
    chosen, rejected = batch.pairs(log_ratios(batch))
    return batch.config["beta"] * (chosen - rejected)


def _to_chosen(values: Tensor) -> Tensor:
    """(D/2,) of the pairs -> (D,)."""
    return torch.stack([values, torch.zeros_like(values)], dim=1).flatten()


def dpo_metrics(batch: LossBatch) -> dict[str, Tensor]:
    """Rewards beta * log-ratio, and each pair's margin and whether it is `correct`, above 0."""
    with torch.no_grad():
        chosen, rejected = batch.pairs(batch.config["beta"] * log_ratios(batch))
        margin = _margin(batch)
        facts = {
            "pairs": torch.ones_like(margin),
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "margin": margin,
            "correct": (margin > 0).to(margin),
        }
        return {name: _to_chosen(values) for name, values in facts.items()}


def kto(batch: LossBatch) -> Tensor:
    """weight * sigmoid(-label * beta * (log-ratio - reference_kl)) of a labelled answer.

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8, where 1 - sigmoid(z) is written sigmoid(-z).
    The weight is desirable_weight or undesirable_weight by the label's sign. The paper's reference
    point z0, KL(model || reference), is estimated over a batch; a sum per document must not depend
    on its neighbours, so it is the caller's number, and has no gradient, as in the paper.
    """
    label, config = _labels(batch), batch.config
    distance = label * config["beta"] * (log_ratios(batch) - config["reference_kl"])
    weight = (label > 0) * config["desirable_weight"] + (label < 0) * config["undesirable_weight"]
    return weight * torch.sigmoid(-distance)


def _labels(batch: LossBatch) -> Tensor:
    """(D,): 1, -1, or 0 of a document without positions; labels are constant in a document."""
    return batch.per_document(batch.inputs["labels"]).sign()


def labels_objection(inputs: Inputs) -> str | None:
    """A document is desirable or not, as a whole."""
    labels = inputs["labels"]
    if abs(labels[0]) != 1 or (labels != labels[0]).any():
        found = ", ".join(f"{value:g}" for value in sorted({*labels.tolist()})[:5])
        return (
            "labels are 1 (desirable) or -1 (undesirable), the same at every position of a "
            f"document; they are {found}"
        )
    return None


def kto_metrics(batch: LossBatch) -> dict[str, Tensor]:
    """Numbers of the answers of either kind, and their rewards beta * log-ratio."""
    with torch.no_grad():
        label, rewards = _labels(batch), batch.config["beta"] * log_ratios(batch)
        desirable, undesirable = (label > 0).to(rewards), (label < 0).to(rewards)
        return {
            "desirable": desirable,
            "undesirable": undesirable,
            "reward_desirable": desirable * rewards,
            "reward_undesirable": undesirable * rewards,
        }


DPO = Loss(
    name="dpo",
    function=dpo,
    inputs=("weights", "reference_logprobs"),
    defaults={"beta": 0.1, "label_smoothing": 0.0},
    ranges={"beta": "(0, inf)", "label_smoothing": "[0, 0.5]"},
    paired=True,
    metrics=dpo_metrics,
)

KTO = Loss(
    name="kto",
    function=kto,
    inputs=("weights", "reference_logprobs", "labels"),
    defaults={
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "reference_kl": 0.0,
    },
    ranges={
        "beta": "(0, inf)",
        "desirable_weight": "[0, inf)",
        "undesirable_weight": "[0, inf)",
        "reference_kl": "[0, inf)",
    },
    objection=labels_objection,
    metrics=kto_metrics,
)
