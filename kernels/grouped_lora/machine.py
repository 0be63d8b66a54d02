"""What a route supplies, so that the operation knows no machine.

Shape letters: T positions, I inputs, O outputs, r_g rank of adapter g.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from plait.kernels.grouped_lora.segments import Segments


class Adapters(NamedTuple):
    """Factors a[g] (r_g, I) and b[g] (O, r_g) with their scales, and who uses them where."""

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: tuple[float, ...]
    segments: Segments


class Machine(Protocol):
    """What a route supplies: `cpu` and `triton` are such modules. All products are in float32."""

    def add(self, x: Tensor, out: Tensor, adapters: Adapters) -> Tensor | None:
        """x (T, I): add every adapter's share to `out` (T, O) in place.

        Returns what `gradients` needs again: x A_g^T, scaled, in a layout of the machine's own.
        """

    def gradients(
        self,
        grad: Tensor,
        x: Tensor | None,
        grad_x: Tensor | None,
        low: Tensor | None,
        adapters: Adapters,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """grad (T, O): add the adapters' share to `grad_x` (T, I) in place.

        Returns the gradients of all a (none where `x` is None) and all b (none where `low` is).
        """
