"""The logits of few positions, for sampling: those that the operation normalises.

Shape letters: P positions, H hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn

from plait.kernels.token_logprobs.cpu import BLOCK


def output_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    softcap: float | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """hidden (P, H), weight (V, H) -> (P, V) in float32, never rounded to a 16-bit type.

    Args:
        added: (P, V) float32 of adapters, before the cap.

    Rounded, a logit of 20 would be off by up to 0.06, and so would a sample's logprob be from the
    one that training finds for it.
    """
    logits = _products(hidden, weight)
    if added is not None:
        logits = logits + added
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def _products(hidden: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == torch.float32:
        return nn.functional.linear(hidden, weight)
    if weight.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # A block of the vocabulary at a time, as in `cpu.Head`: the whole weight in float32 would take
    # twice the memory that it has.
    wide = hidden.float()
    return torch.cat([wide @ block.float().T for block in torch.split(weight, BLOCK)], -1)
