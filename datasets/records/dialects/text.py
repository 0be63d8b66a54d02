"""Plain text: all of it is learned. {"text": "A frog: <image>", "images": ["frog.png"]}.

The text may be a list of typed parts, as a message's content.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from plait.datasets.records.dialects.base import COMMON, Dealer, Dialect, Draft
from plait.datasets.records.dialects.messages import content_parts
from plait.datasets.records.media import MediaFinder
from plait.datasets.records.values import text_of
from plait.errors import DataError


class PlainText(Dialect):
    """Bare parts, without roles; media of a row that marks no place stand before its text."""

    name: ClassVar[str] = "text"
    keys: ClassVar[tuple[str, ...]] = ("text", *COMMON)

    def fits(self, keys: frozenset[str]) -> bool:
        return "text" in keys

    def draft(
        self,
        row: Mapping[str, Any],
        side: str,  # noqa: ARG002  (a row is one document)
        finder: MediaFinder,
    ) -> Draft:
        dealer = Dealer.of_row(row, finder)
        text = row.get("text")
        if isinstance(text, list):
            parts = content_parts(text, dealer, finder)
        else:
            parts = dealer.parts(text_of(row, "text"))
        parts = (*dealer.unmarked(), *parts)
        dealer.check()
        if not parts:
            raise DataError("a row's text must not be empty; this one is; fill or remove it")
        return Draft(parts=parts)
