"""From what a user calls a loss to what the engine computes.

Shape letters: N positions of a datum, K soft targets of a position.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from plait.errors import ConfigError, DataError
from plait.loss_inputs import INPUTS
from plait.trainer.losses import Loss, config_of, loss_named
from plait.trainer.model import Objective
from plait.types import Datum, TensorData


def objective_of(loss_fn: object, config: Mapping[str, float] | None) -> Objective:
    """The loss with all its settings.

    Raises:
        UnknownNameError: nobody registered the name, or the loss has no such setting.
        ConfigError: it is no loss, or a setting is no number that it may be.
    """
    if isinstance(loss_fn, str):
        loss = loss_named(loss_fn)
    elif isinstance(loss_fn, Loss):
        loss = loss_fn
    elif callable(loss_fn):
        name = getattr(loss_fn, "__name__", "a function")
        optional = tuple(one for one in INPUTS if one != "target_tokens")
        loss = Loss(name=name, function=loss_fn, inputs=(), optional=optional)
    else:
        raise ConfigError(f"loss_fn must be a name, a Loss or a function; it is {loss_fn!r}")
    return Objective(loss, config_of(loss, config))


def evened(data: Sequence[Datum], loss: Loss) -> Sequence[Datum]:
    """Data of one shape of targets: (N,) all of them, or (N, K) with the largest K of any.

    Raises:
        DataError: a loss over pairs was given an odd number, or targets of different K cannot be
            filled up with ones of weight 0.
    """
    if loss.paired and len(data) % 2:
        raise DataError(
            f"loss {loss.name!r} reads pairs, chosen and rejected by turns; it was given "
            f"{len(data)} data"
        )
    shapes = [tuple(datum.loss_fn_inputs["target_tokens"].shape[1:]) for datum in data]
    if len(set(shapes)) == 1:
        return data
    if loss.per_target != ("weights",):
        raise DataError(
            f"loss {loss.name!r} needs as many targets at each position of all data of a call; "
            f"some have {min(shapes)} and some {max(shapes)}: send them apart"
        )
    most = max(shape[0] for shape in shapes if shape)
    return [_widened(datum, most) for datum in data]


def _widened(datum: Datum, most: int) -> Datum:
    """Targets (N, `most`); those added have weight 0."""
    inputs = dict(datum.loss_fn_inputs)
    targets = inputs["target_tokens"].to_numpy()
    weights = inputs.get("weights")
    given = np.ones(targets.shape, np.float32) if weights is None else weights.to_numpy()
    for name, values in (("target_tokens", targets), ("weights", given)):
        rows = values.reshape(len(values), -1)
        filled = np.pad(rows, ((0, 0), (0, most - rows.shape[1])))
        inputs[name] = TensorData.from_numpy(filled)
    return Datum(datum.model_input, inputs)
