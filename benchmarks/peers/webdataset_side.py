"""webdataset reading Plait's shards: `python webdataset_side.py SHARDS --workers 2`."""

import json
from collections.abc import Iterator
from typing import Any

import torch
import webdataset
from reading import BATCH, arguments, run, tensor_of
from torch.utils.data import DataLoader


def sample(fields: dict[str, Any]) -> tuple[str, torch.Tensor, str]:
    row = json.loads(fields["json"])
    (jpeg,) = (value for key, value in fields.items() if key.endswith("jpg"))
    return fields["__key__"], tensor_of(jpeg), row["messages"][-1]["content"]


def collate(rows: list[tuple[str, torch.Tensor, str]]) -> tuple[list[str], torch.Tensor, list[str]]:
    keys, tensors, texts = zip(*rows, strict=True)
    return list(keys), torch.stack(tensors), list(texts)


def batches(folder: Any, workers: int) -> Iterator[Any]:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    dataset = dataset.map(sample).batched(BATCH, collation_fn=collate)
    yield from DataLoader(dataset, batch_size=None, num_workers=workers)


if __name__ == "__main__":
    words = arguments()
    torch.set_num_threads(1)
    run(batches(words.folder, words.workers), words.dump)
