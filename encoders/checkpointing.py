"""Layers that are computed again in the backward pass, instead of keeping their activations."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from plait.encoders.attention import remembered


def switch_on(module: nn.Module) -> bool:
    """Checkpoint every transformers model inside of `module`; False where there is none that can.

    Takes effect in training mode.
    """
    models = [one for one in module.modules() if getattr(one, "supports_gradient_checkpointing", 0)]
    outermost = models[:1]
    for model in outermost:
        enable: Any = model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": _contexts})
    return bool(outermost)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For a layer's forward, and for the one in the backward pass: what the layer may see is told
    by a context that has ended then."""
    return nullcontext(), remembered()
