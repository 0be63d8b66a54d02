"""Documents and the rows they are packed into.

Shape letters: T positions of a row or of a document, K soft targets of a position, N positions
of one media item, C channels.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.errors import DataError, ModelError, Origin
from plait.modalities import MediaPart

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ItemPlan:
    """What an encoder promises for one item, from header facts alone.

    `grid` is (time, height, width) in positions; `bidirectional` says that the positions of the
    item see one another in both directions. `seconds` is when each time row of the grid begins,
    for media that have time, and `wanted` what decoding is asked for; `frames` are those that are
    read of a film. `interleaved` marks a soundtrack whose positions stand between the frames of its
    film.
    """

    encoder: str
    length: int
    grid: tuple[int, int, int]
    bidirectional: bool = False
    seconds: tuple[float, ...] = ()
    wanted: Any = None
    frames: int = 0
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """One media item of a document: the part, what was promised for it, and its view.

    `track_of` is the number of the film whose soundtrack this item is.
    """

    part: MediaPart
    plan: ItemPlan
    view: int = 0
    origin: Origin = field(default_factory=Origin)
    track_of: int | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """`length` positions from `start` that `encoder` fills from item `item`, features `offset`...

    One item may take many spans (film frames between timestamps). The ITEM is atomic: it is never
    split over rows and never truncated inside. `group` marks positions that see one another in
    both directions; None is causal.
    """

    start: int
    length: int
    encoder: str
    item: int
    offset: int = 0
    group: int | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's numbers as they lie in memory, one behind another, whatever its strides."""
    # A single number of a larger tensor has its stride still, and torch takes it for contiguous.
    flat = torch.empty(tensor.shape, dtype=tensor.dtype)
    flat.copy_(tensor.detach())
    return flat.reshape(-1).view(torch.uint8).numpy().data


@dataclass(slots=True)
class ItemInputs:
    """A loaded item: the encoder's CPU-processed inputs, or its cached frozen features (N, C)."""

    inputs: dict[str, Tensor] | None = None
    features: "Encoded | None" = None
    _digest: str = field(default="", init=False, repr=False, compare=False)

    def digest(self) -> str:
        """SHA-256, in hex, of what is read of the item; computed once.

        Of the content, not of the file, which may be another by now, or gone.
        """
        if not self._digest:
            found = hashlib.sha256()
            for name, tensor in sorted(self._tensors().items()):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(bytes_of(tensor))
            self._digest = found.hexdigest()
        return self._digest

    def _tensors(self) -> dict[str, Tensor]:
        found = dict(self.inputs or {})
        if self.features is not None:
            layers = {f"layer {number}": t for number, t in enumerate(self.features.layers)}
            found |= {"features": self.features.embeddings, **layers}
        return found


@dataclass(slots=True)
class Encoded:
    """What an encoder returns for one item.

    `embeddings` (N, C); `layers` carries features (N, C) for deeper layers of the language model
    where a family has them; `grid` is (time, height, width); `seconds` the time of each row of
    the grid, for media that have time.
    """

    embeddings: Tensor
    layers: tuple[Tensor, ...] = ()
    grid: tuple[int, int, int] = (1, 1, 1)
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A rendered sample: T positions, what each should predict, and what fills the media.

    `targets[i]` is the token after position i, 0 where that is a media item (whose placeholder
    need not be a token) and throughout a prompt; `weights[i]` is 0 where nothing is learned.
    `positions` is (T,) or (3, T). Documents of one `group` stay in one micro-batch.
    """

    token_ids: IntArray
    targets: IntArray
    weights: FloatArray
    positions: IntArray
    spans: tuple[Span, ...] = ()
    items: tuple[Item, ...] = ()
    sample_id: str = ""
    origin: Origin = field(default_factory=Origin)
    run: str = ""
    loss_inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    group: int | None = None

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def visible(self) -> IntArray:
        """(2, T): the first and one past the last position that each position may attend."""
        last = np.arange(1, self.length + 1)
        groups: dict[int, list[Span]] = {}
        for span in self.spans:
            if span.group is not None:
                groups.setdefault(span.group, []).append(span)
        for spans in groups.values():
            start, stop = min(s.start for s in spans), max(s.stop for s in spans)
            last[start:stop] = np.maximum(last[start:stop], stop)
        return np.stack([np.zeros_like(last), last])


@dataclass(slots=True)
class MediaBatch:
    """The items of one encoder in a stream, and the stream positions (P,) their features fill.

    `sources[p]` is the row, in the concatenation of all items' features, that position p takes.
    """

    items: list[ItemInputs]
    plans: list[ItemPlan]
    origins: list[Origin]
    index: Tensor
    sources: Tensor

    def check(self, encoded: Sequence[Encoded]) -> None:
        """Refuse features whose number is not the number of placeholders, naming the row."""
        if len(encoded) != len(self.plans):
            name = self.plans[0].encoder
            raise ModelError(
                f"encoder {name!r} must return features for each item: it was given "
                f"{len(self.plans)} items and returned {len(encoded)}"
            )
        for plan, origin, item in zip(self.plans, self.origins, encoded, strict=True):
            if len(item.embeddings) != plan.length:
                raise DataError(
                    f"placeholders must equal features: {plan.length} positions were planned for "
                    f"encoder {plan.encoder!r} but it returned {len(item.embeddings)}; its plan() "
                    "and forward() disagree",
                    origin,
                )
            for number, layer in enumerate(item.layers):
                if len(layer) != plan.length:
                    raise DataError(
                        f"placeholders must equal features: {plan.length} positions were planned "
                        f"for encoder {plan.encoder!r} but layer {number} of its features has "
                        f"{len(layer)}; mend its forward()",
                        origin,
                    )


@dataclass(slots=True)
class TokenStream:
    """One packed row of T positions and everything that is said per document.

    `targets` and `weights` are (T,) or (T, K); `positions` (T,) or (3, T); `visible` (2, T).
    `bounds` holds the documents' (start, stop). Lists `run`, `sample_id` and `group` have
    one entry per document.
    """

    token_ids: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    visible: Tensor
    media: dict[str, MediaBatch]
    bounds: list[tuple[int, int]]
    run: list[str]
    sample_id: list[str]
    group: list[int | None]
    origins: list[Origin]
    loss_inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.token_ids.shape[0]

    @property
    def is_media(self) -> Tensor:
        """(T,) bool: the positions that encoders fill."""
        mask = torch.zeros(self.length, dtype=torch.bool)
        for batch in self.media.values():
            mask[batch.index] = True
        return mask
