"""Distillation against KL(teacher || student) over K tokens and one for the rest."""

from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch

from plait.trainer.losses import loss_named
from plait.trainer.losses.distillation import FLOOR

Agrees = Callable[..., None]


def distillation(document: Any, config: Any) -> Any:
    terms, slopes = [], []
    rows = zip(document["w"], document["lp"], document["target_logprobs"], strict=True)
    for weight, student, teacher in rows:
        known = [(exp(t), exp(s)) for t, s in zip(teacher, student, strict=True)]
        rest = 1 - sum(p for p, _ in known)
        student_rest = 1 - sum(s for p, s in known if p > 0)
        floored = student_rest < FLOOR
        rest, student_rest = max(rest, FLOOR), max(student_rest, FLOOR)
        terms += [
            weight * p * (t - s)
            for (p, _), t, s in zip(known, teacher, student, strict=True)
            if p > 0
        ]
        terms.append(weight * rest * log(rest / student_rest))
        through_rest = 0 if floored else rest / student_rest
        slopes.append([weight * (-p + (through_rest * s if p > 0 else 0)) for p, s in known])
    return terms, slopes


@pytest.mark.parametrize("targets", [1, 3, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_distillation_is_the_divergence(make: Any, agrees: Agrees, targets: int, seed: int) -> None:
    agrees(make("distillation", targets=targets, seed=seed), distillation)
    agrees(make("distillation", (1,), targets=targets, seed=seed), distillation)


def of_rows(make: Any, teacher: list[list[float]], student: list[list[float]]) -> Any:
    case = make("distillation", (len(teacher),), targets=len(teacher[0]))
    batch = replace(
        case.batch,
        logprobs=torch.tensor(student).requires_grad_(),
        weights=torch.ones(len(teacher)),
        inputs={"target_logprobs": torch.tensor(teacher)},
    )
    return replace(case, batch=batch)


def test_the_same_distribution_has_no_loss_and_no_pull(make: Any) -> None:
    """By the logits; by logprobs alone each slope is p times what their sum then takes away."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]], requires_grad=True)
    logprobs = torch.log_softmax(logits, -1)[:, :3]
    case = of_rows(make, logprobs.tolist(), logprobs.tolist())
    losses = loss_named("distillation").function(replace(case.batch, logprobs=logprobs))
    losses.sum().backward()
    assert losses.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_by_the_logits_the_gradient_is_student_minus_teacher(make: Any) -> None:
    """Where the K tokens are the whole vocabulary but one, the rest is that one."""
    logits = torch.tensor([[0.5, -1.0, 0.2, 1.1]], requires_grad=True)
    student = torch.log_softmax(logits, -1)
    teacher = torch.log_softmax(torch.tensor([[1.0, 0.0, -0.5, 0.3]]), -1)
    case = of_rows(make, teacher[:, :3].tolist(), student[:, :3].tolist())
    losses = loss_named("distillation").function(replace(case.batch, logprobs=student[:, :3]))
    losses.sum().backward()
    torch.testing.assert_close(logits.grad, (student.exp() - teacher.exp()).detach())


ALL = float(np.log(0.5))
"""Two of these are the whole mass, to rounding."""


@pytest.mark.parametrize("over", [0.0, 1e-6, -1e-6, 1e-3])
def test_mass_of_one_to_rounding_is_finite(make: Any, agrees: Agrees, over: float) -> None:
    """The teacher's, the student's, and both; `over` is what rounding may have added."""
    full, half = [ALL + over, ALL], [-1.5, -1.6]
    case = of_rows(make, [full, half, full], [half, full, full])
    agrees(case, distillation)
    losses, gradient = case.evaluate(torch.ones(1))
    assert bool(losses.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) <= 2 / FLOOR


@pytest.mark.parametrize("far", [30.0, -30.0])
def test_a_student_far_from_the_teacher_is_finite(make: Any, agrees: Agrees, far: float) -> None:
    near, away = -1.0, -1.0 - abs(far)
    teacher = [[near, away]] if far > 0 else [[away, near]]
    case = of_rows(make, teacher, [[away, near]])
    agrees(case, distillation)
    losses, gradient = case.evaluate(torch.ones(1))
    assert bool(losses.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_empty_cells_count_nowhere(make: Any) -> None:
    """A position with fewer than K tokens is filled up with token 0 at logprob -99999."""
    two = of_rows(make, [[-1.0, -2.0]], [[-1.5, -1.0]])
    filled = of_rows(make, [[-1.0, -2.0, -99999.0]], [[-1.5, -1.0, -1.5]])
    loss, gradient = two.evaluate(torch.ones(1))
    same, wider = filled.evaluate(torch.ones(1))
    assert torch.equal(loss, same)
    assert torch.equal(wider[:, :2], gradient)
    assert wider[0, 2] == 0


def test_positions_with_a_weight_are_learned() -> None:
    inputs = {"weights": np.array([0, 1, 0.5]), "target_logprobs": np.zeros((3, 2))}
    assert loss_named("distillation").learned(inputs, {}).tolist() == [0, 1, 1]
