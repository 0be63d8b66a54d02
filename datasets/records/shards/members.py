"""What the files of a shard's sample mean: a row, and where its media lie."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from plait.datasets.headers import facts_of, own_facts
from plait.datasets.records.dialects import dialect_of, keys_of
from plait.datasets.records.dialects.base import MEDIA_KEYS
from plait.datasets.records.dialects.captions import Captions
from plait.datasets.records.media import MARKS, MediaFinder, medium_of
from plait.datasets.records.tables import Row
from plait.datasets.records.tables.jsonl import parse_row
from plait.errors import DataError
from plait.modalities import FileSlice, Limits, MediaHeader, MediaPart
from plait.modalities.sources import KnownHeader

ROW, CAPTION, CLASS = "json", "txt", "cls"
"""What files with these suffixes hold; all others are media, or not read."""

_OWN_MEDIA = frozenset({*MEDIA_KEYS, *MARKS, "file", "filename", "file_name"})
"""Keys of a row that says itself which its media are."""


@dataclass(frozen=True)
class MemberFinder(MediaFinder):
    """Makes parts of the files of one sample.

    Args:
        members: By suffix, with the name in the shard: where each medium lies.
        headers: By suffix and `own_facts`, those that the shard's index knows, under `limits`.
    """

    members: Mapping[str, tuple[str, FileSlice | bytes]] = field(default_factory=dict)
    headers: Mapping[tuple[str, str], MediaHeader] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def source(self, medium: str, value: Any) -> Any:
        """The file of the sample that a string names, by suffix or by name.

        Where a sample has one file of the medium, any other name means it: rows often keep the
        name that the file had before it came into the shard.
        """
        if not isinstance(value, str) or value.startswith("data:") or "://" in value[:32]:
            return super().source(medium, value)
        for suffix, (name, held) in self.members.items():
            if value in (suffix, name):
                return held
        alike = [held for name, held in self.members.values() if medium_of(name) == medium]
        if len(alike) == 1:
            return alike[0]
        raise DataError(
            f"a {medium} of a shard's row must be one of the sample's files "
            f"({', '.join(self.members) or 'it has none'}); {value[:80]!r} is not; mend the row"
        )

    def part(self, medium: str, value: Any) -> MediaPart:
        found = super().part(medium, value)
        source = getattr(found, "source", None)
        if not self.headers or not isinstance(source, FileSlice):
            return found
        suffix = next(s for s, (_, held) in self.members.items() if held is source)
        header = self.headers.get((suffix, own_facts(found)))
        if header is None:
            return found
        known = KnownHeader(facts_of(found, self.limits), header)
        return replace(found, source=replace(source, known=known))  # type: ignore[type-var]


def media_of(names: Mapping[str, str]) -> dict[str, str]:
    """Suffix and medium of those files, given with their names, that are media."""
    found = {suffix: medium_of(name) for suffix, name in names.items()}
    return {suffix: medium for suffix, medium in found.items() if medium is not None}


def unread_of(suffixes: Mapping[str, str]) -> list[str]:
    """The suffixes of files that no row reads."""
    media = media_of(suffixes)
    return [s for s in suffixes if s not in media and s not in (ROW, CAPTION, CLASS)]


def row_of(names: Mapping[str, str], read: Callable[[str], bytes]) -> Row:
    """The row that a sample's files make.

    Args:
        names: The files' names in the shard, by suffix, in the shard's order.
        read: The bytes of one of them.

    Raises:
        DataError: they make none.
    """
    media = media_of(names)
    row = parse_row(read(ROW), "one JSON object") if ROW in names else None
    if row is not None:
        row = _with_media(row, names, media)
        if _has_dialect(row) or CAPTION not in names:
            return row
    if CAPTION not in names:
        raise DataError(
            "a sample of a shard must have a .json or a .txt; its files end in "
            f"{', '.join(names)[:200]}; write it again"
        )
    text = _text(read(CAPTION), CAPTION)
    label = {"class": _text(read(CLASS), CLASS).strip()} if CLASS in names else {}
    return _captioned(text, label, names, media)


def _has_dialect(row: Row) -> bool:
    try:
        dialect_of(row)
    except DataError:
        return False
    return True


def _with_media(row: Row, names: Mapping[str, str], media: Mapping[str, str]) -> Row:
    """The row with all media of the sample, where it does not say itself which are its own."""
    if keys_of(row) & _OWN_MEDIA or not media:
        return row
    (suffix, *more) = media
    captioned = {**row, "file": names[suffix]}
    if not more and Captions().fits(keys_of(captioned)) and "messages" not in row:
        return captioned
    lists = {key: [s for s in media if media[s] == held] for key, held in MEDIA_KEYS.items()}
    return {**row, **{key: suffixes for key, suffixes in lists.items() if suffixes}}


def _captioned(text: str, label: Row, names: Mapping[str, str], media: Mapping[str, str]) -> Row:
    if not media:
        return {"text": text}
    if len(media) == 1:
        (suffix,) = media
        return {"file": names[suffix].removeprefix("./"), "text": text, **label}
    asked = [{"type": medium} for medium in media.values()]
    answer = [{"type": "text", "text": text}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    lists = {key: [s for s in media if media[s] == held] for key, held in MEDIA_KEYS.items()}
    return {"messages": turns, "label": label.get("class", ""), **lists}


def _text(content: bytes, suffix: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"a sample's .{suffix} must be UTF-8; byte {error.start} is not; save it as UTF-8"
        ) from error
