"""How rows are ordered, packed and decoded, and what of it the sequence of packs depends on."""

import hashlib
import json
from dataclasses import dataclass

from plait.datasets.packing import WINDOW
from plait.datasets.planning import Measured
from plait.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSettings:
    """How rows are ordered, packed and decoded."""

    capacity: int
    """Positions of a pack at most."""

    seed: int = 0
    """Orders the rows of each epoch and picks their views; 0 or more."""

    max_documents: int | None = None
    """Documents of a pack at most; None is no limit."""

    workers: int = 2
    """Threads that decode; 0 decodes in the training thread. Never changes what is loaded."""

    prefetch: int = 4
    """Packs decoded ahead of the one in training. Never changes what is loaded."""

    views: int = 1
    """Augmented views of each sample; `views` epochs in a row show each of them once."""

    epochs: int | None = None
    """Passes over the rows; None goes on for ever."""

    shuffle: bool = True
    """Another order in each epoch; False keeps the order of the rows."""

    window: int = WINDOW
    """Samples that packing holds back at most."""

    def __post_init__(self) -> None:
        least = {"capacity": 1, "seed": 0, "max_documents": 1, "workers": 0, "prefetch": 0}
        for name, low in (least | {"views": 1, "epochs": 0, "window": 1}).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} must be at least {low}, not {value}")


def fingerprint(measured: Measured, settings: LoaderSettings) -> str:
    """What the sequence of packs depends on, hashed; ids tell rows of equal lengths apart."""
    s = settings
    facts = [s.seed, s.capacity, s.max_documents, s.views, s.shuffle, s.window]
    rows = [[row.row, row.id, row.length, str(row.group)] for row in measured.rows]
    return hashlib.sha256(json.dumps([facts, rows]).encode()).hexdigest()
