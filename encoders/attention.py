"""Interval attention as a transformers attention implementation named "plait".

For language models and towers alike. What a layer may see reaches it as the keyword `visible` of
the model's forward, or, where a family drops keywords it does not know (SigLIP does, silently),
through `attending`. A layer that is told neither raises.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from plait.errors import ModelError
from plait.kernels.interval_attention import Intervals, interval_attention, merge

NAME = "plait"

_NOT_COMPUTED = ("position_bias", "indices", "block_indices")
"""Keywords of attention that say what a layer may see, or how much, in another way."""


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


def remembered() -> AbstractContextManager[None]:
    """What layers may see here and now, for another time."""
    visible = _VISIBLE.get()
    return nullcontext() if visible is None else attending(visible)


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
    """What `from_pretrained` needs so that a tower attends through here, without dropout."""
    register()
    switch_off_dropout(config)
    return {"attn_implementation": NAME}


def switch_off_dropout(config: Any) -> None:
    """Attention's: the kernels have none, and a tower that trains is regularised elsewhere."""
    for name in ("attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "Tensor | _Window | None",
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
    _refuse(kind, dropout, kwargs)
    window = _window(kind, attention_mask, sliding_window)
    if isinstance(visible, Everything):
        hidden = {
            "a cap": softcap,
            "sinks": s_aux,
            "a window": window,
            "causality": getattr(module, "is_causal", False) or kwargs.get("is_causal"),
        }
        _refuse_hidden(kind, hidden)
        return _attend_everything(query, key, value, scaling), None
    batch, _, length, _ = query.shape
    try:
        out, lse = interval_attention(
            _one_row(query), _one_row(key), _one_row(value), visible,
            scale=scaling, window=window, softcap=softcap,
        )  # fmt: skip
    except ValueError as error:
        raise ModelError(f"{kind}: {error}") from error
    if s_aux is not None:  # a key of its own that has no value
        sink = s_aux.to(lse.dtype)[:, None].expand_as(lse)
        out, _ = merge(out, lse, torch.zeros_like(out), sink)
    return out.transpose(0, 1).reshape(batch, length, len(out), -1), None


def _one_row(tensor: Tensor) -> Tensor:
    """(B, H, T, D) -> (H, B T, D), without a copy for a batch of one."""
    return tensor[0] if len(tensor) == 1 else tensor.transpose(0, 1).flatten(1, 2)


def _refuse(kind: str, dropout: float, keywords: dict[str, Any]) -> None:
    for name in _NOT_COMPUTED:
        if keywords.get(name) is not None:
            raise _not_computed(kind, repr(name))
    if dropout:
        raise ModelError(
            f"attention dropout must be 0; it is {dropout}: set attention_dropout to 0 in the "
            "model's config.json"
        )


def _window(kind: str, mask: "Tensor | _Window | None", told: int | None) -> int | None:
    """Keys that a layer's window holds: as its mask has it, or its own setting."""
    if mask is None:
        return told
    if isinstance(mask, Tensor):
        raise _not_computed(kind, "a mask of its own")
    if mask.refusal is not None:
        raise _not_computed(kind, mask.refusal)
    if told not in (None, mask.keys):
        raise _not_computed(kind, f"a mask of {mask.keys} keys beside a window of {told}")
    return mask.keys


def _not_computed(kind: str, what: str) -> ModelError:
    return ModelError(
        f"{kind} asks attention for {what}, which interval attention does not compute; use a "
        "family without it"
    )


def _refuse_hidden(kind: str, hidden: dict[str, Any]) -> None:
    found = [name for name, value in hidden.items() if value is not None and value is not False]
    if found:
        raise ModelError(
            f"{kind} hides something from its positions ({', '.join(found)}): it is no layer in "
            "which everything is seen; give it intervals"
        )


def _attend_everything(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """torch's own kernel, which is at its fastest where nothing is hidden."""
    groups = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=groups)
    return out.transpose(1, 2).contiguous()


def register() -> None:
    """Make "plait" a valid `attn_implementation`; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


class _Window(NamedTuple):
    """Stands for the mask of a layer with local attention. Some families tell a layer's window
    in its mask alone (Phimoe, Qwen2-MoE).
    """

    keys: int
    """A query's own included."""

    refusal: str | None
    """What it is, where it is no causal sliding window."""


def _mask(
    *_: Any, config: Any = None, local_size: int | None = None, **keywords: Any
) -> _Window | None:
    """What transformers hands to layers as their mask: intervals say all but the window."""
    if local_size is None:
        return None
    refusal = None
    if local_size != getattr(config, "sliding_window", None):
        refusal = "attention in chunks"
    elif "allow_is_bidirectional_skip" in keywords:
        refusal = "a window to both sides"
    return _Window(local_size, refusal)
