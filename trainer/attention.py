"""Interval attention as a transformers attention implementation named "plait"."""

from typing import Any

from torch import Tensor, nn

from plait.errors import ModelError
from plait.kernels.interval_attention import Intervals, interval_attention

NAME = "plait"

_CHANGES_THE_RESULT = ("softcap", "s_aux", "position_bias")
"""Keywords some families pass that this path does not compute yet."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    visible: Intervals | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, G, S, D) -> (1, T, H, D), the form transformers asks.

    Raises:
        ModelError: no intervals reached this layer, or the layer asks for what is not computed.
    """
    if visible is None:
        raise ModelError(
            f"{type(module).__name__} attends without intervals: its model drops the keyword "
            "`visible`; this family cannot be packed"
        )
    for name in _CHANGES_THE_RESULT:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} asks attention for {name!r}, which interval attention "
                "does not compute; use a family without it"
            )
    if dropout:
        raise ModelError(
            f"attention dropout must be 0; it is {dropout}: set attention_dropout to 0 in the "
            "language model's config.json"
        )
    out, _ = interval_attention(
        query[0], key[0], value[0], visible, scale=scaling, window=sliding_window
    )
    return out.transpose(0, 1)[None].contiguous(), None


def register() -> None:
    """Make "plait" a valid `attn_implementation`; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The intervals say it all."""
