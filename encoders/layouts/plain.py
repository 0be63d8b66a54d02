"""The layout of language models that were made for text alone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from plait.encoders.media_encoder import MediaEncoder
from plait.errors import Origin, RenderError
from plait.modalities import MediaPart
from plait.stream import Fill, IntArray, ItemPlan, Span


class PlainLayout:
    """Media positions stand in the row as they are, optionally between two texts.

    A film may say the time of each of its rows ("1.5s:"), and the sound of a film stands after
    it, or second by second between its frames, as the sample asks.

    The placeholder is -1, which is no vocabulary id: no text can contain it and no model can
    generate it. Embedding look-ups must clamp it.

    Args:
        encoders: The encoder of each medium ("image").
        before: Text before each item, never learned.
        after: Text after each item.
        timestamped: Names of the encoders whose time rows are preceded by their time.
    """

    placeholder_id = -1
    banned_ids: frozenset[int] = frozenset()

    def __init__(
        self,
        encoders: Mapping[str, MediaEncoder],
        before: str = "",
        after: str = "",
        timestamped: Collection[str] = (),
    ) -> None:
        self.encoders, self.before, self.after = dict(encoders), before, after
        self.timestamped = frozenset(timestamped)

    def plan(self, part: MediaPart, origin: Origin) -> Sequence[tuple[MediaPart, ItemPlan]]:
        """
        Raises:
            RenderError: no encoder reads this medium.
            DataError: the part's header cannot be read.
        """
        encoder = self._encoder(part, origin)
        planned = [(part, encoder.plan(part, origin))]
        track, interleaved = encoder.soundtrack(part, origin)
        if track is not None:
            plan = self._encoder(track, origin).plan(track, origin)
            planned.append((track, replace(plan, interleaved=interleaved)))
        return planned

    def _encoder(self, part: MediaPart, origin: Origin) -> MediaEncoder:
        if part.medium not in self.encoders:
            known = ", ".join(sorted(self.encoders)) or "no medium"
            raise RenderError(
                f"each medium needs an encoder: this sample has {part.medium}, the model reads "
                f"{known}; add an encoder or remove the item",
                origin,
            )
        return self.encoders[part.medium]

    def pieces(self, plans: Sequence[ItemPlan]) -> Sequence[str | Fill]:
        rows = [self._rows(plan, number) for number, plan in enumerate(plans)]
        if any(plan.interleaved for plan in plans):
            # Within a second the film comes first: sorting is stable.
            ordered = sorted((row for item in rows for row in item), key=lambda row: int(row[0]))
        else:
            ordered = [row for item in rows for row in item]
        inner = _joined([piece for _, pieces in ordered for piece in pieces])
        return [piece for piece in (self.before, *inner, self.after) if piece != ""]

    def _rows(self, plan: ItemPlan, number: int) -> list[tuple[float, list[str | Fill]]]:
        """(second, pieces) of each time row of an item; one row where it has no times."""
        if len(plan.seconds) != plan.grid[0]:
            return [(0.0, [Fill(plan.length, number)])]
        fill = Fill(plan.length // plan.grid[0], number)
        stamped = plan.encoder in self.timestamped
        return [(at, [f"{at:.1f}s:", fill] if stamped else [fill]) for at in plan.seconds]

    def positions(
        self,
        token_ids: IntArray,
        spans: Sequence[Span],  # noqa: ARG002  (of the protocol)
        plans: Sequence[ItemPlan],  # noqa: ARG002
    ) -> IntArray:
        return np.arange(len(token_ids), dtype=np.int64)

    def decode_position(self, positions: IntArray) -> int:
        return int(positions[-1]) + 1


def _joined(pieces: Sequence[str | Fill]) -> list[str | Fill]:
    """Neighbouring positions of one item as one piece."""
    joined: list[str | Fill] = []
    for item, run in groupby(pieces, key=lambda p: p.item if isinstance(p, Fill) else None):
        if item is None:
            joined += run
        else:
            joined.append(Fill(sum(p.length for p in run if isinstance(p, Fill)), item))
    return joined
