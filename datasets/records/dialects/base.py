"""What every dialect is: from a row's keys to the samples that the row says."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from plait.datasets.records.media import MARKS, MediaFinder
from plait.datasets.records.values import listed
from plait.errors import DataError
from plait.modalities import MediaPart, Part, Text
from plait.stream import Message

MEDIA_KEYS = {"images": "image", "audios": "audio", "videos": "video"}
"""The lists that a row may hold, and their medium."""

COMMON = ("id", "label", *MEDIA_KEYS)

_MARK = re.compile("|".join(MARKS.values()))
_MEDIUM_OF = {mark: medium for medium, mark in MARKS.items()}


@dataclass(frozen=True, slots=True)
class Draft:
    """What a row says, before it has an id and a place; `side` names one document of several."""

    messages: tuple[Message, ...] = ()
    parts: tuple[Part, ...] = ()
    side: str = ""
    id: str = ""
    label: str = ""


class Dialect(ABC):
    """A meaning of rows' keys. Stateless, so that each row stands for itself.

    `sides` are the documents that a row makes, ("",) for a single one; `keys` whatever is read.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    sides: ClassVar[tuple[str, ...]] = ("",)

    @abstractmethod
    def fits(self, keys: frozenset[str]) -> bool:
        """Whether a row with these keys is of this dialect."""

    @abstractmethod
    def draft(self, row: Mapping[str, Any], side: str, finder: MediaFinder) -> Draft:
        """One document of a row.

        Raises:
            DataError: the row cannot be used.
        """


class Dealer:
    """Deals a row's media over its texts: each mark, in the order of reading, is the next file."""

    def __init__(self, held: Mapping[str, Sequence[MediaPart]]) -> None:
        self.held = {medium: list(parts) for medium, parts in held.items() if parts}
        self.used = dict.fromkeys(MARKS, 0)

    @classmethod
    def of_row(cls, row: Mapping[str, Any], finder: MediaFinder, **single: str) -> "Dealer":
        """The media of the row's lists; `single` names other keys, by medium, that hold one."""
        held: dict[str, list[MediaPart]] = {medium: [] for medium in MARKS}
        for key, medium in MEDIA_KEYS.items():
            held[medium] += [finder.part(medium, value) for value in listed(row, key)]
        for medium, key in single.items():
            value = row.get(key)
            if value is not None and value != "":
                values = value if isinstance(value, list) else [value]
                held[medium] += [finder.part(medium, one) for one in values]
        return cls(held)

    def parts(self, text: str) -> tuple[Part, ...]:
        """The text with its marks replaced; text is otherwise kept as it is."""
        parts: list[Part] = []
        begin = 0
        for mark in _MARK.finditer(text):
            medium = _MEDIUM_OF[mark.group()]
            number = self.used[medium]
            self.used[medium] += 1
            parts += [Text(text[begin : mark.start()])] if mark.start() > begin else []
            if number < len(self.held.get(medium, ())):
                parts.append(self.held[medium][number])
            begin = mark.end()
        if begin < len(text):
            parts.append(Text(text[begin:]))
        return tuple(parts)

    def check(self) -> None:
        """Refuse a row whose marks and files are not as many, once all texts are read."""
        for medium, mark in MARKS.items():
            used, held = self.used[medium], len(self.held.get(medium, ()))
            if used != held:
                raise DataError(
                    f"a row must have as many {mark} as files in {medium}s; it has {used} {mark} "
                    f"and {held} files; add or remove one"
                )

    def unmarked(self) -> tuple[MediaPart, ...]:
        """All media, where no text says where they stand: before it, as most datasets mean it.

        They count as dealt.
        """
        if any(self.used.values()):
            return ()
        self.used = {medium: len(self.held.get(medium, ())) for medium in MARKS}
        return tuple(part for medium in MARKS for part in self.held.get(medium, ()))


def marks_in(texts: Iterable[str]) -> bool:
    """Whether a text says where a medium stands."""
    return any(_MARK.search(text) for text in texts)
