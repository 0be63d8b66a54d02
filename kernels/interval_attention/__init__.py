"""Attention in which every query sees one contiguous interval of keys."""

from plait.kernels.interval_attention.cpu import interval_attention
from plait.kernels.interval_attention.intervals import Intervals

__all__ = ["Intervals", "interval_attention"]
