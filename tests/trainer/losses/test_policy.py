"""Policy losses against their formulas, written token by token in Python's floats."""

from collections.abc import Callable
from dataclasses import replace
from math import exp
from typing import Any

import numpy as np
import pytest
import torch

from plait.errors import ModelError
from plait.trainer.losses import config_of, loss_named

Agrees = Callable[..., None]
LOW, HIGH = "clip_low_threshold", "clip_high_threshold"


def importance_sampling(lp: float, q: float, advantage: float, config: Any) -> Any:
    ratio = exp(lp - q)
    return ratio * advantage, ratio * advantage


def ppo(lp: float, q: float, advantage: float, config: Any) -> Any:
    return clipped(exp(lp - q), advantage, config)


def clipped(ratio: float, advantage: float, config: Any) -> Any:
    bounded = min(max(ratio, config[LOW]), config[HIGH])
    if bounded * advantage < ratio * advantage:
        return bounded * advantage, 0.0
    return ratio * advantage, ratio * advantage


def cispo(lp: float, q: float, advantage: float, config: Any) -> Any:
    weight = min(max(exp(lp - q), config[LOW]), config[HIGH])
    return weight * lp * advantage, weight * advantage


def dro(lp: float, q: float, advantage: float, config: Any) -> Any:
    beta = config["beta"]
    return lp * advantage - beta / 2 * (lp - q) ** 2, advantage - beta * (lp - q)


def term(lp: float, document: Any, at: int, config: Any) -> Any:
    d = document["reference_logprobs"][at] - lp if config["kl_coefficient"] else 0.0
    kl, slope = exp(d) - 1 - d, 1 - exp(d)
    bonus = config["entropy_coefficient"] * document["entropy"][at]
    return config["kl_coefficient"] * kl - bonus, config["kl_coefficient"] * slope


def summed(objective: Any) -> Any:
    """A formula of documents from one of tokens."""

    def formula(document: Any, config: Any) -> Any:
        terms, slopes = [], []
        for at, (lp, weight) in enumerate(zip(document["lp"], document["w"], strict=True)):
            numbers = (lp, document["logprobs"][at], document["advantages"][at], config)
            value, slope = objective(*numbers)
            added, added_slope = term(lp, document, at, config)
            terms += [weight * added, -weight * value]
            slopes.append(weight * (added_slope - slope))
        return terms, slopes

    return formula


def gspo(document: Any, config: Any) -> Any:
    pairs = list(zip(document["lp"], document["logprobs"], strict=True))
    marked = [m != 0 for m in document["sequence_ratio_mask"]]
    apart = [lp - q for (lp, q), m in zip(pairs, marked, strict=True) if m]
    ratio = exp(sum(apart) / len(apart)) if apart else 1.0

    def objective(lp: float, q: float, advantage: float, config: Any) -> Any:
        return clipped(ratio, advantage, config)

    return summed(objective)(document, config)


