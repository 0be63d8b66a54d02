"""Attention in which every query sees one contiguous interval of keys."""

from plait.kernels.interval_attention.intervals import Intervals, Linked
from plait.kernels.interval_attention.merging import merge
from plait.kernels.interval_attention.routes import ROUTES, interval_attention

__all__ = ["ROUTES", "Intervals", "Linked", "interval_attention", "merge"]
