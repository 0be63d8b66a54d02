"""What runs of one language model share: its weights, its tokenizer, frozen towers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.encoders.base import Encoder
from plait.trainer.backbone import Backbone


@dataclass(eq=False)
class Base:
    """A language model in memory, and what any number of runs on it have in common."""

    folder: Path
    backbone: Backbone
    tokenizer: Any
    """As it was saved: each run has a copy, whose template may be its own."""

    hash: str
    """Of the language model's files."""

    _towers: dict[str, Encoder] = field(default_factory=dict)

    def tower(self, key: str, load: Callable[[], Encoder]) -> Encoder:
        """The frozen tower of that key, loaded once for all runs."""
        if key not in self._towers:
            self._towers[key] = load()
        return self._towers[key]
