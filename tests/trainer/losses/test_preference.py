"""DPO and KTO against their formulas, document by document in Python's floats."""

from collections.abc import Callable
from dataclasses import replace
from math import exp, log, log1p
from typing import Any

import numpy as np
import pytest
import torch

from plait.trainer.losses import config_of, loss_named

PAIRS = (5, 1, 0, 3, 7, 0, 2, 9)


def sigmoid(z: float) -> float:
    return 1 / (1 + exp(-z)) if z > -700 else 0.0


def log_sigmoid(z: float) -> float:
    return -log1p(exp(-z)) if z > -700 else z


def log_ratio(document: Any) -> float:
    columns = (document["w"], document["lp"], document["reference_logprobs"])
    return sum(w * (lp - ref) for w, lp, ref in zip(*columns, strict=True))


def check_dpo(case: Any) -> None:
    """Losses, and the gradient by each logprob of both answers."""
    config, documents = case.batch.config, case.documents()
    beta, smoothing = config["beta"], config["label_smoothing"]
    upstream = torch.linspace(0.5, 2, len(documents))
    losses, gradient = case.evaluate(upstream)
    expected: list[float] = []
    slopes: list[float] = []
    for i in range(0, len(documents), 2):
        chosen, rejected = documents[i], documents[i + 1]
        margin = beta * (log_ratio(chosen) - log_ratio(rejected))
        loss = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
        expected += [loss, 0.0]
        slope = -(1 - smoothing) * sigmoid(-margin) + smoothing * sigmoid(margin)
        slope *= beta * upstream[i].item()
        slopes += [slope * w for w in chosen["w"]] + [-slope * w for w in rejected["w"]]
    assert losses.tolist() == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert gradient.tolist() == pytest.approx(slopes, rel=5e-5, abs=1e-7)


@pytest.mark.parametrize(
    "given", [{}, {"beta": 1.7}, {"label_smoothing": 0.2}, {"beta": 0.5, "label_smoothing": 0.5}]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_dpo_is_its_formula(make: Any, given: dict[str, float], seed: int) -> None:
    check_dpo(make("dpo", PAIRS, given=given, seed=seed))
    check_dpo(make("dpo", (1, 1), given=given, seed=seed, apart=3.0))


@pytest.mark.parametrize("far", [30.0, -30.0])
def test_dpo_stays_finite_far_from_the_reference(make: Any, far: float) -> None:
    """Whatever side the model has left to: an answer of nine tokens is 270 nats away."""
    case = make("dpo", PAIRS, given={"beta": 1.0})
    side = torch.ones(len(PAIRS))
    side[1::2] = -1
    shift = far * side.repeat_interleave(case.batch.lengths)
    reference = case.batch.logprobs.detach() - shift
    inputs = {"reference_logprobs": reference}
    weights = torch.ones_like(case.batch.weights)
    far_off = replace(case, batch=replace(case.batch, inputs=inputs, weights=weights))
    check_dpo(far_off)
    losses, gradient = far_off.evaluate(torch.ones(len(PAIRS)))
    assert bool(losses.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_dpo_reports_rewards_of_pairs(make: Any) -> None:
    case = make("dpo", PAIRS, given={"beta": 0.7})
    found = loss_named("dpo").metrics(case.batch)
    rewards = [0.7 * log_ratio(document) for document in case.documents()]
    for i in range(0, len(PAIRS), 2):
        margin = rewards[i] - rewards[i + 1]
        expected = {
            "pairs": 1,
            "reward_chosen": rewards[i],
            "reward_rejected": rewards[i + 1],
            "margin": margin,
            "correct": float(margin > 0),
        }
        assert {n: v[i].item() for n, v in found.items()} == pytest.approx(expected, abs=1e-5)
        assert not any(v[i + 1] for v in found.values())


def kto(document: Any, config: Any) -> Any:
    if not document["lp"]:
        return [0.0], []
    label = document["labels"][0]
    weight = config["desirable_weight" if label > 0 else "undesirable_weight"]
    z = label * config["beta"] * (log_ratio(document) - config["reference_kl"])
    value = sigmoid(z)
    slope = -weight * value * sigmoid(-z) * label * config["beta"]
    return [weight * (1 - value)], [slope * w for w in document["w"]]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"beta": 2.0},
        {"desirable_weight": 1.3, "undesirable_weight": 0.4},
        {"reference_kl": 1.5, "beta": 0.6},
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_kto_is_its_formula(
    make: Any, agrees: Callable[..., None], given: dict[str, float], seed: int
) -> None:
    agrees(make("kto", given=given, seed=seed), kto)
    agrees(make("kto", (1,), given=given, seed=seed, apart=3.0), kto)


def test_kto_keeps_what_is_left_of_a_loss(make: Any) -> None:
    """1 - sigmoid(20) is 2e-9, which float32 cannot say as a difference from 1."""
    case = make("kto", (1,), given={"beta": 1.0})
    lp = torch.tensor([-1.0], requires_grad=True)
    inputs = {"reference_logprobs": torch.tensor([-21.0]), "labels": torch.ones(1)}
    batch = replace(case.batch, logprobs=lp, weights=torch.ones(1), inputs=inputs)
    losses, gradient = replace(case, batch=batch).evaluate(torch.ones(1))
    assert losses.item() == pytest.approx(exp(-20), rel=1e-5)
    assert gradient.item() == pytest.approx(-exp(-20), rel=1e-5)


@pytest.mark.parametrize("far", [30.0, -30.0])
def test_kto_stays_finite_far_from_the_reference(
    make: Any, agrees: Callable[..., None], far: float
) -> None:
    case = make("kto", given={"beta": 1.0})
    inputs = case.batch.inputs | {"reference_logprobs": case.batch.logprobs.detach() - far}
    far_off = replace(case, batch=replace(case.batch, inputs=inputs))
    agrees(far_off, kto)
    _, gradient = far_off.evaluate(torch.ones(len(case.batch.lengths)))
    assert bool(gradient.isfinite().all())


def test_kto_reports_rewards_by_label(make: Any) -> None:
    case = make("kto", given={"beta": 0.7})
    found = loss_named("kto").metrics(case.batch)
    for at, document in enumerate(case.documents()):
        label = document["labels"][0] if document["lp"] else 0
        reward = 0.7 * log_ratio(document)
        expected = {
            "desirable": float(label > 0),
            "undesirable": float(label < 0),
            "reward_desirable": reward if label > 0 else 0,
            "reward_undesirable": reward if label < 0 else 0,
        }
        assert {n: v[at].item() for n, v in found.items()} == pytest.approx(expected, abs=1e-5)


def test_preferences_learn_where_a_weight_is() -> None:
    weights = {"weights": np.array([0, 0, 1, 1.0, 0])}
    for name in ("dpo", "kto"):
        loss = loss_named(name)
        assert loss.learned(weights, config_of(loss)).tolist() == [0, 0, 1, 1, 0]
    assert loss_named("dpo").paired
    assert not loss_named("kto").paired


def test_the_defaults_are_the_papers() -> None:
    assert config_of(loss_named("dpo")) == {"beta": 0.1, "label_smoothing": 0}
    assert config_of(loss_named("kto")) == {
        "beta": 0.1,
        "desirable_weight": 1,
        "undesirable_weight": 1,
        "reference_kl": 0,
    }
    assert log_sigmoid(0) == -log(2)
