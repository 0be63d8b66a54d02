"""Losses of one's own over all data of a call, computed beside the engine.

Shape letters: N positions of a datum.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.errors import ConfigError
from plait.types import Datum, TensorData

LossOfLogprobs = Callable[[Sequence[Datum], list[Tensor]], tuple[Tensor, Mapping[str, float]]]


def unweighted(data: Sequence[Datum]) -> list[Datum]:
    """The data with their targets alone; other inputs are the custom loss's own."""
    made = []
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"]
        weights = np.zeros(targets.shape, dtype=np.float32)
        inputs = {"target_tokens": targets, "weights": weights}
        made.append(Datum(datum.model_input, inputs))
    return made


def weighted_data(
    data: Sequence[Datum], logprobs: Sequence[Tensor], loss_fn: LossOfLogprobs
) -> tuple[list[Datum], dict[str, float]]:
    """Data whose cross entropy has the gradient of `loss_fn`, and its metrics.

    The sum of weight * -logprob has the derivative -weight by a logprob, so the weights are the
    negative derivatives of the loss.

    Raises:
        ConfigError: it does not return a scalar that depends on the logprobs, and metrics, or a
            derivative is not finite.
    """
    leaves = [values.clone().requires_grad_() for values in logprobs]
    returned = loss_fn(data, leaves)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ConfigError(
            "a custom loss must return two things: a scalar tensor, and metrics, a dict of numbers "
            f"by name; it returned {_told(returned)}"
        )
    loss, metrics = returned
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        raise ConfigError(
            "a custom loss must return a scalar tensor that depends on the logprobs, and metrics; "
            f"it returned {_told(loss)}"
        )
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    derivatives = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
    named = {name: float(value) for name, value in metrics.items()}
    return weighted_by(data, derivatives), {"custom_loss:sum": float(loss.detach()), **named}


def weighted_by(data: Sequence[Datum], derivatives: Sequence[Tensor]) -> list[Datum]:
    """Data whose cross entropy has these derivatives by the logprobs.

    Raises:
        ConfigError: one is not finite.
    """
    weighted = []
    for number, (datum, derivative) in enumerate(zip(data, derivatives, strict=True)):
        if not bool(derivative.isfinite().all()):
            raise ConfigError(
                "a custom loss must have finite derivatives; those by the logprobs of datum "
                f"{number} are not all: logprobs of positions without a target are 0"
            )
        inputs: dict[str, Any] = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "weights": TensorData.from_torch(-derivative),
        }
        weighted.append(Datum(datum.model_input, inputs))
    return weighted


def _told(loss: Any) -> str:
    if not isinstance(loss, Tensor):
        return type(loss).__name__
    depends = "with" if loss.requires_grad else "without"
    return f"a tensor of shape {tuple(loss.shape)} {depends} a gradient"
