"""The differentiable operation, and the one place that says which machine computes it.

Shape letters: T positions, I inputs, O outputs, G adapters, r_g rank of adapter g.
"""

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from plait.kernels.grouped_lora import cpu
from plait.kernels.grouped_lora.machine import Adapters, Machine
from plait.kernels.grouped_lora.segments import Segments

ROUTES = ("cpu", "triton")


class _Plan(NamedTuple):
    machine: Machine
    scales: tuple[float, ...]
    segments: Segments


def grouped_lora(
    x: Tensor,
    base: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    segments: Segments,
    route: str | None = None,
) -> Tensor:
    """x (T, I), base (T, O), a[g] (r_g, I), b[g] (O, r_g) -> base + scales[g] x a[g]^T b[g]^T.

    The result (T, O) has the dtype of `base`. It is differentiable in x, base and every factor;
    gradients are the same bits at every repetition, and exactly zero for an adapter without
    positions.

    Args:
        segments: Which positions use which adapter.
        route: "cpu" (plain torch, any device) or "triton"; None takes Triton on a GPU.

    Raises:
        ValueError: shapes that do not fit, an adapter number without factors, an unknown route.
    """
    _check(x, base.shape, a, b, scales, segments)
    plan = _Plan(_machine(x, a, route), tuple(scales), segments)
    return _apply(plan, x, base, None, None, *a, *b)


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    segments: Segments,
    route: str | None = None,
) -> Tensor:
    """`grouped_lora` over base = x weight^T + bias with a frozen weight (O, I) and bias (O,).

    Saves the copy of the base output, and a sum of two gradients of x.

    Raises:
        ValueError: as `grouped_lora`, or a weight or bias that trains.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "the base of grouped_lora_linear must be frozen; call requires_grad_(False) on it, or "
            "use grouped_lora with the base output"
        )
    _check(x, (len(x), len(weight)), a, b, scales, segments)
    plan = _Plan(_machine(x, a, route), tuple(scales), segments)
    return _apply(plan, x, None, weight, bias, *a, *b)


def _apply(plan: _Plan, x: Tensor, *rest: Tensor | None) -> Tensor:
    with _no_autocast(x.device.type):
        result: Tensor = _GroupedLora.apply(plan, x, *rest)
    return result


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """The dtypes of the arguments say what is computed in which dtype."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _machine(x: Tensor, a: Sequence[Tensor], route: str | None) -> Machine:
    """The module that computes this call; Triton is imported only where it is used."""
    if route not in (None, *ROUTES):
        raise ValueError(f"a route of grouped LoRA is one of {', '.join(ROUTES)}; got {route!r}")
    if route == "cpu" or (route is None and not x.is_cuda):
        return cpu
    if route is None and importlib.util.find_spec("triton") is None:
        return cpu
    from plait.kernels.grouped_lora import triton

    highest = max((len(factor) for factor in a), default=0)
    if highest <= triton.LARGEST_RANK:
        return triton
    if route is None:
        return cpu
    raise ValueError(
        f"the Triton kernels take ranks up to {triton.LARGEST_RANK}; got {highest}: leave route out"
    )


def _check(
    x: Tensor,
    base: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    segments: Segments,
) -> None:
    if x.ndim != 2 or len(base) != 2 or not len(x) == base[0] == segments.length:
        raise ValueError(
            "grouped LoRA needs x (T, I) and base (T, O) of as many positions as the segments; "
            f"got {tuple(x.shape)}, {tuple(base)} and {segments.length} positions"
        )
    if not len(a) == len(b) == len(scales) > segments.highest:
        raise ValueError(
            f"every adapter needs a, b and a scale; got {len(a)}, {len(b)} and {len(scales)} for "
            f"adapters up to number {segments.highest}"
        )
    for g, (down, up) in enumerate(zip(a, b, strict=True)):
        fits = down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]
        if not fits or down.shape[1] != x.shape[1] or up.shape[0] != base[1]:
            raise ValueError(
                f"a[{g}] must be (rank, {x.shape[1]}) and b[{g}] ({base[1]}, rank); got "
                f"{tuple(down.shape)} and {tuple(up.shape)}"
            )


class _GroupedLora(torch.autograd.Function):
    """Inputs: plan, x, base or (frozen weight, frozen bias), then all a and all b."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        count = len(factors) // 2
        adapters = Adapters(factors[:count], factors[count:], plan.scales, plan.segments)
        if base is None:
            assert weight is not None
            out = linear(x, weight, bias)
        else:
            out = base.clone(memory_format=torch.contiguous_format)
        low = plan.machine.add(x.contiguous(), out, adapters)
        needed = ctx.needs_input_grad[5:]
        ctx.plan = plan
        ctx.like = x.shape, x.dtype, x.device
        ctx.save_for_backward(
            x if any(needed[:count]) else None,
            low if any(needed[count:]) else None,
            weight,
            *factors,
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with _no_autocast(grads[0].device.type):
            return _GroupedLora._gradients(ctx, grads[0])

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, *factors = ctx.saved_tensors
        count = len(factors) // 2
        plan = ctx.plan
        adapters = Adapters(factors[:count], factors[count:], plan.scales, plan.segments)
        grad = grad.contiguous()
        grad_x = None
        if ctx.needs_input_grad[1]:
            shape, dtype, device = ctx.like
            if weight is not None:
                grad_x = (grad @ weight).to(dtype)
            else:
                grad_x = torch.zeros(shape, dtype=dtype, device=device)
        x = None if x is None else x.contiguous()
        found_a, found_b = plan.machine.gradients(grad, x, grad_x, low, adapters)
        needed = ctx.needs_input_grad[5:]
        found = [*(found_a or [None] * count), *(found_b or [None] * count)]
        given = [
            None if value is None or not needs else value.to(factor.dtype)
            for value, needs, factor in zip(found, needed, factors, strict=True)
        ]
        grad_base = grad if ctx.needs_input_grad[2] else None
        return None, grad_x, grad_base, None, None, *given
