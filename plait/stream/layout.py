"""What a model family must say so that media can be written into its row."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from plait.errors import Origin
from plait.modalities import MediaPart
from plait.stream.types import IntArray, ItemPlan, Span


@runtime_checkable
class Layout(Protocol):
    """How one model family writes media into its row: placeholders, wrappers, positions."""

    placeholder_id: int
    """The token id that stands at media positions; never looked up in the embedding table."""

    banned_ids: frozenset[int]
    """Token ids that must never be generated."""

    def plan(self, part: MediaPart, origin: Origin) -> ItemPlan:
        """What the part will take, read from its header alone."""

    def pieces(self, plan: ItemPlan) -> Sequence[str | int]:
        """Texts and numbers of media positions, in order: `["<img>", 9, "</img>"]`."""

    def positions(self, token_ids: IntArray, spans: Sequence[Span], plans: Sequence[ItemPlan]
                  ) -> IntArray:  # fmt: skip
        """Rotary positions (T,) or (3, T) of one document."""

    def decode_position(self, positions: IntArray) -> int:
        """The position of the token generated after a document with these positions."""
