"""A key-value cache with a stretch per sequence, read through interval attention.

One buffer holds every sequence: sequence s owns keys [base[s], base[s] + capacity[s]). Prefill
writes packed prompts, decoding writes one token per sequence, and in both the keys a query sees
are one interval, so no padding and no mask is needed. Shape letters: G key heads, S slots of the
buffer, T positions written now, D head size.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _StretchLayer(CacheLayerMixin):
    """Keys and values of one layer, written at the slots that the cache points to."""

    keys: Tensor
    values: Tensor

    def __init__(self, owner: "StretchCache") -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        size = self.owner.size
        self.keys = key_states.new_zeros(1, key_states.shape[1], size, key_states.shape[3])
        self.values = value_states.new_zeros(1, value_states.shape[1], size, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (1, G, T, D) at the current slots; returns the whole buffer (1, G, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[:, :, self.owner.slots] = key_states
        self.values[:, :, self.owner.slots] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.size, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.size

    def get_max_cache_shape(self) -> int:
        return self.owner.size


class StretchCache(Cache):
    """Room for sequences of the given capacities; `slots` (T,) says where the next keys go."""

    def __init__(self, layers: int, capacities: list[int]) -> None:
        self.base = torch.tensor([0, *capacities]).cumsum(0)[:-1]
        self.size = sum(capacities)
        self.slots = torch.empty(0, dtype=torch.long)
        super().__init__(layers=[_StretchLayer(self) for _ in range(layers)])

    def copy_stretch(self, source: int, target: int, length: int) -> None:
        """Give sequence `target` the first `length` keys of sequence `source`."""
        a, b = int(self.base[source]), int(self.base[target])
        for layer in cast(list[_StretchLayer], self.layers):
            layer.keys[:, :, b : b + length] = layer.keys[:, :, a : a + length]
            layer.values[:, :, b : b + length] = layer.values[:, :, a : a + length]
