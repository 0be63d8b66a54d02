"""A page that shows samples as the model will see them, position by position."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from plait.trainer.reports.pages import write_page
from plait.trainer.reports.showing import Shown

TEXT = "text"


@dataclass(frozen=True, slots=True)
class PreviewToken:
    """One position.

    `text` is what it stands for; `medium` is "text" or what fills it ("image"), and `span` the
    number of its span in the sample; `weight` is its share in the loss, 0 where nothing is
    learned; `group` numbers positions that see one another both ways.
    """

    text: str
    medium: str = TEXT
    weight: float = 0.0
    span: int | None = None
    group: int | None = None


@dataclass(frozen=True, slots=True)
class PreviewSample:
    """A rendered sample; `spans` is what fills each of its media spans."""

    id: str
    title: str
    tokens: Sequence[PreviewToken]
    spans: Sequence[Shown] = ()
    note: str = ""


def write_preview(samples: Sequence[PreviewSample], path: Path) -> Path:
    """Write the page, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    return write_page("preview.html", path, {"samples": [_view(sample) for sample in samples]})


def _view(sample: PreviewSample) -> dict[str, Any]:
    counts = Counter(token.medium for token in sample.tokens)
    runs = []
    for (medium, span), tokens in groupby(sample.tokens, key=lambda t: (t.medium, t.span)):
        if span is None:
            runs.append({"medium": TEXT, "tokens": [_chip(token) for token in tokens]})
        else:
            runs.append(_media_run(medium, list(tokens), sample.spans[span]))
    return {
        "id": sample.id,
        "title": sample.title,
        "note": sample.note,
        "runs": runs,
        "length": len(sample.tokens),
        "counts": sorted(counts.items(), key=lambda item: item[0] != TEXT),
        "learned": sum(token.weight != 0 for token in sample.tokens),
        "weight": sum(token.weight for token in sample.tokens),
    }


def _chip(token: PreviewToken) -> dict[str, Any]:
    """A text position; white space is made visible, and a line break also breaks the line."""
    shown = token.text.replace("\n", "⏎").replace("\t", "⇥")
    shown = shown.replace(" ", "·") if not shown.strip() else shown.replace(" ", "\u00a0")
    return {
        "text": shown or "∅",
        "raw": token.text,
        "weight": token.weight,
        "breaks": token.text.endswith("\n"),
    }


def _media_run(medium: str, tokens: list[PreviewToken], shown: Shown) -> dict[str, Any]:
    # A sound is a row of positions, a picture a square of them.
    columns = len(tokens) if medium == "audio" else max(1, round(len(tokens) ** 0.5))
    groups = {token.group for token in tokens}
    return {
        "medium": medium,
        "count": len(tokens),
        "columns": min(columns, 32 if medium == "audio" else 16),
        "cells": min(len(tokens), 256),
        "shown": shown,
        "both_ways": groups != {None},
    }
