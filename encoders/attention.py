"""Interval attention as a transformers attention implementation named "plait".

For language models and towers alike. What a layer may see reaches it as the keyword `visible` of
the model's forward, or, where a family drops keywords it does not know (SigLIP does, silently),
through `attending`. A layer that is told neither raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from plait.errors import ModelError
from plait.kernels.interval_attention import Intervals, interval_attention, merge

NAME = "plait"


class Everything(Enum):
    """Every position of an item sees every other, and each row of the batch is an item."""

    EVERYTHING = "everything"


EVERYTHING = Everything.EVERYTHING
Visible = Intervals | Everything

_VISIBLE: ContextVar[Visible | None] = ContextVar("visible", default=None)


@contextmanager
def attending(visible: Visible) -> Iterator[None]:
    """What the layers of a tower called inside may see, where no keyword says it.

    A batch of rows is read as one row of them all, one behind another.
    """
    token = _VISIBLE.set(visible)
    try:
        yield
    finally:
        _VISIBLE.reset(token)


def stretches(lengths: list[int], room: int, device: torch.device) -> Intervals:
    """Rows of `room` positions of which the first `lengths[b]` hold an item that sees itself.

    Positions of padding see the item before them: what they become is dropped.
    """
    start = torch.arange(len(lengths)) * room
    stop = start + torch.tensor(lengths)
    lo, hi = start.repeat_interleave(room), stop.repeat_interleave(room)
    return Intervals(lo, hi).to(device)


def packed(lengths: list[int], device: torch.device) -> Intervals:
    """Items one behind another in a single row, each of which sees itself."""
    count = torch.tensor(lengths)
    stop = count.cumsum(0)
    lo, hi = (end.repeat_interleave(count) for end in (stop - count, stop))
    return Intervals(lo, hi).to(device)


def prepare_tower(config: Any) -> dict[str, str]:
    """What `from_pretrained` needs so that a tower attends through here.

    Attention dropout is switched off in `config`: the kernels have none, and a tower that trains
    is regularised elsewhere.
    """
    register()
    for name in ("attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return {"attn_implementation": NAME}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    visible: Visible | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, G, S, D) -> (B, T, H, D), as transformers asks.

    Args:
        softcap: As Gemma 2's `attn_logit_softcapping`.
        s_aux: (H,) attention sinks, as in gpt-oss.

    Raises:
        ModelError: nothing says what this layer may see, or it asks for what is not computed.
    """
    visible = _VISIBLE.get() if visible is None else visible
    kind = type(module).__name__
    if visible is None:
        raise ModelError(
            f"{kind} attends without intervals: its model drops the keyword `visible`; call it "
            "inside plait.encoders.attention.attending"
        )
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        odd = "a mask of its own" if attention_mask is not None else "'position_bias'"
        raise ModelError(
            f"{kind} asks attention for {odd}, which interval attention does not compute; use a "
            "family without it"
        )
    if dropout:
        raise ModelError(
            f"attention dropout must be 0; it is {dropout}: set attention_dropout to 0 in the "
            "model's config.json"
        )
    if isinstance(visible, Everything):
        return _attend_everything(module, query, key, value, scaling, softcap, s_aux), None
    batch, _, length, _ = query.shape
    out, lse = interval_attention(
        _one_row(query), _one_row(key), _one_row(value), visible,
        scale=scaling, window=sliding_window, softcap=softcap,
    )  # fmt: skip
    if s_aux is not None:  # a key of its own that has no value
        sink = s_aux.to(lse.dtype)[:, None].expand_as(lse)
        out, _ = merge(out, lse, torch.zeros_like(out), sink)
    return out.transpose(0, 1).reshape(batch, length, len(out), -1), None


def _one_row(tensor: Tensor) -> Tensor:
    """(B, H, T, D) -> (H, B T, D), without a copy for a batch of one."""
    return tensor[0] if len(tensor) == 1 else tensor.transpose(0, 1).flatten(1, 2)


def _attend_everything(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """torch's own kernel, which is at its fastest where nothing is hidden."""
    if getattr(module, "is_causal", False) or softcap is not None or s_aux is not None:
        raise ModelError(
            f"{type(module).__name__} is no layer in which everything is seen; give it intervals"
        )
    groups = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=groups)
    return out.transpose(1, 2).contiguous()


def register() -> None:
    """Make "plait" a valid `attn_implementation`; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The intervals say it all."""
