"""Low-rank adapters of several runs over one packed row and one frozen base."""

from plait.kernels.grouped_lora.operation import grouped_lora, grouped_lora_linear
from plait.kernels.grouped_lora.segments import Segments

__all__ = ["Segments", "grouped_lora", "grouped_lora_linear"]
