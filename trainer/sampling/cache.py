"""Keys and values of many sequences in one buffer of slots, read through interval attention.

A sequence owns a stretch of slots, so that the keys that a query sees are one interval: no
padding, no mask and no table of pages. Shape letters: G key heads, S slots, T positions written
now, D head size.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, written at the slots that the cache points to."""

    keys: Tensor
    values: Tensor

    def __init__(self, owner: "SlotCache") -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        size = self.owner.size
        # Zeros, not whatever memory holds: a mask does not hide a NaN.
        self.keys = key_states.new_zeros(1, key_states.shape[1], size, key_states.shape[3])
        self.values = value_states.new_zeros(1, value_states.shape[1], size, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (1, G, T, D) at the current slots; returns the whole buffer (1, G, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # A mask does not hide a NaN: those of one run's weights would reach its neighbours, and
        # who gets its slots later. The sampler refuses what it reads of such weights.
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            held.index_copy_(2, self.owner.slots, states.nan_to_num(0.0, 0.0, 0.0))
        return self.keys, self.values

    def grow(self, size: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (_longer(t, size) for t in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.size, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.size

    def get_max_cache_shape(self) -> int:
        return self.owner.size


def _longer(tensor: Tensor, size: int) -> Tensor:
    """(1, G, S, D) with S = `size`; what is added is 0."""
    longer = tensor.new_zeros(*tensor.shape[:2], size, tensor.shape[3])
    longer[:, :, : tensor.shape[2]] = tensor
    return longer


class SlotCache(Cache):
    """`size` slots in every layer; `slots` (T,), on the model's device, says where the next keys
    go. Buffers are made when the first keys arrive, whose type and number of heads they take.
    """

    def __init__(self, layers: int, size: int) -> None:
        self.size = size
        self.slots = torch.empty(0, dtype=torch.long)
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    def grow(self, size: int) -> None:
        """Add slots at the end; what is written stays."""
        if size > self.size:
            for layer in cast(list[_SlotLayer], self.layers):
                layer.grow(size)
            self.size = size  # last: where memory was short, nothing has changed

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the `length` slots from `source` on to `target` on."""
        if not length:
            return
        for layer in cast(list[_SlotLayer], self.layers):
            for held in (layer.keys, layer.values):
                held[:, :, target : target + length] = held[:, :, source : source + length]
