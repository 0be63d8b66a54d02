"""Our side of the loader benchmark: `python -m benchmarks.loader_side ROWS --workers 2`.

The loader is the one that training uses, with its plan, ledger policy and threads. Text is not
tokenised, as the peers do not either: a document has one position for its picture and one more.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet  # noqa: F401  (it is loaded when it is needed, and the clock is without imports)
import torch
import torchvision.io  # noqa: F401  (as well)
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

import plait.datasets
from plait.datasets.loader import Loader, LoaderSettings
from plait.modalities import Limits
from plait.stream import Document, Item, ItemInputs, ItemPlan, Sample, Span

SIZE, BATCH = 224, 32
LIMITS = Limits()


def document(sample: Sample) -> Document:
    """Two positions: the picture, and what follows it."""
    (picture,) = sample.media()
    plan = ItemPlan("pixels", 1, (1, 1, 1))
    nothing = np.zeros(2, dtype=np.int64)
    return Document(
        token_ids=nothing,
        targets=nothing,
        weights=np.ones(2, dtype=np.float32),
        positions=np.arange(2),
        spans=(Span(0, 1, "pixels", 0),),
        items=(Item(picture, plan, 0, sample.origin),),
        sample_id=sample.id,
        origin=sample.origin,
    )


class Stages:
    """Decodes and resizes items, and keeps the seconds of both."""

    def __init__(self) -> None:
        self.decode = self.resize = 0.0

    def __call__(self, item: Item) -> ItemInputs:
        started = time.perf_counter()
        pixels = torch.from_numpy(item.part.decode(LIMITS)).permute(2, 0, 1)
        decoded = time.perf_counter()
        resized = tv.resize(
            pixels, [SIZE, SIZE], interpolation=InterpolationMode.BILINEAR, antialias=True
        )
        self.decode += decoded - started
        self.resize += time.perf_counter() - decoded
        return ItemInputs({"pixels": resized})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--dump", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(1)
    stages, samples = Stages(), 0
    held: dict[str, Any] = {}
    started = time.perf_counter()
    rows = plait.datasets.open(words.folder)
    settings = LoaderSettings(
        capacity=2 * BATCH, workers=words.workers, epochs=1, shuffle=False, prefetch=2
    )
    for pack in Loader(rows, range(len(rows)), document, stages, settings):
        inputs = [loaded.inputs for (loaded,) in pack.inputs]
        tensors = torch.stack([item["pixels"] for item in inputs if item is not None])
        samples += len(tensors)
        if words.dump:
            held |= dict(zip(map(str, pack.rows), tensors.numpy(), strict=True))
    seconds = time.perf_counter() - started
    if words.dump:
        np.savez(words.dump, **held)
    rest = seconds - stages.decode - stages.resize  # rows, plan and packs; of no use with threads
    facts: dict[str, Any] = {"samples": samples, "seconds": seconds}
    facts["stages"] = {"decode": stages.decode, "resize": stages.resize, "rest": max(0.0, rest)}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(facts | {"peak_memory_mb": memory}))


if __name__ == "__main__":
    main()
