"""litdata: `--prepare OUT` writes its chunks from a folder of pictures, then `OUT --workers 2`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import torch
from reading import BATCH, arguments, run, tensor_of


def load(row: dict[str, str]) -> dict[str, Any]:
    return {**row, "picture": Path(row["file"]).read_bytes()}


class Pictures(litdata.StreamingDataset):
    """Decodes in the worker, as its documentation shows."""

    def __getitem__(self, index: Any) -> tuple[str, torch.Tensor, str]:
        row = super().__getitem__(index)
        return row["key"], tensor_of(row["picture"]), row["text"]


def collate(rows: list[tuple[str, torch.Tensor, str]]) -> tuple[list[str], torch.Tensor, list[str]]:
    keys, tensors, texts = zip(*rows, strict=True)
    return list(keys), torch.stack(tensors), list(texts)


def batches(folder: Path, workers: int) -> Iterator[Any]:
    dataset = Pictures(str(folder), shuffle=False)
    yield from litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=workers, collate_fn=collate
    )


def prepare(rows: Path, out: Path) -> None:
    """Chunks of 64 MB, litdata's own default."""
    inputs = json.loads(rows.read_text())
    litdata.optimize(
        load, inputs, output_dir=str(out), chunk_bytes="64MB", num_workers=1, mode="overwrite"
    )


if __name__ == "__main__":
    words = arguments()
    torch.set_num_threads(1)
    if words.prepare is not None:
        prepare(words.folder, words.prepare)
    else:
        run(batches(words.folder, words.workers), words.dump)
