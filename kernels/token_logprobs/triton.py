"""The output layer on a GPU: a product, one Triton kernel over its logits, a product.

Logits are float32 even where the inputs have 16 bits: a bf16 logit of 20 is off by up to 0.06, and
so would be the ratio of two policies. Every sum has one order, without atomics, so repetitions
give the same bits.

Shape letters: C positions of a chunk, H hidden size, V vocabulary, K targets of a position.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from plait.kernels.token_logprobs.head import Shaping, Slopes, Statistics
from plait.kernels.token_logprobs.triton_kernels import (
    gradient_kernel,
    launch_of,
    statistics_kernel,
)

CHUNK_BYTES = 2 << 30
"""Logits and their gradient held at once where memory is plenty: 2,600 rows of 128k tokens, so
that the products are large enough for the tensor cores."""

WEIGHT_ROWS = 8192
"""Rows of dL/d weight that one product gives, before they are added up in float32."""


def rows_of(length: int, vocabulary: int, element_bytes: int, free_bytes: int) -> int:
    """Positions of a chunk: what a quarter of the free memory holds, evenly spread.

    With 8 GB free or more the answer depends on sizes alone, so that a run and its repetition
    cut their chunks alike.

    Args:
        element_bytes: Of one logit, its gradient included.
        free_bytes: What the device could still give, cached blocks included.
    """
    held = max(1, min(CHUNK_BYTES, free_bytes // 4) // (vocabulary * element_bytes))
    if held >= length:
        return max(1, length)
    number = -(-length // held)
    even = -(-length // number)
    multiple = 64 if held >= 64 else 1  # whole tiles for the products, where there is room
    return min(-(-even // multiple) * multiple, held // multiple * multiple)


class Head:
    """See `head.Head`. Logits are held raw; the kernels shape them while they read."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shaping: Shaping
    ) -> None:
        self._weight = weight
        self._bias = None if bias is None else bias.float()
        self._shaping = shaping
        # A float32 gradient overwrites its logits; a shorter one needs a place of its own.
        own = hidden.dtype != torch.float32
        element_bytes = 4 + (hidden.element_size() if own else 0)
        self.rows = rows_of(len(hidden), len(weight), element_bytes, _free_bytes(hidden.device))
        self._logits = hidden.new_empty(self.rows, len(weight), dtype=torch.float32)
        self._gradient = hidden.new_empty(self.rows, len(weight)) if own else self._logits

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._logits[: len(hidden)]
        _product(hidden, self._weight.T, logits)
        if self._bias is not None:
            logits += self._bias
        return logits

    def statistics(self, logits: Tensor, ids: Tensor, entropy: bool) -> Statistics:
        length, vocabulary = logits.shape
        lse = torch.empty(length, dtype=torch.float32, device=logits.device)
        spread = torch.empty_like(lse) if entropy else None
        picked = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
        ids = ids.contiguous()
        launch = launch_of(vocabulary)
        with _device_of(logits):
            statistics_kernel[(length,)](
                logits,
                ids,
                lse,
                picked,
                lse if spread is None else spread,
                self._shaping.softcap or 1.0,
                1.0 / self._shaping.temperature,
                vocabulary=vocabulary,
                count=ids.shape[1],
                capped=self._shaping.softcap is not None,
                with_entropy=entropy,
                block=launch.block,
                num_warps=launch.warps,
            )
        return Statistics(lse, picked, spread)

    def gradient(
        self, logits: Tensor, ids: Tensor, slopes: Slopes, lse: Tensor, entropy: Tensor | None
    ) -> Tensor:
        length, vocabulary = logits.shape
        gradient = self._gradient[:length]
        with_entropy = slopes.entropy is not None
        launch = launch_of(vocabulary)
        with _device_of(logits):
            gradient_kernel[(length, -(-vocabulary // launch.block))](
                logits,
                gradient,
                ids.contiguous(),
                slopes.logprobs.contiguous(),
                lse,
                entropy if with_entropy else lse,
                slopes.entropy if with_entropy else lse,
                self._shaping.softcap or 1.0,
                1.0 / self._shaping.temperature,
                vocabulary=vocabulary,
                count=ids.shape[1],
                capped=self._shaping.softcap is not None,
                with_entropy=with_entropy,
                block=launch.block,
                num_warps=launch.warps,
            )
        return gradient

    def to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        torch.mm(gradient, self._weight, out=out)

    def add_to_weight(self, gradient: Tensor, hidden: Tensor, total: Tensor) -> None:
        if gradient.dtype == torch.float32:
            total.addmm_(gradient.T, hidden)
            return
        # No release of torch that we support adds a 16-bit product to a float32 sum for certain.
        product = total.new_empty(min(WEIGHT_ROWS, len(total)), total.shape[1])
        for start in range(0, len(total), WEIGHT_ROWS):
            part = total[start : start + WEIGHT_ROWS]
            rows = product[: len(part)]
            _product(gradient[:, start : start + WEIGHT_ROWS].T, hidden, rows)
            part += rows


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b into a float32 `out`, summed in float32 whatever the inputs' type."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # under Triton's interpreter; torch has no such product on a CPU
        torch.mm(a.float(), b.float(), out=out)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; here that is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _free_bytes(device: torch.device) -> int:
    """What the device could still give: unused, or kept by torch without a tensor in it."""
    if device.type != "cuda":
        return 4 * CHUNK_BYTES
    unused, _ = torch.cuda.mem_get_info(device)
    return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
