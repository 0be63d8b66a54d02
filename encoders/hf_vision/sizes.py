"""What size an image processor will make of a picture, from its header alone."""

from typing import Any

from transformers.models.siglip2.image_processing_siglip2 import (
    get_image_size_for_max_num_patches,
)

from plait.errors import ConfigError, MediaError

_MAX_ASPECT = 200
"""A longer strip, scaled until its short side fits, would take gigabytes."""


def processed_size(processor: Any, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels after the processor's resize and crop.

    Raises:
        MediaError: the picture is too long and thin.
        ConfigError: the processor resizes in a way that cannot be planned.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise MediaError(
            f"a picture's sides may differ at most {_MAX_ASPECT} times; this one is "
            f"{width} x {height}; crop it"
        )
    if hasattr(processor, "max_num_patches"):
        rows, columns = get_image_size_for_max_num_patches(
            height, width, processor.patch_size, processor.max_num_patches
        )
        return int(rows), int(columns)
    if getattr(processor, "do_center_crop", False):
        return _fixed(processor.crop_size)
    if not getattr(processor, "do_resize", False):
        return height, width
    short = _side(processor.size, "shortest_edge")
    if short is None:
        return _fixed(processor.size)
    long = int(short * max(height, width) / min(height, width))
    return (long, short) if width <= height else (short, long)


def check_plannable(processor: Any, encoder: str = "hf_vision") -> None:
    """Refuse a processor whose output size `processed_size` does not know.

    Raises:
        ConfigError: it pads, or bounds the longer edge.
    """
    size = getattr(processor, "size", None)
    if getattr(processor, "do_pad", False) or _side(size, "longest_edge") is not None:
        raise ConfigError(
            f"encoder {encoder!r} needs an image processor that resizes to a fixed size, to a "
            f"shortest edge, or to a number of patches; {type(processor).__name__} has "
            f"do_pad={getattr(processor, 'do_pad', None)} and size={size}: change its "
            "preprocessor_config.json"
        )


def _fixed(size: Any) -> tuple[int, int]:
    height, width = _side(size, "height"), _side(size, "width")
    if height is None or width is None:
        raise ConfigError(
            f"an image processor's size needs a height and a width or a shortest_edge; got {size}"
        )
    return height, width


def _side(size: Any, name: str) -> int | None:
    value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
    return None if value is None else int(value)
