"""The rows of the loader benchmark: JPEG pictures with the look of photographs, and captions."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZES = ((640, 480), (480, 640), (500, 375), (800, 600), (512, 512))
"""Width and height; COCO's pictures are 640 on their longer side."""

_GRAIN = 6.0
"""Standard deviation of the pixel noise, which gives a JPEG of quality 90 a photograph's size."""


def write_rows(folder: Path, count: int) -> Path:
    """`count` pictures and `rows.jsonl` in `folder`; the same bytes every time."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        name = f"{number:05d}.jpg"
        (folder / name).write_bytes(_jpeg(_photograph(generator, width, height)))
        turns = [
            {"role": "user", "content": "<image>What is this?"},
            {"role": "assistant", "content": f"Picture {number} of {count}."},
        ]
        lines.append(json.dumps({"messages": turns, "images": [name]}))
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def _photograph(generator: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """Noise at several scales, each half as strong as the next coarser one."""
    pixels = np.full((height, width, 3), 128.0)
    for power in range(2, 7):
        small = generator.normal(size=(2**power, 2**power, 3)) * 120 / power
        shown = [Image.fromarray(small[..., c].astype(np.float32)) for c in range(3)]
        grown = [np.asarray(s.resize((width, height), Image.Resampling.BICUBIC)) for s in shown]
        pixels += np.stack(grown, axis=-1) / 2
    pixels += generator.normal(size=pixels.shape) * _GRAIN
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    held = BytesIO()
    Image.fromarray(pixels).save(held, "JPEG", quality=90)
    return held.getvalue()
