"""A tenth of real pictures, sounds and films broken: the ledger against a count of its own."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from plait.datasets.decoding import Decoder
from plait.datasets.ledger import Ledger, count
from plait.datasets.loader import Loader, LoaderSettings
from plait.datasets.policy import FailurePolicy
from plait.errors import DataError, FailureBudgetError, MediaError, Origin
from plait.modalities import Audio, Image, Limits, MediaPart, Video
from plait.stream import Document, Item, ItemInputs, ItemPlan, Sample, Span

EACH = 20
LIMITS = Limits()
Write = Callable[[Path, int], None]


@pytest.fixture(scope="module")
def media(
    tmp_path_factory: pytest.TempPathFactory, write_sound: Write, write_film: Write
) -> list[MediaPart]:
    """60 files, of which two of each medium are cut in the middle and one at its start."""
    folder = tmp_path_factory.mktemp("media")
    parts: list[MediaPart] = []
    for number in range(EACH):
        paths = [folder / f"{number}.{ending}" for ending in ("png", "wav", "mp4")]
        noise = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        PILImage.fromarray(noise).save(paths[0])
        write_sound(paths[1], number)
        write_film(paths[2], number)
        for path in paths if number in (3, 11) else ():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        parts += [Image(paths[0]), Audio(paths[1]), Video(paths[2])]
    return parts


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    decoder = Decoder()
    yield decoder
    decoder.close()


def loader(
    media: list[MediaPart], decoder: Decoder, ledger: Ledger, policy: FailurePolicy
) -> Loader:
    samples = [
        Sample(parts=(part,), origin=Origin("mixed", row), id=str(row))
        for row, part in enumerate(media)
    ]

    def render(sample: Sample) -> Document:
        part = sample.media()[0]
        decoder.header(part, LIMITS)
        ids = np.arange(8 + int(sample.id) % 5)
        item = Item(part, ItemPlan("tower", 4, (1, 2, 2)), sample.view, sample.origin)
        return Document(
            ids, ids, np.ones(len(ids), np.float32), ids, (Span(1, 4, "tower", 0),), (item,),
            sample.id, sample.origin,
        )  # fmt: skip

    def load(item: Item) -> ItemInputs:
        decoder.decode(item.part, LIMITS, item.plan.wanted)
        return ItemInputs({"pixels": torch.zeros(1)})

    settings = LoaderSettings(capacity=60, epochs=3, seed=4)
    return Loader(samples, range(len(media)), render, load, settings, policy, ledger)


def unreadable(media: list[MediaPart]) -> set[int]:
    """Rows that cannot be decoded, found without the loader."""
    found = set()
    for row, part in enumerate(media):
        try:
            part.header(LIMITS)
            part.decode(LIMITS)
        except MediaError:
            found.add(row)
    return found


def test_the_ledger_agrees_with_an_independent_count(
    media: list[MediaPart], decoder: Decoder, tmp_path: Path
) -> None:
    broken = unreadable(media)
    assert len(broken) >= 0.05 * len(media)
    assert {media[row].medium for row in broken} >= {"image", "video"}
    policy = FailurePolicy("skip", max_consecutive=None)
    with loader(media, decoder, Ledger(tmp_path / "l"), policy) as packs:
        used = [Counter[int]() for _ in range(3)]
        for pack in packs:
            used[pack.epoch].update(pack.rows)
        packs.ledger.close()
    for epoch in used:
        assert epoch == Counter(set(range(len(media))) - broken), "each whole row once an epoch"
    summary = count(tmp_path / "l")
    whole = {"used": len(media) - len(broken), "broken": len(broken)}
    assert summary.epochs == {0: whole, 1: whole, 2: whole}
    assert not summary.twice
    assert sum(summary.reasons["broken"].values()) == 3 * len(broken)
    assert policy.total == len(broken)


def test_the_failure_budget_stops_with_a_summary(
    media: list[MediaPart], decoder: Decoder, tmp_path: Path
) -> None:
    most = len(unreadable(media)) - 1
    policy = FailurePolicy("skip", max_total=most, max_consecutive=None)
    with pytest.raises(FailureBudgetError) as caught:
        list(loader(media, decoder, Ledger(tmp_path / "l"), policy))
    message = str(caught.value)
    assert f"at most {most} broken rows in a run are skipped and {most + 1} broke" in message
    assert "Broken so far: " in message
    counted = message.partition("Broken so far: ")[2].partition(" The last: ")[0]
    assert sum(int(number) for number in re.findall(r"(\d+) x ", counted)) == most + 1
    assert isinstance(caught.value, DataError)
