"""`plait preview`: samples as the model will see them, position by position."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from plait.datasets.decoding import Decoder
from plait.errors import DataError
from plait.modalities import Limits
from plait.stream import Document, Item, Sample, Span, render
from plait.trainer.build import build
from plait.trainer.config import RunConfig
from plait.trainer.data import open_data
from plait.trainer.reports.preview import TEXT, PreviewSample, PreviewToken, write_preview
from plait.trainer.reports.showing import Shown, player_of, show_stretch


def preview(config: RunConfig, rows: int, file: Path) -> Path:
    """Write a page of the first `rows` training rows; broken rows show their error.

    Raises:
        PlaitError: the recipe, the model or the dataset cannot be used.
    """
    built = build(config.model, config.seed, config.data.limits)
    data = open_data(config.data)
    shown = []
    with closing(Decoder(workers=1)) as decoder:
        for row in data.splits.train[:rows]:
            try:
                sample = data.records[row]
                document = render(sample, built.tokenizer, built.layout)
                _decode_once(document, decoder, config.data.limits)
                shown.append(_page_entry(sample, document, built.tokenizer, config.data.limits))
            except DataError as error:
                shown.append(PreviewSample(f"row {row}", "cannot be used", [], (), str(error)))
    return write_preview(shown, file)


def _decode_once(document: Document, decoder: Decoder, limits: Limits) -> None:
    """Decode where a process can be killed: what comes through may then be decoded here.

    Raises:
        MediaError: a medium cannot be decoded, or takes too long.
    """
    for item in document.items:
        decoder.decode(item.part, limits, item.plan.wanted)


def _page_entry(
    sample: Sample, document: Document, tokenizer: Any, limits: Limits
) -> PreviewSample:
    weights = document.weights.tolist()
    # Position i predicts token i + 1, so a token's own weight is that of the position before it.
    learned = [0.0, *weights]
    media: dict[int, tuple[str, int | None, int | None]] = {}
    for number, span in enumerate(document.spans):
        facts = (document.items[span.item].part.medium, number, span.group)
        media.update(dict.fromkeys(range(span.start, span.stop), facts))
    ids = [*document.token_ids.tolist(), int(document.targets[-1])]
    tokens = []
    for position, token in enumerate(ids):
        medium, place, group = media.get(position, (TEXT, None, None))
        text = tokenizer.decode([token]) if place is None else ""
        tokens.append(PreviewToken(text, medium, learned[position], place, group))
    title = f"{sum(w != 0 for w in weights)} of {len(ids)} positions learned"
    return PreviewSample(sample.id, title, tokens, _spans(document, limits))


def _spans(document: Document, limits: Limits) -> Sequence[Shown]:
    """What fills each span; the first span of an item also plays the whole of it."""
    decoded = [item.part.decode(limits, item.plan.wanted) for item in document.items]
    shown = []
    for span in document.spans:
        item = document.items[span.item]
        start, stop = span.offset / item.plan.length, (span.offset + span.length) / item.plan.length
        picture = show_stretch(item.part.medium, decoded[span.item], start, stop).picture
        player = {} if span.offset else player_of(item.part, limits)
        shown.append(Shown(picture, **player, about=_times(item, span)))
    return shown


def _times(item: Item, span: Span) -> str:
    """The time of the span's first row, where the item has times."""
    times = item.plan.seconds
    if not times or len(times) != item.plan.grid[0]:
        return ""
    row = span.offset * len(times) // item.plan.length
    return f"from {times[row]:.1f} s"
