"""The operation's two functions, their checks, and which head computes them.

Shape letters: T positions, H hidden size, V vocabulary, K targets of a position.
"""

import importlib.util
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from plait.kernels.token_logprobs import adapted
from plait.kernels.token_logprobs.chunked import Scores, Wanted, WeightedNll
from plait.kernels.token_logprobs.head import HeadFactory, Shaping

ROUTES = ("cpu", "triton")


class Scored(NamedTuple):
    """What `token_logprobs` returns, in float32; None where not asked for."""

    logprobs: Tensor
    """Of the targets, in their shape."""
    entropy: Tensor | None
    """(T,) of each position's distribution, in nats."""
    top_logprobs: Tensor | None
    """(T, top_k), likeliest first."""
    top_ids: Tensor | None
    """(T, top_k) tokens of `top_logprobs`."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    top_k: int = 0,
    adapter: tuple[Tensor, Tensor] | None = None,
    route: str | None = None,
) -> Scored:
    """hidden (T, H), weight (V, H), targets (T,) or (T, K) -> logprobs of the targets.

    Never holds (T, V). `logprobs`, `entropy` and `top_logprobs` are differentiable, once, by
    `hidden` and `weight`; nothing is computed for the one that needs no gradient.

    Args:
        bias: (V,) of the output layer; frozen.
        softcap: Logits z become softcap * tanh(z / softcap).
        temperature: Divides the logits, after the cap.
        entropy: Also the entropies. With them, as with `top_k` or K > 1, the backward pass
            computes the logits again; logprobs alone over a frozen weight do without.
        top_k: Also so many likeliest tokens of each position.
        adapter: down (T, R) and up (V, R), whose product is added to the raw logits; the weight
            is frozen then, and `down` and `up` may train. Computed by the route "cpu".
        route: "cpu" (plain torch, any device) or "triton"; None takes Triton on a GPU.

    Raises:
        ValueError: shapes or types that do not fit, a bias that trains, an unknown route.
    """
    shaping = _checked(hidden, weight, targets, bias, softcap, temperature)
    head = _head(hidden, route)
    if adapter is not None:
        hidden, weight, head = _adapted(hidden, weight, adapter)
    if not 0 <= top_k <= len(weight):
        raise ValueError(f"top_k is from 0 to the vocabulary's {len(weight)}; got {top_k}")
    wanted = Wanted(
        head=head,
        shaping=shaping,
        hidden_gradient=torch.is_grad_enabled() and hidden.requires_grad,
        weight_gradient=torch.is_grad_enabled() and weight.requires_grad,
        entropy=entropy,
        top_k=top_k,
    )
    ids = targets[:, None] if targets.ndim == 1 else targets
    logprobs, *more = Scores.apply(hidden, weight, ids, bias, wanted)
    return Scored(logprobs.reshape(targets.shape), *more)


def weighted_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    adapter: tuple[Tensor, Tensor] | None = None,
    route: str | None = None,
) -> tuple[Tensor, Tensor]:
    """-sum(loss_weights * logprobs), and the logprobs, detached, in the targets' shape; float32.

    The loss is differentiable, once, by `hidden` and `weight`. Its weights being known, gradients
    are computed in this call, while the logits are there, and only scaled in the backward pass.
    hidden (T, H), weight (V, H), targets (T,) or (T, K).

    Args:
        loss_weights: In the shape of `targets`; frozen.
        bias, softcap, temperature, adapter, route: As in `token_logprobs`.

    Raises:
        ValueError: as in `token_logprobs`, or loss weights that train or do not fit.
    """
    shaping = _checked(hidden, weight, targets, bias, softcap, temperature)
    head = _head(hidden, route)
    if adapter is not None:
        hidden, weight, head = _adapted(hidden, weight, adapter)
    if loss_weights.shape != targets.shape or loss_weights.requires_grad:
        raise ValueError(
            "loss weights are frozen and have the targets' shape; got "
            f"{tuple(loss_weights.shape)} for {tuple(targets.shape)}; use token_logprobs where "
            "they train"
        )
    wanted = Wanted(
        head=head,
        shaping=shaping,
        hidden_gradient=torch.is_grad_enabled() and hidden.requires_grad,
        weight_gradient=torch.is_grad_enabled() and weight.requires_grad,
    )
    ids = targets.reshape(len(targets), -1) if len(targets) else targets.reshape(0, 1)
    weights = loss_weights.float().reshape(ids.shape)
    loss, logprobs = WeightedNll.apply(hidden, weight, ids, weights, bias, wanted)
    return loss, logprobs.reshape(targets.shape)


def _adapted(
    hidden: Tensor, weight: Tensor, adapter: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, HeadFactory]:
    """What the chunks are given where an adapter stands beside the weight."""
    down, up = adapter
    if down.shape != (len(hidden), up.shape[1]) or len(up) != len(weight):
        raise ValueError(
            f"an adapter is down ({len(hidden)}, R) and up ({len(weight)}, R); got "
            f"{tuple(down.shape)} and {tuple(up.shape)}"
        )
    if weight.requires_grad:
        raise ValueError("beside an adapter the weight is frozen; this one trains")
    joined = torch.cat([hidden, down.to(hidden.dtype)], dim=1)
    return joined, up, partial(adapted.Head, frozen=weight)


def _head(hidden: Tensor, route: str | None) -> HeadFactory:
    """The head that computes this call; Triton is imported only where it is used."""
    if route is None:
        triton_here = hidden.is_cuda and importlib.util.find_spec("triton") is not None
        route = "triton" if triton_here else "cpu"
    if route == "triton":
        from plait.kernels.token_logprobs import triton

        return triton.Head
    if route == "cpu":
        from plait.kernels.token_logprobs import cpu

        return cpu.Head
    raise ValueError(f"a route of token logprobs is one of {', '.join(ROUTES)}; got {route!r}")


def _checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> Shaping:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "token logprobs need hidden (T, H) and weight (V, H); got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.ndim not in (1, 2) or len(targets) != len(hidden):
        raise ValueError(
            f"targets are (T,) or (T, K) with T = {len(hidden)}; got {tuple(targets.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight have one type; got {hidden.dtype} and {weight.dtype}: cast one"
        )
    if bias is not None and (bias.requires_grad or bias.shape != weight.shape[:1]):
        raise ValueError(
            f"the output bias is ({len(weight)},) and frozen (bias.requires_grad_(False)); got "
            f"{tuple(bias.shape)}, requires_grad={bias.requires_grad}"
        )
    if temperature <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"temperature and softcap are positive; got {temperature} and {softcap}")
    return Shaping(None if softcap is None else float(softcap), float(temperature))
