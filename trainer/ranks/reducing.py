"""Gradients of all ranks, summed: sums stay sums, the mean is `optim_step`'s to take."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plait.trainer.ranks.group import Group
from plait.trainer.ranks.sharding import is_sharded, local


def summed(
    gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], group: Group
) -> list[Tensor | None]:
    """The gradients of all ranks together, in place; None where no rank has one. Collective.

    What is sharded was summed by the backward pass itself.
    """
    if group.size == 1:
        return list(gradients)
    whole = [number for number, p in enumerate(parameters) if not is_sharded(p)]
    there = torch.tensor([float(gradients[i] is not None) for i in whole], device=group.device)
    group.sum([there])
    made = list(gradients)
    found = [i for i, count in zip(whole, there.tolist(), strict=True) if count]
    for i in found:
        if made[i] is None:
            made[i] = torch.zeros_like(parameters[i])
    group.sum([gradient for i in found if (gradient := made[i]) is not None])
    return made


def summed_number(value: float, group: Group) -> float:
    """Collective."""
    if group.size == 1:
        return value
    total = torch.tensor([value], dtype=torch.float64, device=group.device)
    group.sum([total])
    return float(total)


def norm(gradients: Sequence[Tensor], group: Group) -> float:
    """The norm of all gradients together, as rank 0 has it: clipping by another one's round-off
    (ranks may have other numbers of threads) would drive their weights apart. Collective."""
    if not gradients:
        return 0.0
    norms = [g.norm() for g in gradients if not is_sharded(g)]
    parts = [local(g).norm() for g in gradients if is_sharded(g)]
    if parts:
        square = torch.stack(parts).square().sum()[None]
        group.sum([square])
        norms.append(square[0].sqrt())
    total = float(torch.linalg.vector_norm(torch.stack(norms)))
    return summed_number(total if group.rank == 0 else 0.0, group)
