"""What a model family must say so that media can be written into its row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from plait.errors import Origin
from plait.modalities import MediaPart
from plait.stream.types import IntArray, ItemPlan, Span


@dataclass(frozen=True, slots=True)
class Fill:
    """`length` positions for the next features of item `item`, of those planned together."""

    length: int
    item: int = 0


@runtime_checkable
class Layout(Protocol):
    """How one model family writes media into its row: placeholders, wrappers, positions."""

    placeholder_id: int
    """The token id that stands at media positions; never looked up in the embedding table."""

    banned_ids: frozenset[int]
    """Token ids that must never be generated."""

    def plan(self, part: MediaPart, origin: Origin) -> Sequence[tuple[MediaPart, ItemPlan]]:
        """What the part will take, read from its header alone: a film with its sound is two items.

        The first is the part itself; what follows is read beside it.
        """

    def pieces(self, plans: Sequence[ItemPlan]) -> Sequence[str | Fill]:
        """Texts and media positions of one part, in order: `["<img>", Fill(9), "</img>"]`."""

    def positions(self, token_ids: IntArray, spans: Sequence[Span], plans: Sequence[ItemPlan]
                  ) -> IntArray:  # fmt: skip
        """Rotary positions (T,) or (3, T) of one document."""

    def decode_position(self, positions: IntArray) -> int:
        """The position of the token generated after a document with these positions."""
