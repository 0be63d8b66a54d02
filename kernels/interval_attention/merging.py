"""Joining two attentions of the same queries over different keys.

Shape letters: H heads, T queries, D head size.
"""

import torch
from torch import Tensor


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Two (H, T, D), (H, T) over disjoint keys -> those over all keys of both; differentiable.

    A shared prefix, an attention sink (out 0 and the sink as lse) and keys split over several
    kernels are such joins. Where both saw nothing (lse -inf), the result is 0 and -inf.

    Source: the update of online softmax (Milakov and Gimelshein 2018, algorithm 3).
    """
    high = torch.maximum(lse1, lse2).detach()
    nothing = high == -torch.inf
    high = high.masked_fill(nothing, 0)
    share1, share2 = (lse1 - high).exp(), (lse2 - high).exp()
    # Both shares are 0 where neither saw a key: 1 keeps the division and its gradient finite.
    total = (share1 + share2).masked_fill(nothing, 1)
    weight1, weight2 = (share1 / total)[..., None], (share2 / total)[..., None]
    out = (out1.float() * weight1 + out2.float() * weight2).to(out1.dtype)
    return out, (high + total.log()).masked_fill(nothing, -torch.inf)
