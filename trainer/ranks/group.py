"""Which process this is among those that compute together, and what they tell one another."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning_utilities.core import rank_zero
from torch import Tensor

from plait.errors import ConfigError, ModelError

StrategyName = Literal["ddp", "fsdp"]

STRATEGIES: dict[str, str] = {
    "ddp": "every rank has the whole model; gradients are summed before a step",
    "fsdp": "the layers of the language model are sharded (FSDP2); what is small stays whole",
}

_TIMEOUT = timedelta(minutes=15)
"""For one rank to wait for another: decoding films takes its time."""

_BUCKET = 25_000_000
"""Bytes that are summed at once: as in torch's DDP."""


class Group:
    """One process alone; the base of several. It says nothing to anybody."""

    rank, size = 0, 1
    sharded = False
    """Whether language models are cut into shards, so that all ranks must read together."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(Fabric(accelerator="auto", devices=1).device)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, in place; collective."""

    def all_true(self, mine: bool) -> bool:
        """Whether all ranks say so; collective where models are sharded, else one's own word."""
        return mine

    def shard(self, module: Any) -> None:
        """Cut a model's layers into shards; collective."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the others; idempotent."""


ALONE = Group()
"""Nobody else takes part."""


class UndoneError(Exception):
    """A row that was well, beside which another rank's failed: nothing of it counts."""


class OutOfStepError(ModelError):
    """A rank failed where the others wait for it: they have to be started again."""


@contextmanager
def all_or_none(group: Group) -> Iterator[None]:
    """All ranks come through the block, or none of them; collective where models are sharded.

    Raises:
        UndoneError: this rank came through, and another did not.
    """
    error: Exception | None = None
    try:
        yield
    except OutOfStepError:  # there is nobody left to agree with
        raise
    except Exception as one:
        error = one
    if not group.all_true(error is None):
        raise error or UndoneError


@dataclass(frozen=True, slots=True)
class Seat:
    """All that a process needs to join a group: plain data, given to it when it is started."""

    rank: int
    size: int
    port: int
    strategy: str
    accelerator: str = "auto"


class Ranks(Group):
    """Several processes on this machine, over torch.distributed through Lightning's Fabric.

    Args:
        shard: Cuts the layers of a model, given the mesh; of "fsdp" alone.

    Raises:
        ConfigError: torch.distributed is in use in this process already.
    """

    def __init__(self, seat: Seat, shard: Callable[[Any, Any], Any]) -> None:
        refuse_others()
        self.rank, self.size = seat.rank, seat.size
        self.sharded = seat.strategy == "fsdp"
        strategy: Strategy = (
            ModelParallelStrategy(
                shard, data_parallel_size=seat.size, tensor_parallel_size=1, timeout=_TIMEOUT
            )
            if self.sharded
            else DDPStrategy(timeout=_TIMEOUT)
        )
        self._fabric = Fabric(
            accelerator=seat.accelerator,
            devices=seat.size,
            strategy=strategy,
            plugins=[_Environment(seat)],
        )
        with _quiet(), _environment_kept():
            self._fabric.launch()

    @property
    def device(self) -> torch.device:
        return torch.device(self._fabric.device)

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._fabric.all_reduce(flat, reduce_op="sum")
            pieces = torch.split(flat, [tensor.numel() for tensor in bucket])
            for tensor, piece in zip(bucket, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    def all_true(self, mine: bool) -> bool:
        if not self.sharded:
            return mine
        objections = torch.tensor([0 if mine else 1], device=self.device)
        self._fabric.all_reduce(objections, reduce_op="sum")
        return not int(objections)

    def shard(self, module: Any) -> None:
        self._fabric.setup_module(module)

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def refuse_others() -> None:
    """
    Raises:
        ConfigError: torch.distributed is in use in this process already.
    """
    if torch.distributed.is_initialized():
        raise ConfigError(
            "several devices need torch.distributed, which this process uses already: close "
            "the other client, or start without torchrun; Plait starts its ranks itself"
        )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together no larger than a bucket, unless one alone is."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        full = size + tensor.nbytes > _BUCKET
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


class _Environment(ClusterEnvironment):  # type: ignore[misc]  # Lightning is untyped here
    """Tells Lightning that the processes are there already."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self._seat = seat

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self._seat.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._seat.size

    def set_world_size(self, size: int) -> None:
        del size

    def global_rank(self) -> int:
        return self._seat.rank

    def set_global_rank(self, rank: int) -> None:
        del rank

    def local_rank(self) -> int:
        return self._seat.rank

    def node_rank(self) -> int:
        return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning announces every process; users have not asked for any."""
    loggers = [logging.getLogger("lightning.fabric"), rank_zero.log]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Lightning writes where to meet into the environment, which is the user's."""
    before = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
