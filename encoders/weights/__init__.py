"""Weights by name: a folder, a hub id, or a pip package that is converted once to safetensors.

No pickle is loaded outside the conversion, and none there without `weights_only`.
"""

from plait.encoders.weights.names import resolve

__all__ = ["resolve"]
