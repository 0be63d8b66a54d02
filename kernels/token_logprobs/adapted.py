"""An output layer with a low-rank adapter beside its frozen weight.

The raw logits are hidden W^T + down B^T, where `down` is what the adapter's first factor makes of
the hidden states. Both products have one gradient by logits, so `down` is handed through the
chunks as further columns of the hidden states, and B stands in the place of the weight.

Shape letters: C positions of a chunk, H hidden size, V vocabulary, R rank.
"""

from torch import Tensor

from plait.kernels.token_logprobs import cpu
from plait.kernels.token_logprobs.head import Shaping


class Head(cpu.Head):
    """See `head.Head`; hidden states are (C, H + R), the weight is B (V, R).

    Args:
        frozen: W (V, H), which gets no gradient.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shaping: Shaping, frozen: Tensor
    ) -> None:
        super().__init__(hidden, frozen, bias, shaping)
        self._up = weight.float()
        self._width = frozen.shape[1]

    def _multiply(self, hidden: Tensor, out: Tensor) -> None:
        super()._multiply(hidden[:, : self._width], out)
        out.addmm_(hidden[:, self._width :].float(), self._up.T)

    def to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        super().to_hidden(gradient, out[:, : self._width])
        out[:, self._width :] = gradient @ self._up

    def add_to_weight(self, gradient: Tensor, hidden: Tensor, total: Tensor) -> None:
        super().add_to_weight(gradient, hidden[:, self._width :], total)
