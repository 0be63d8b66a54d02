"""Runs that have had nothing to do for a while: what they keep beside weights is in host memory.

That is the optimiser's state and pending gradients, three quarters of what a run with Adam has; the
adapter stays, for snapshots and the sampler share its layers. On a CPU nothing moves.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from plait.trainer.engine.runs import Run

PATIENCE = 64
"""Rows that others compute before a run counts as idle."""

Places = list[tuple[Any, Any]]
"""Containers and keys of tensors that are away."""


def to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)


class Idle:
    """Moves runs' state away and back. A run that is away costs nothing until it is used again.

    Args:
        away: Moves a tensor to where it waits.
        back: Brings what `away` returned to a device, bit for bit as it was.
        device_types: Of the devices whose memory is short.
    """

    def __init__(
        self,
        away: Callable[[Tensor], Tensor] = to_host,
        back: Callable[[Tensor, torch.device], Tensor] = to_device,
        device_types: tuple[str, ...] = ("cuda",),
        patience: int = PATIENCE,
    ) -> None:
        self._away, self._back = away, back
        self._device_types, self._patience = device_types, patience
        self._rows = 0
        self._here: OrderedDict[str, tuple[Run, int]] = OrderedDict()
        """Runs that may become idle, those used longest ago first, and at which row they were."""

        self._gone: dict[str, Places] = {}

    def used(self, run: Run) -> None:
        """To be called before anything is done with a run; brings its state back."""
        device = run.model.device
        if device.type not in self._device_types or run.sharded:
            return
        gone = self._gone.get(run.name, [])
        while gone:  # one that memory does not suffice for stays away with the rest
            holder, key = gone[-1]
            holder[key] = self._back(holder[key], device)
            gone.pop()
        self._gone.pop(run.name, None)
        self._here[run.name] = run, self._rows
        self._here.move_to_end(run.name)

    def row_done(self) -> None:
        """Count a row, and move away what has waited for too many of them."""
        self._rows += 1
        while self._here:
            name, (run, row) = next(iter(self._here.items()))
            if self._rows - row <= self._patience:
                return
            del self._here[name]
            self._gone[name] = list(_places(run))
            for holder, key in self._gone[name]:
                holder[key] = self._away(holder[key])

    def forget(self, name: str) -> None:
        """A run is gone for good."""
        self._here.pop(name, None)
        self._gone.pop(name, None)


def _places(run: Run) -> Iterator[tuple[Any, Any]]:
    """Where a run has state on its device: counters of steps are in host memory as they are."""
    device = run.model.device
    for number, gradient in enumerate(run.gradients):
        if gradient is not None:
            yield run.gradients, number
    for values in run.optimizer.state.values() if run.optimizer is not None else ():
        for key, value in values.items():
            if torch.is_tensor(value) and value.ndim and value.device.type == device.type:
                yield values, key
