"""Pixels as features: a bounded size in whole patches, cubes cut from it, and places as numbers.

Shape letters: F frames, H rows, W columns of pixels; T, R, K cubes in time, rows and columns;
N = T * R * K.
"""

from math import prod

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from plait.encoders.base import Grid
from plait.errors import ConfigError
from plait.ranges import check_number

_RATES = 4
PLACES = 2 * _RATES
"""Numbers that tell a place on one axis."""


def patches_of(height: int, width: int, patch: int, max_side: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture, scaled until its longer side is `max_side`.

    A smaller picture keeps its size. Each side is rounded to whole patches, at least one.
    """
    longest = max(height, width, max_side)
    # Whole numbers: the same on every machine.
    rows, columns = (
        max(1, (2 * side * max_side + longest * patch) // (2 * longest * patch))
        for side in (height, width)
    )
    return rows, columns


def fitted(frames: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """uint8 (F, H, W, 3) -> float (F, rows * patch, columns * patch, 3) from -1 to 1."""
    size = [rows * patch, columns * patch]
    resized: Tensor = tv.resize(
        frames.permute(0, 3, 1, 2), size, interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    scaled: Tensor = resized.permute(0, 2, 3, 1).float() / 127.5 - 1
    return scaled


def cubes(pixels: Tensor, frames: int, patch: int) -> Tensor:
    """(T * frames, R * patch, K * patch, 3) -> (N, frames * patch * patch * 3), row-major."""
    count, height, width, channels = pixels.shape
    cut = pixels.reshape(
        count // frames, frames, height // patch, patch, width // patch, patch, channels
    )
    return cut.permute(0, 2, 4, 1, 3, 5, 6).flatten(3).flatten(0, 2)


def places(grid: Grid, axes: int) -> Tensor:
    """(N, axes * PLACES): where each cube lies on the last `axes` of time, row and column.

    Sines and cosines of wavelengths from 6 to 400 cubes: neighbours differ, and so do the ends.
    """
    found = torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(prod(grid), 3)
    angles = found[:, 3 - axes :, None].float() * 4.0 ** -torch.arange(_RATES)
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)


def check_sizes(patch: int, max_side: int) -> None:
    """
    Raises:
        ConfigError: a side is out of range, or `max_side` is no whole number of patches.
    """
    check_number("patch", patch, "[1, 256]", whole=True)
    check_number("max_side", max_side, "[1, 8192]", whole=True)
    if max_side % patch:
        raise ConfigError(
            f"max_side must be a whole number of patches of {patch} pixels; it is {max_side}: "
            f"take {max(1, max_side // patch) * patch}"
        )
