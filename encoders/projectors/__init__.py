"""Pools, which make a grid smaller, and projectors, which map features to the language model."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from plait.encoders.projectors.base import Projector
from plait.encoders.projectors.joining import Conv, Stack
from plait.encoders.projectors.perceiver import Perceiver
from plait.encoders.projectors.pools import GridPool, KeepGrid, Pool, PoolChain, TimePool, pool_of
from plait.encoders.projectors.simple import Identity, Linear, Mlp
from plait.errors import ConfigError, UnknownNameError

__all__ = [
    "POOLS",
    "PROJECTORS",
    "GridPool",
    "KeepGrid",
    "Pool",
    "PoolChain",
    "Projector",
    "TimePool",
    "create_pool",
    "create_projector",
    "pool_of",
]

PROJECTORS: dict[str, Callable[..., Projector]] = {
    "linear": Linear,
    "mlp": Mlp,
    "identity": Identity,
    "stack": Stack,
    "conv": Conv,
    "perceiver": Perceiver,
}
POOLS: dict[str, type[Pool]] = {"keep": KeepGrid, "grid": GridPool, "time": TimePool}


def create_projector(
    name: str,
    inputs: int,
    outputs: int,
    *,
    embedding_std: float,
    generator: torch.Generator,
    **options: Any,
) -> Projector:
    """A projector by name.

    Args:
        inputs: The encoder's width.
        outputs: The language model's hidden size.
        embedding_std: The standard deviation of the language model's embedding table.
        generator: A CPU generator; the only source of the initial weights.
        options: Of the projector itself.

    Raises:
        UnknownNameError: no projector has this name.
        ConfigError: it does not take these options.
    """
    if name not in PROJECTORS:
        raise UnknownNameError("projector", name, PROJECTORS)
    make = PROJECTORS[name]
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of projector {name!r}", option, list(known)[4:])
    return make(inputs, outputs, embedding_std, generator, **options)


def create_pool(name: str, **options: Any) -> Pool:
    """A pool by name: `create_pool("grid", height=3, width=3)`.

    Raises:
        UnknownNameError: no pool has this name.
        ConfigError: it does not take these options.
    """
    if name not in POOLS:
        raise UnknownNameError("pool", name, POOLS)
    try:
        return POOLS[name](**options)
    except TypeError as error:
        raise ConfigError(f"pool {name!r} does not take {options}: {error}") from error
