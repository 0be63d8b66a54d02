"""JSONL: a JSON object a line."""

import json
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from plait.datasets.records.tables.base import BARE, IndexedTable, Row
from plait.datasets.records.values import type_name
from plait.errors import DataError

_BLOCK = 1 << 20  # bytes read at once while lines are looked for


class JsonlTable(IndexedTable):
    """One row a line that is not empty; opening looks for line ends and parses nothing."""

    kind: ClassVar[str] = "jsonl"
    what: ClassVar[str] = "a JSONL file"
    endings: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    def index(self, content: BinaryIO) -> NDArray[np.int64]:
        return _line_bounds(content)

    def parse(self, content: bytes) -> Row:
        return parse_row(content, "JSON on one line")


def parse_row(content: bytes, rule: str) -> Row:
    """A JSON object, or a bare list under the key `BARE`.

    Raises:
        DataError: it is not UTF-8, no JSON, or of another type.
    """
    try:
        row: Any = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"a JSON row must be UTF-8; byte {error.start} of it is not; save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"a JSON row must be {rule}; {error.msg} at character {error.pos + 1}; mend or remove "
            "the row"
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"a JSON row must be plain JSON; {error}; mend or remove it") from error
    if isinstance(row, list):
        return {BARE: row}
    if not isinstance(row, dict):
        raise DataError(
            f"a JSON row must be an object; it is {type_name(row)}; write one object a row"
        )
    return row


def _line_bounds(content: BinaryIO) -> NDArray[np.int64]:
    """The bounds of each line that is not empty."""
    ends, position = [], 0
    while block := content.read(_BLOCK):
        ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
        position += len(block)
    stops = np.concatenate([*ends, np.array([position])]).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
    keep = stops > starts
    for row in np.flatnonzero(stops - starts == 1):  # perhaps only the \r of an empty line
        content.seek(int(starts[row]))
        keep[row] = bool(content.read(1).strip())
    return np.stack([starts, stops], axis=1)[keep]
