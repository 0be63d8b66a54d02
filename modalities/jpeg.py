"""JPEG files by torchvision, where it is loaded: Pillow's pixels, in about half of its time.

Both use libjpeg-turbo; Pillow also unpacks and copies every row. What torchvision refuses is left
to Pillow, so that no file is read or refused that would not be without it; that neither differs
on damaged files is tested (`tests/modalities/test_jpeg.py`).
"""

import sys

import numpy as np
from numpy.typing import NDArray

MODES = frozenset({"L", "RGB"})
"""Pillow's modes of what is decoded here; colours of print have conversions of their own."""


def decode_jpeg(content: bytes) -> NDArray[np.uint8] | None:
    """Pixels uint8 (H, W, 3) of a JPEG file; None where Pillow must see to it.

    A process without torch, such as one that decodes what nobody vouches for, stays without it.
    """
    if "torch" not in sys.modules:
        return None
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        pixels = decode_jpeg(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB
        )
    except RuntimeError:
        return None
    # Its channels come first as a view alone: in memory they lie as they are wanted.
    upright: NDArray[np.uint8] = pixels.permute(1, 2, 0).contiguous().numpy()
    return upright
