"""What rows' keys mean. To add a dialect, write a subclass of `Dialect` and its line here."""

from collections.abc import Mapping
from typing import Any

from plait.datasets.records.dialects.base import Dialect, Draft
from plait.datasets.records.dialects.captions import Captions
from plait.datasets.records.dialects.messages import Messages
from plait.datasets.records.dialects.preference import Preference
from plait.datasets.records.dialects.questions import Instructions
from plait.datasets.records.dialects.sharegpt import ShareGpt
from plait.datasets.records.dialects.text import PlainText
from plait.datasets.records.values import refuse_misspelt
from plait.errors import DataError

__all__ = ["ROW_DIALECTS", "Dialect", "Draft", "check_keys", "dialect_of", "keys_of"]

ROW_DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Preference(), Messages(), ShareGpt(), Instructions(), Captions(), PlainText()
    )
}  # fmt: skip
"""By name, in the order in which a row is tried: the first that fits is the row's."""

_TELLING = (
    "messages", "conversations", "chosen", "rejected", "instruction", "output", "question",
    "answer", "prompt", "completion", "text", "caption", "file", "images", "audios", "videos",
)  # fmt: skip


def keys_of(row: Mapping[str, Any]) -> frozenset[str]:
    """The keys under which a row has something: a null is the same as no key."""
    return frozenset(key for key, value in row.items() if value is not None)


def dialect_of(row: Mapping[str, Any]) -> Dialect:
    """The dialect that a row's keys say.

    Raises:
        DataError: none has these keys.
    """
    keys = keys_of(row)
    for dialect in ROW_DIALECTS.values():
        if dialect.fits(keys):
            return dialect
    refuse_misspelt("row key", sorted(keys), _TELLING)
    raise DataError(
        "a row must have messages, conversations, text, chosen and rejected, an instruction and "
        "its output, or a file and its caption; it has "
        f"{', '.join(sorted(keys))[:200] or 'no keys'}; rename its keys"
    )


def check_keys(keys: frozenset[str], dialect: Dialect) -> frozenset[str]:
    """The keys that the dialect does not read.

    Raises:
        DataError: one is nearly a name that it reads.
    """
    unread = keys - set(dialect.keys) - {"[]"}
    refuse_misspelt("row key", sorted(unread), dialect.keys)
    return unread
