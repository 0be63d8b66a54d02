"""Views: a few fixed variations of each picture, so that frozen features can be cached.

View 0 is the picture as it is. Every other view is a function of the seed, the picture's digest
and the view's number alone: the same on every machine, in any order, from any thread. There are no
mirror images, because letters are not read backwards. H rows, W columns.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plait.errors import ConfigError

Pixels = NDArray[np.uint8]

_VERSION = 1  # raise when the same options come to make other pixels: it is part of cache keys


@dataclass(frozen=True, kw_only=True)
class Views:
    """How many views a picture has, and how far they may stray from it.

    Raises:
        ConfigError: a field is out of its range.
    """

    count: int = 1
    """Views of each picture, the unchanged one included; 1 is no augmentation."""

    seed: int = 0
    """Changes all views but view 0."""

    min_area: float = 0.7
    """The smallest part of the picture's area that a crop keeps; 1 does not crop."""

    max_stretch: float = 1.15
    """How much wider or narrower than the picture a crop may be; 1 keeps its shape."""

    max_degrees: float = 8.0
    """Rotation to either side; the corners that it uncovers are white."""

    jitter: float = 0.15
    """Brightness, contrast and saturation are scaled by 1 - jitter to 1 + jitter."""

    max_hue: float = 0.02
    """Shift of hue to either side, in turns of the colour wheel. Small: captions name colours."""

    def __post_init__(self) -> None:
        ranges = {
            "count": (1, math.inf),
            "min_area": (0.05, 1),
            "max_stretch": (1, 4),
            "max_degrees": (0, 180),
            "jitter": (0, 0.9),
            "max_hue": (0, 0.5),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"views.{name} must be {low:g} to {high:g}; it is {getattr(self, name)}"
                )

    @property
    def name(self) -> str:
        """What decides the pixels of a view, for cache keys; `count` does not."""
        return (
            f"views{_VERSION}-seed{self.seed}-area{self.min_area:g}-stretch{self.max_stretch:g}"
            f"-degrees{self.max_degrees:g}-jitter{self.jitter:g}-hue{self.max_hue:g}"
        )

    def apply(self, pixels: Pixels, digest: str, view: int) -> Pixels:
        """View number `view` of a picture, in its own size, so that its plan still holds.

        Args:
            pixels: uint8 (H, W, 3); not written to.
            digest: `Image.digest()` of the picture.

        Raises:
            ConfigError: the view is not one of 0 to count - 1.
        """
        if not 0 <= view < self.count:
            raise ConfigError(
                f"a view must be 0 to {self.count - 1}; it is {view}; raise views.count"
            )
        if view == 0:
            return pixels
        key = hashlib.sha256(f"{self.seed}:{digest}:{view}".encode()).digest()
        chance = np.random.Generator(np.random.PCG64(int.from_bytes(key)))
        return self._vary(pixels, chance)

    def _vary(self, pixels: Pixels, chance: np.random.Generator) -> Pixels:
        import torch
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        height, width = pixels.shape[:2]
        degrees = chance.uniform(-self.max_degrees, self.max_degrees)
        top, left, tall, wide = self._crop(height, width, chance)
        brightness, contrast, saturation = chance.uniform(1 - self.jitter, 1 + self.jitter, 3)
        hue = chance.uniform(-self.max_hue, self.max_hue)

        picture = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        bilinear = InterpolationMode.BILINEAR
        # Without the white margin the rotation would blend the picture's edge with black.
        across, down = _margin(height, width, degrees)
        picture = F.pad(picture, [across, down], fill=255)
        picture = F.rotate(picture, degrees, interpolation=bilinear, fill=[255.0] * 3)
        picture = F.resized_crop(
            picture, top + down, left + across, tall, wide, [height, width], bilinear
        )
        picture = F.adjust_brightness(picture, brightness)
        picture = F.adjust_contrast(picture, contrast)
        picture = F.adjust_saturation(picture, saturation)
        picture = F.adjust_hue(picture, hue)
        varied: Pixels = picture.permute(1, 2, 0).contiguous().numpy()
        return varied

    def _crop(
        self, height: int, width: int, chance: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop, at least one pixel each way."""
        area = chance.uniform(self.min_area, 1)
        stretch = math.exp(chance.uniform(-1, 1) * math.log(self.max_stretch))
        tall = max(1, min(height, round(height * math.sqrt(area / stretch))))
        wide = max(1, min(width, round(width * math.sqrt(area * stretch))))
        top = int(chance.integers(0, height - tall + 1))
        left = int(chance.integers(0, width - wide + 1))
        return top, left, tall, wide


def _margin(height: int, width: int, degrees: float) -> tuple[int, int]:
    """Columns and rows to add on each side so that a rotation finds a pixel for every pixel."""
    turn = math.radians(abs(degrees))
    cosine, sine = abs(math.cos(turn)), abs(math.sin(turn))
    wide, tall = width * cosine + height * sine, height * cosine + width * sine
    return (
        math.ceil(max(0.0, wide - width) / 2) + 2,
        math.ceil(max(0.0, tall - height) / 2) + 2,
    )
