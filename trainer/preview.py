"""`plait preview`: samples as the model will see them, position by position."""

from pathlib import Path
from typing import Any

from plait.errors import DataError
from plait.stream import Document, Sample, render
from plait.trainer.build import build
from plait.trainer.config import RunConfig
from plait.trainer.data import open_data
from plait.trainer.reports.pages import thumbnail
from plait.trainer.reports.preview import TEXT, PreviewSample, PreviewToken, write_preview

THUMBNAIL = 160


def preview(config: RunConfig, rows: int, file: Path) -> Path:
    """Write a page of the first `rows` training rows; broken rows show their error.

    Raises:
        PlaitError: the recipe, the model or the dataset cannot be used.
    """
    built = build(config.model, config.seed, config.data.limits)
    data = open_data(config.data)
    shown = []
    for row in data.splits.train[:rows]:
        try:
            sample = data.records[row]
            document = render(sample, built.tokenizer, built.layout)
            shown.append(_page_entry(sample, document, built.tokenizer, config))
        except DataError as error:
            shown.append(PreviewSample(f"row {row}", "cannot be used", [], (), str(error)))
    return write_preview(shown, file)


def _page_entry(
    sample: Sample, document: Document, tokenizer: Any, config: RunConfig
) -> PreviewSample:
    pictures = tuple(
        thumbnail(item.part.decode(config.data.limits), THUMBNAIL) for item in document.items
    )
    weights = document.weights.tolist()
    # Position i predicts token i + 1, so a token's own weight is that of the position before it.
    learned = [0.0, *weights]
    media = {}
    for span in document.spans:
        part = document.items[span.item].part
        facts = (part.medium, span.item, span.group)
        media.update(dict.fromkeys(range(span.start, span.stop), facts))
    ids = [*document.token_ids.tolist(), int(document.targets[-1])]
    tokens = []
    for position, token in enumerate(ids):
        medium, item, group = media.get(position, (TEXT, None, None))
        text = tokenizer.decode([token]) if item is None else ""
        tokens.append(PreviewToken(text, medium, learned[position], item, group))
    title = f"{sum(w != 0 for w in weights)} of {len(ids)} positions learned"
    return PreviewSample(sample.id, title, tokens, pictures)
