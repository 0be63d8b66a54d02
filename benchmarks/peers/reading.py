"""What both peers share: decoding and resizing, the clock, and what is printed.

No import of Plait: these programs run in an environment of their own.
"""

import argparse
import io
import json
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

SIZE = 224
BATCH = 32


def tensor_of(jpeg: bytes) -> torch.Tensor:
    """uint8 (3, SIZE, SIZE) of an encoded picture."""
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    resized = tv.resize(picture, [SIZE, SIZE], InterpolationMode.BILINEAR, antialias=True)
    return tv.pil_to_tensor(resized)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--dump", type=Path, help="write every tensor here, by key; nothing timed")
    parser.add_argument("--prepare", type=Path, help="write the loader's own format here")
    return parser.parse_args()


def run(batches: Iterable[tuple[list[str], torch.Tensor, list[str]]], dump: Path | None) -> None:
    """Go over (keys, tensors (B, 3, SIZE, SIZE), texts) once; print samples and seconds."""
    torch.set_num_threads(1)
    samples = characters = 0
    held: dict[str, np.ndarray] = {}
    started = time.perf_counter()
    for keys, tensors, texts in batches:
        samples += len(tensors)
        characters += sum(len(text) for text in texts)
        if dump is not None:
            held |= dict(zip(keys, tensors.numpy(), strict=True))
    seconds = time.perf_counter() - started
    if dump is not None:
        np.savez(dump, **held)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    facts = {"samples": samples, "characters": characters, "seconds": seconds}
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + children) // 1024
    print(json.dumps(facts | {"peak_memory_mb": memory}))