FORMULAS = {
    "importance_sampling": summed(importance_sampling),
    "ppo": summed(ppo),
    "cispo": summed(cispo),
    "dro": summed(dro),
    "gspo": gspo,
}
NAMES = sorted(FORMULAS)
TERMS = {"kl_coefficient": 0.3, "entropy_coefficient": 0.2}
SETTINGS: list[tuple[str, dict[str, float]]] = [
    ("ppo", {LOW: 0.95, HIGH: 1.4}),
    ("ppo", {LOW: 0.0}),
    ("ppo", {LOW: 1.0, HIGH: 1.0}),
    ("cispo", {LOW: 0.9, HIGH: 1.1}),
    ("dro", {"beta": 2.5}),
    ("gspo", {LOW: 0.999, HIGH: 1.001}),
    *((name, TERMS) for name in NAMES),
    *((name, {"kl_coefficient": 1.5}) for name in NAMES),
    *((name, {"entropy_coefficient": 1.0}) for name in NAMES),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_their_formulas(make: Any, agrees: Agrees, name: str, seed: int) -> None:
    agrees(make(name, seed=seed), FORMULAS[name])
    agrees(make(name, (1,), seed=seed), FORMULAS[name])
    agrees(make(name, (33, 0, 0, 1), seed=seed, apart=2.0), FORMULAS[name])


@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_settings_equal_their_formulas(
    make: Any, agrees: Agrees, name: str, given: dict[str, float]
) -> None:
    agrees(make(name, given=given), FORMULAS[name])


def test_the_defaults_are_the_reference_s() -> None:
    terms = {"kl_coefficient": 0, "entropy_coefficient": 0}
    expected: dict[str, dict[str, float]] = {
        "importance_sampling": {},
        "ppo": {LOW: 0.8, HIGH: 1.2},
        "cispo": {LOW: 0.0, HIGH: 4.0},
        "dro": {"beta": 0.05},
        "gspo": {LOW: 0.8, HIGH: 1.2},
    }
    for name, defaults in expected.items():
        assert config_of(loss_named(name)) == defaults | terms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("far", [30.0, -30.0])
def test_extreme_ratios_stay_finite(make: Any, agrees: Agrees, name: str, far: float) -> None:
    case = make(name, given=TERMS)
    lp = case.batch.logprobs.detach()
    inputs = case.batch.inputs | {"logprobs": lp - far, "reference_logprobs": lp - far / 2}
    far_off = replace(case, batch=replace(case.batch, inputs=inputs))
    agrees(far_off, FORMULAS[name])
    losses, gradient = far_off.evaluate(torch.ones(len(case.batch.lengths)))
    assert bool(losses.isfinite().all())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_a_ratio_beyond_float32_is_clipped_and_has_a_gradient(make: Any, name: str) -> None:
    case = make(name, (3, 2))
    inputs = case.batch.inputs | {
        "logprobs": case.batch.logprobs.detach() - 100,
        "advantages": torch.tensor([1.0, 0.0, 2.0, 3.0, 0.0]),
        "sequence_ratio_mask": torch.ones(5),
    }
    far_off = replace(case, batch=replace(case.batch, inputs=inputs))
    losses, gradient = far_off.evaluate(torch.ones(2))
    assert bool(losses.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert bool(gradient[inputs["advantages"] == 0].any()) is False
    assert bool(gradient.any()) is (name == "cispo")


def one_token(make: Any, name: str, ratio: float, advantage: float, **given: float) -> Any:
    case = make(name, (1,), given=given)
    lp = case.batch.logprobs.detach()
    inputs = {
        "logprobs": lp - float(np.log(ratio)),
        "advantages": torch.tensor([advantage]),
        "sequence_ratio_mask": torch.ones(1),
    }
    inputs = {name: inputs[name] for name in loss_named(name).inputs}
    batch = replace(case.batch, weights=torch.ones(1), inputs=inputs)
    return replace(case, batch=batch)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.1999, 2.0, 2.3998, 2.3998),  # inside
        (1.2001, 2.0, 2.4, 0.0),  # too far up, and wanted up: cut
        (0.5, 2.0, 1.0, 1.0),  # far down, wanted up: pulled back
        (0.8001, -2.0, -1.6002, -1.6002),
        (0.7999, -2.0, -1.6, 0.0),  # too far down, and wanted down: cut
        (3.0, -2.0, -6.0, -6.0),  # far up, wanted down: pulled back
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_clip_cuts_only_what_went_too_far(
    make: Any, name: str, ratio: float, advantage: float, value: float, slope: float
) -> None:
    losses, gradient = one_token(make, name, ratio, advantage).evaluate(torch.ones(1))
    assert losses.item() == pytest.approx(-value, rel=1e-5)
    assert gradient.item() == pytest.approx(-slope, rel=1e-5)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_ratio_on_the_edge_keeps_its_gradient(make: Any, advantage: float) -> None:
    """As clamp and minimum of torch have it; exp(0) is 1 without rounding."""
    case = one_token(make, "ppo", 1.0, advantage, **{LOW: 1.0, HIGH: 1.0})
    _, gradient = case.evaluate(torch.ones(1))
    assert gradient.item() == -advantage


def test_cispo_s_weight_has_no_gradient(make: Any) -> None:
    """Through the ratio it would be r (1 + lp) A inside the clip, and lp's alone beyond."""
    for ratio in (0.5, 1.0, 3.0, 9.0):
        case = one_token(make, "cispo", ratio, 2.0)
        _, gradient = case.evaluate(torch.ones(1))
        assert gradient.item() == pytest.approx(-min(ratio, 4.0) * 2, rel=1e-5)


def test_gspo_s_ratio_has_no_gradient(make: Any) -> None:
    """A token without advantage has none, though the ratio of the others reads its logprob."""
    case = make("gspo", (4,), given={LOW: 0.0, HIGH: 1e9})
    inputs = case.batch.inputs | {
        "advantages": torch.tensor([0.0, 1.0, 0.0, -2.0]),
        "sequence_ratio_mask": torch.tensor([1.0, 1.0, 1.0, 0.0]),
    }
    batch = replace(case.batch, inputs=inputs, weights=torch.ones(4))
    _, gradient = replace(case, batch=batch).evaluate(torch.ones(1))
    apart = (batch.logprobs - inputs["logprobs"]).detach()[:3]
    ratio = float(apart.mean().exp())
    assert gradient.tolist() == pytest.approx([0, -ratio, 0, 2 * ratio], rel=1e-5)


def test_gspo_without_a_marked_token_takes_its_ratio_as_one(make: Any, agrees: Agrees) -> None:
    case = make("gspo")
    case.batch.inputs["sequence_ratio_mask"].zero_()
    agrees(case, gspo)


def test_gspo_s_mask_is_a_mask(make: Any) -> None:
    """Its values are not weights of a mean."""
    case = make("gspo")
    plain, _ = case.evaluate(torch.ones(len(case.batch.lengths)))
    case.batch.inputs["sequence_ratio_mask"].mul_(3)
    scaled, _ = case.evaluate(torch.ones(len(case.batch.lengths)))
    assert torch.equal(plain, scaled)


@pytest.mark.parametrize("name", NAMES)
def test_entropy_is_rewarded_by_weight(make: Any, name: str) -> None:
    case = make(name, given={"entropy_coefficient": 0.5})
    assert case.batch.entropy is not None
    case.evaluate(torch.ones(len(case.batch.lengths)))
    torch.testing.assert_close(case.batch.entropy.grad, -0.5 * case.batch.weights)
    without = replace(case, batch=replace(case.batch, entropy=None))
    with pytest.raises(ModelError, match="needs_entropy"):
        without.evaluate(torch.ones(len(case.batch.lengths)))


def test_only_a_coefficient_makes_a_loss_read_more() -> None:
    for name in NAMES:
        loss = loss_named(name)
        for given, entropy, reference in (
            ({}, False, False),
            ({"kl_coefficient": 0.1}, False, True),
            ({"entropy_coefficient": 0.1}, True, False),
        ):
            config = config_of(loss, given)
            assert loss.needs_entropy(config) is entropy
            assert ("reference_logprobs" in loss.required(config)) is reference
    assert not loss_named("cross_entropy").needs_entropy({})


def test_the_k3_estimate_is_exact_for_small_differences(make: Any) -> None:
    """exp(d) - 1 - d in float32 would be noise: d is 1e-3, and its square is all there is."""
    case = make("importance_sampling", (1,), given={"kl_coefficient": 1.0})
    lp = torch.tensor([-0.5], requires_grad=True)
    zero = {"logprobs": torch.zeros(1), "advantages": torch.zeros(1)}
    inputs = zero | {"reference_logprobs": torch.tensor([-0.499])}
    batch = replace(case.batch, logprobs=lp, weights=torch.ones(1), inputs=inputs)
    losses, _ = replace(case, batch=batch).evaluate(torch.ones(1))
    d = (inputs["reference_logprobs"] - lp).double().item()
    assert losses.item() == pytest.approx(exp(d) - 1 - d, rel=1e-3)


def test_the_reference_term_is_one_divergence_and_pulls_like_the_other(make: Any) -> None:
    """Over every token as often as the model draws it: KL(model || reference) by value, and the
    gradient of KL(reference || model).
    """
    logits = torch.tensor([0.3, -1.0, 1.2, 0.1, -0.4], requires_grad=True)
    lp = torch.log_softmax(logits, -1)
    reference = torch.log_softmax(torch.tensor([1.0, 0.2, -0.3, 0.0, 0.5]), -1)
    shares = lp.exp().detach()
    case = make("importance_sampling", (5,), given={"kl_coefficient": 1.0})
    inputs = {"logprobs": lp.detach(), "advantages": torch.zeros(5)}
    inputs["reference_logprobs"] = reference
    batch = replace(case.batch, logprobs=lp, weights=shares, inputs=inputs)
    loss = loss_named("importance_sampling").function(batch)
    assert loss.item() == pytest.approx((shares * (lp - reference)).sum().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, shares - reference.exp())


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_positions_that_matter_are_learned(kind: str) -> None:
    """advantages, logprobs, mask, weights of six positions; the first two are a prompt."""
    columns = {
        "advantages": [0, 0, 1, 0, -1, 0],
        "logprobs": [0, 0, -1, -2, 0, 0],
        "sequence_ratio_mask": [0, 0, 1, 1, 0, 1],
        "weights": [0, 1, 1, 0, 0.5, 0],
    }
    convert = np.array if kind == "numpy" else torch.tensor
    every = {name: convert(values) for name, values in columns.items()}
    bare = {name: values for name, values in every.items() if name != "weights"}

    def learned(name: str, inputs: Any, **given: float) -> list[int]:
        loss = loss_named(name)
        return [int(x) for x in loss.learned(inputs, config_of(loss, given)).tolist()]

    for name in ("importance_sampling", "ppo", "cispo"):
        assert learned(name, bare) == [0, 0, 1, 0, 1, 0]
        assert learned(name, bare, kl_coefficient=1.0) == [0, 0, 1, 1, 1, 0]
        assert learned(name, bare, entropy_coefficient=1.0) == [0, 0, 1, 1, 1, 0]
    assert learned("gspo", bare) == [0, 0, 1, 1, 1, 1]
    assert learned("dro", bare) == [1] * 6
    for name in ("importance_sampling", "ppo", "cispo", "dro"):
        assert learned(name, every) == [0, 1, 1, 0, 1, 0]
        assert learned(name, every, kl_coefficient=1.0) == [0, 1, 1, 0, 1, 0]
    assert learned("gspo", every) == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_measure_the_distance_from_the_sampler(make: Any, name: str) -> None:
    case = make(name)
    case.batch.weights[::3] = 0
    case.batch.inputs["logprobs"][1::4] = 0
    found = loss_named(name).metrics(case.batch)
    for at, document in enumerate(case.documents()):
        rows = zip(document["lp"], document["logprobs"], document["w"], strict=True)
        apart = [lp - q for lp, q, w in rows if w != 0 and q != 0]
        assert found["sampled"][at] == len(apart)
        assert found["kl_k1"][at].item() == pytest.approx(-sum(apart), abs=1e-5)
        k3 = sum(exp(d) - 1 - d for d in apart)
        assert found["kl_k3"][at].item() == pytest.approx(k3, rel=1e-4, abs=1e-6)


def test_metrics_count_what_is_clipped(make: Any) -> None:
    def count(name: str, ratio: float, advantage: float) -> int:
        case = one_token(make, name, ratio, advantage)
        return int(loss_named(name).metrics(case.batch)["clipped"].item())

    for name in ("ppo", "gspo"):
        cases = [(2.0, 1.0), (2.0, -1.0), (0.5, 1.0), (0.5, -1.0), (1.0, 1.0), (2.0, 0.0)]
        assert [count(name, *case) for case in cases] == [1, 0, 0, 1, 0, 0]
    cases = [(5.0, 1.0), (5.0, -1.0), (0.1, 1.0), (3.9, 1.0), (5.0, 0.0)]
    assert [count("cispo", *case) for case in cases] == [1, 1, 0, 0, 0]
    assert "clipped" not in loss_named("importance_sampling").metrics(
        one_token(make, "importance_sampling", 5.0, 1.0).batch
    )
