"""All that a run needs besides its weights to go on exactly: taken from it, and put back.

What is sharded is gathered when it is taken, and cut again when it is put back, so that a state
does not know on how many ranks it was made.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.trainer.checkpoint import State, capture, check_state
from plait.trainer.engine.runs import Run
from plait.trainer.optimiser import ADAM_W, make_optimizer
from plait.trainer.ranks.sharding import cut_like, is_sharded, part_like, whole, whole_like


def state_of(run: Run, **extra: Any) -> State:
    """The present state, and what the caller keeps beside it; collective."""
    gradients = run.sum_over_ranks()
    state = capture(run.optimizer, run.steps, torch.tensor([run.seed, run.passes]), **extra)
    if run.optimizer is not None:
        held = state.optimizer["state"]
        gathered = _changed(run, run.optimizer, held, lambda t, p: _kept(whole_like(t, p), run))
        state.optimizer |= {"state": gathered}
    state.parameters = _names(run)
    state.pending_weight = run.pending_weight
    state.gradients = {
        name: _kept(whole(gradient), run)
        for (_, name, _), gradient in zip(run.trainable, gradients, strict=True)
        if gradient is not None
    }
    return state


def _names(run: Run) -> list[str]:
    return [name for _, name, _ in run.trainable]


def _kept(tensor: Tensor, run: Run) -> Tensor:
    """A copy in the memory of rank 0's host, which no later step changes; nothing on others."""
    if run.group.rank > 0:
        return tensor.new_empty(0)
    return tensor.detach().to("cpu", copy=True)


def check(run: Run, folder: Path, state: State | None) -> None:
    """Refuse a state that cannot be put into this run.

    Raises:
        CheckpointError: there is none, or it is of other parts.
        ConfigError: its optimiser cannot step on shards, and there are some.
    """
    kind = ADAM_W if state is None else state.kind
    run.refuse_on_shards(kind)
    check_state(folder, state, make_optimizer(run.stepped, kind), _names(run))


def restore(run: Run, state: State) -> None:
    """Go on from a state that `check` has passed. Pending gradients are rank 0's."""
    run.steps, run.failure, run.spoilt = state.step, None, None
    run.seed, run.passes = (int(number) for number in state.random)
    run.clear()
    first = run.group.rank == 0
    run.pending_weight = state.pending_weight if first else 0.0
    run.gradients = [
        cut_like(state.gradients[name], parameter)
        if name in state.gradients and (first or is_sharded(parameter))
        else None
        for _, name, parameter in run.trainable
    ]
    run.optimizer = None
    if state.optimizer["param_groups"]:
        run.optimizer = make_optimizer(run.stepped, state.kind)
        held = _changed(run, run.optimizer, state.optimizer["state"], part_like)
        run.optimizer.load_state_dict({**state.optimizer, "state": held})


def _changed(
    run: Run,
    optimizer: torch.optim.Optimizer,
    held: dict[int, dict[str, Any]],
    change: Callable[[Tensor, Tensor], Tensor],
) -> dict[int, dict[str, Any]]:
    """The optimiser's tensors, each changed as its parameter is cut.

    Args:
        held: By the number that torch gives a parameter: its place in the groups.
    """
    pairs = zip(run.stepped, run.trainable, strict=True)
    cut = {id(mine): parameter for (*_, mine), (*_, parameter) in pairs}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        number: {
            name: change(value, cut[id(ordered[number])]) if torch.is_tensor(value) else value
            for name, value in values.items()
        }
        for number, values in held.items()
    }
