"""The layout of language models that were made for text alone."""

from collections.abc import Mapping, Sequence

import numpy as np

from plait.encoders.media_encoder import MediaEncoder
from plait.errors import Origin, RenderError
from plait.modalities import MediaPart
from plait.stream import IntArray, ItemPlan, Span


class PlainLayout:
    """Media positions stand in the row as they are, optionally between two texts.

    The placeholder is -1, which is no vocabulary id: no text can contain it and no model can
    generate it. Embedding look-ups must clamp it.

    Args:
        encoders: The encoder of each medium ("image").
        before: Text before each item, never learned.
        after: Text after each item.
    """

    placeholder_id = -1
    banned_ids: frozenset[int] = frozenset()

    def __init__(
        self, encoders: Mapping[str, MediaEncoder], before: str = "", after: str = ""
    ) -> None:
        self.encoders, self.before, self.after = dict(encoders), before, after

    def plan(self, part: MediaPart, origin: Origin) -> ItemPlan:
        """
        Raises:
            RenderError: no encoder reads this medium.
            DataError: the part's header cannot be read.
        """
        if part.medium not in self.encoders:
            known = ", ".join(sorted(self.encoders)) or "no medium"
            raise RenderError(
                f"each medium needs an encoder: this sample has {part.medium}, the model reads "
                f"{known}; add an encoder or remove the item",
                origin,
            )
        return self.encoders[part.medium].plan(part, origin)

    def pieces(self, plan: ItemPlan) -> Sequence[str | int]:
        pieces = (self.before, plan.length, self.after)
        return [piece for piece in pieces if piece != ""]

    def positions(
        self,
        token_ids: IntArray,
        spans: Sequence[Span],  # noqa: ARG002  (of the protocol)
        plans: Sequence[ItemPlan],  # noqa: ARG002
    ) -> IntArray:
        return np.arange(len(token_ids), dtype=np.int64)

    def decode_position(self, positions: IntArray) -> int:
        return int(positions[-1]) + 1
