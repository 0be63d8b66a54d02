"""What a user gives a loss: settings and inputs are checked before anything is computed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.errors import ConfigError, DataError, Origin, UnknownNameError
from plait.ranges import check_number
from plait.trainer.losses.base import Config, Loss
from plait.trainer.losses.ratios import HIGH, LOW

Arrays = Mapping[str, NDArray[Any]]


def config_of(loss: Loss, given: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Every key of a loss: `given`, which is its loss_fn_config, and defaults for the rest.

    Raises:
        UnknownNameError: the loss has no such key.
        ConfigError: a value is not a number, or not one that the key may have.
    """
    config = dict(loss.defaults)
    for key, value in (given or {}).items():
        if key not in config:
            raise UnknownNameError(f"key of loss {loss.name!r}", key, config)
        check_number(f"loss_fn_config[{key!r}]", value, loss.ranges.get(key, "(-inf, inf)"))
        config[key] = float(value)
    if LOW in config and config[LOW] > config[HIGH]:
        raise ConfigError(
            f"{LOW} must not be above {HIGH}; they are {config[LOW]:g} and {config[HIGH]:g}: both "
            f"are ratios, by default {loss.defaults[LOW]:g} and {loss.defaults[HIGH]:g}"
        )
    return config


def check_inputs(
    loss: Loss,
    inputs: Arrays,
    positions: int,
    origin: Origin | None = None,
    config: Config | None = None,
) -> None:
    """Refuse the loss inputs of one datum that its loss cannot use.

    Args:
        inputs: By name, target_tokens among them.
        positions: Of the datum's model input.
        config: From `config_of`; None is the loss's defaults.

    Raises:
        UnknownNameError: the loss does not read an input.
        DataError: an input is missing, of a wrong length or shape, not finite, or senseless.
    """
    known = ("target_tokens", *loss.inputs, *loss.optional)
    for name in inputs:
        if name not in known:
            raise UnknownNameError(f"input of loss {loss.name!r}", name, known)
    required = loss.required(loss.defaults if config is None else config)
    for name in required:
        if name not in inputs:
            raise DataError(
                f"loss {loss.name!r} needs {', '.join(required)}; {name} is missing", origin
            )
    for name in (name for name in known if name in inputs):  # the targets' own shape comes first
        _check_shape(loss, inputs, name, positions, origin)
        _check_finite(name, inputs[name], origin)
    objection = loss.objection(inputs) if positions else None
    if objection is not None:
        raise DataError(f"loss {loss.name!r}: {objection}", origin)


def _check_shape(
    loss: Loss, inputs: Arrays, name: str, positions: int, origin: Origin | None
) -> None:
    shape, targets = inputs[name].shape, inputs["target_tokens"].shape
    if len(shape) == 0 or shape[0] != positions:
        count = shape[0] if shape else "a single number"
        raise DataError(
            f"{name} needs one value per position: the input has {positions} and it has {count}; "
            "media count as many positions as TrainingClient.datum says",
            origin,
        )
    if name == "target_tokens":
        ranks = [{1: "(N,)", 2: "(N, K)"}[rank] for rank in loss.target_ranks]
        if len(shape) not in loss.target_ranks:
            raise DataError(
                f"loss {loss.name!r} takes target_tokens of shape {' or '.join(ranks)}; they are "
                f"{shape}",
                origin,
            )
        return
    wanted = targets if name in loss.per_target else (positions,)
    if shape != wanted:
        raise DataError(
            f"{name} must have the shape {wanted} for loss {loss.name!r} and targets of shape "
            f"{targets}; it is {shape}",
            origin,
        )


def _check_finite(name: str, values: NDArray[Any], origin: Origin | None) -> None:
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise DataError(
            f"{name} must be finite; it is {values[at]} at position {at[0]}: give positions that "
            "are not learned the value 0",
            origin,
        )
