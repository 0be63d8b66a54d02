"""The optimiser's arithmetic, and the rates of its steps."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import nn

from plait.errors import ConfigError, UnknownNameError
from plait.trainer.config import TrainConfig
from plait.trainer.optimiser import StepSettings, make_optimizer, prepare_step
from plait.trainer.schedule import settings_at


class Toy(nn.Module):
    """A matrix that decays and a bias that does not, of two parts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator))

    def trainable(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        yield "language", "matrix", self.matrix
        yield "projector", "bias", self.bias


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_steps_are_adamw_on_divided_clipped_gradients(clip: float) -> None:
    """Against the formulas of Loshchilov and Hutter (2019), in float64."""
    toy = Toy()
    trainable = list(toy.trainable())
    settings = StepSettings(
        learning_rate=0.1, weight_decay=0.2, grad_clip_norm=clip,
        part_learning_rates={"projector": 0.3},
    )  # fmt: skip
    assert (settings.beta1, settings.beta2, settings.eps) == (0.9, 0.95, 1e-12)
    optimizer = make_optimizer(trainable)
    mine = [(toy.matrix.detach().clone(), 0.1, 0.2), (toy.bias.detach().clone(), 0.3, 0.0)]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value, _, _ in mine]
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 5):
        sums = [torch.randn(v.shape, dtype=torch.float64, generator=generator) for v, _, _ in mine]
        toy.matrix.grad, toy.bias.grad = (gradient.clone() for gradient in sums)
        metrics = prepare_step(trainable, optimizer, settings, divide_by=4.0)
        optimizer.step()
        means = [gradient / 4 for gradient in sums]
        norm = float(torch.cat([gradient.flatten() for gradient in means]).norm())
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-12)
        scale = min(1.0, clip / norm) if clip else 1.0
        for (value, rate, decay), (first, second), mean in zip(mine, moments, means, strict=True):
            gradient = mean * scale
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.95).add_(0.05 * gradient**2)
            value.mul_(1 - rate * decay)
            corrected = second.div(1 - 0.95**step).sqrt() + 1e-12
            value.sub_(rate * first / (1 - 0.9**step) / corrected)
        torch.testing.assert_close(toy.matrix.detach(), mine[0][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(toy.bias.detach(), mine[1][0], rtol=1e-10, atol=1e-12)


def test_a_rate_of_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'projecter'; did you mean 'projector'"):
        StepSettings(part_learning_rates={"projecter": 2e-3})
    with pytest.raises(ConfigError, match=r"part_learning_rates\.vision must be a number"):
        StepSettings(part_learning_rates={"vision": -1.0})
    for name, value in {"learning_rate": float("nan"), "beta2": 1.0, "eps": 0.0}.items():
        with pytest.raises(ConfigError, match=f"{name} must be a number"):
            StepSettings(**{name: value})


def test_rates_rise_linearly_and_fall_along_a_cosine() -> None:
    config = TrainConfig(
        steps=10, warmup=4, learning_rate=1.0, final_share=0.1,
        part_learning_rates={"projector": 2.0}, weight_decay=0.3, grad_clip_norm=0.7,
    )  # fmt: skip
    rates = [settings_at(step, config).learning_rate for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[4:]))
    settings = settings_at(1, config)
    assert settings.part_learning_rates == {"projector": 1.0}
    assert (settings.weight_decay, settings.grad_clip_norm) == (0.3, 0.7)
