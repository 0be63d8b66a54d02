"""webdataset: `--prepare OUT` writes its shards from a list of pictures, then `OUT --workers 2`."""

import json
from collections.abc import Iterator
from pathlib import Path
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


def prepare(rows: Path, out: Path) -> None:
    """Shards of 1,000 samples, as its documentation writes them."""
    out.mkdir()
    with webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxcount=1000, verbose=0) as sink:
        for row in json.loads(rows.read_text()):
            picture = Path(row["file"]).read_bytes()
            turns = {"messages": [{"role": "assistant", "content": row["text"]}]}
            sink.write({"__key__": row["key"], "json": turns, "0.jpg": picture})


if __name__ == "__main__":
    words = arguments()
    torch.set_num_threads(1)
    if words.prepare is not None:
        prepare(words.folder, words.prepare)
    else:
        run(batches(words.folder, words.workers), words.dump)
