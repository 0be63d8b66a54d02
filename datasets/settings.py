"""How rows are ordered, packed and decoded."""

from dataclasses import dataclass
from typing import Literal

from plait.datasets.packing import WINDOW
from plait.errors import ConfigError

Packing = Literal["stream", "decreasing"]

PREFETCH_BYTES = 512_000_000
"""What packs decoded ahead may hold: half a gigabyte is some 800 pictures of 448 x 448 floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLimits:
    """The budgets of a pack; None is no limit. What a row takes is known from its headers."""

    capacity: int
    """Positions of a pack at most."""

    max_documents: int | None = None
    """Documents of a pack at most."""

    max_patches: int | None = None
    """Positions of a pack that pictures fill at most."""

    max_frames: int | None = None
    """Frames of films in a pack at most."""

    max_squares: int | None = None
    """The sum of the squared lengths of a pack's documents at most, to which the time of their
    attention is proportional."""

    def given(self) -> dict[str, int]:
        """The budgets that limit something, by name; positions and documents always do."""
        # A document has a position, so that `capacity` documents always suffice.
        found = {"positions": self.capacity, "documents": self.max_documents or self.capacity}
        more = {
            "patches": self.max_patches, "frames": self.max_frames, "squares": self.max_squares,
        }  # fmt: skip
        return found | {name: limit for name, limit in more.items() if limit is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSettings(PackLimits):
    """How rows are ordered, packed and decoded."""

    seed: int = 0
    """Orders the rows of each epoch and picks their views; 0 or more."""

    workers: int = 2
    """Threads that decode; 0 decodes in the training thread. Never changes what is loaded."""

    prefetch: int = 4
    """Packs decoded ahead of the one in training. Never changes what is loaded."""

    prefetch_bytes: int = PREFETCH_BYTES
    """Bytes that packs decoded ahead may hold before decoding waits. Never changes what is
    loaded; the next pack is decoded whatever it holds."""

    views: int = 1
    """Augmented views of each sample; `views` epochs in a row show each of them once."""

    epochs: int | None = None
    """Passes over the rows (of a blend: over as many as all its datasets have); None goes on for
    ever."""

    shuffle: bool = True
    """Another order in each epoch; False keeps the order of the rows."""

    packing: Packing = "stream"
    """"stream" packs in one pass and holds back `window` samples; "decreasing" sorts by length
    and fills packs a little better where lengths are large, and less mixed."""

    window: int = WINDOW
    """Samples that packing in a stream holds back at most, and packs for which a sample waits."""

    def __post_init__(self) -> None:
        least = {"capacity": 1, "seed": 0, "max_documents": 1, "workers": 0, "prefetch": 0}
        least |= {"max_patches": 0, "max_frames": 0, "max_squares": 1, "prefetch_bytes": 0}
        for name, low in (least | {"views": 1, "epochs": 0, "window": 1}).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} must be at least {low}, not {value}")
        if self.packing not in ("stream", "decreasing"):
            raise ConfigError(f"packing is 'stream' or 'decreasing', not {self.packing!r}")
