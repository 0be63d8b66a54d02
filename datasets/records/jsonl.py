"""JSONL: one conversation a line.

    {"messages": [{"role": "user", "content": "<image>What is this?"},
                  {"role": "assistant", "content": "A frog."}],
     "images": ["frog.png"]}

Each `<image>`, in the order of reading, is the next file of `images`. `id` and `label` are
optional, and so is a message's `weight`, which scales the loss of an assistant's turn.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from plait.datasets.records.base import (
    PICTURE_MARK,
    Records,
    interleave,
    refuse_unknown,
    type_name,
)
from plait.errors import DataError, Origin
from plait.modalities import Image, Text
from plait.stream import Message, Sample

ROW_KEYS = ("messages", "images", "id", "label")
MESSAGE_KEYS = ("role", "content", "weight")
ROLES = ("system", "developer", "user", "assistant", "tool")

_BLOCK = 1 << 20  # bytes read at once while lines are looked for


class JsonlRecords(Records):
    """One row a line that is not empty; opening looks for line ends and parses nothing.

    An index of 16 bytes a row is held. A file that changes after it was opened is refused.
    """

    dialect: ClassVar[str] = "jsonl"
    suffix: ClassVar[str] = ".jsonl"
    options: ClassVar[frozenset[str]] = frozenset({"media_dir"})

    def __init__(self, path: Path, *, name: str, media_dir: str | Path | None = None) -> None:
        super().__init__(path, name=name)
        self.file = self.table()
        self.media_dir = Path(media_dir) if media_dir is not None else self.file.parent
        try:
            with self.file.open("rb") as file:
                self._state = _state(file)
                self._bounds = _line_bounds(file)
        except OSError as error:
            raise DataError(
                f"a JSONL file must be readable; {error.strerror}; mend the path",
                Origin(name, None, str(self.file)),
            ) from error
        self.refuse_empty("write one JSON object a line")

    def __len__(self) -> int:
        return len(self._bounds)

    def sample(self, row: int) -> Sample:
        origin = Origin(self.name, row, str(self.file))
        try:
            fields = _parse(self._line(row))
            return self._build(fields, row, origin)
        except DataError as error:
            raise error.at(origin) from None

    def _line(self, row: int) -> bytes:
        start, stop = (int(bound) for bound in self._bounds[row])
        try:
            with self.file.open("rb") as file:
                if _state(file) != self._state:
                    raise DataError(
                        "a dataset must not change while it is read; this file did; open it again"
                    )
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise DataError(
                f"a JSONL file must stay readable; {error.strerror}; open it again"
            ) from error

    def _build(self, fields: Mapping[str, Any], row: int, origin: Origin) -> Sample:
        turns = [_turn(turn) for turn in _list(fields, "messages")]
        if not turns:
            raise DataError("a row must have messages; its list is empty; add one or remove it")
        files = [self._picture(file) for file in _list(fields, "images")]
        marks = [turn["content"].count(PICTURE_MARK) for turn in turns]
        if sum(marks) != len(files):
            raise DataError(
                f"a row must have as many {PICTURE_MARK} as files in images; it has {sum(marks)} "
                f"{PICTURE_MARK} and {len(files)} files; add or remove one"
            )
        messages, used = [], 0
        for turn, count in zip(turns, marks, strict=True):
            parts = interleave(turn["content"], files[used : used + count])
            messages.append(Message(turn["role"], parts, float(turn.get("weight", 1.0))))
            used += count
        return Sample(
            messages=tuple(messages),
            id=_string(fields, "id") or f"{self.file.name}#{row}",
            label=_string(fields, "label"),
            origin=origin,
        )

    def _picture(self, file: Any) -> Image:
        if not isinstance(file, str) or not file or "\0" in file:
            raise DataError(
                f"images must hold paths of files; it holds {type_name(file)}: {file!r}"[:200]
                + "; write the path as a string"
            )
        if "://" in file or file.startswith("data:"):
            raise DataError(
                f"images must hold paths of files; {file[:80]!r} is an address; download it first"
            )
        return Image(self.media_dir / file)


def _state(file: BinaryIO) -> tuple[int, int]:
    facts = os.fstat(file.fileno())
    return facts.st_size, facts.st_mtime_ns


def _line_bounds(file: BinaryIO) -> NDArray[np.int64]:
    """(rows, 2): the first and one past the last byte of each line that is not empty."""
    ends, position = [], 0
    while block := file.read(_BLOCK):
        ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
        position += len(block)
    stops = np.concatenate([*ends, np.array([position])]).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
    keep = stops > starts
    for row in np.flatnonzero(stops - starts == 1):  # perhaps only the \r of an empty line
        file.seek(int(starts[row]))
        keep[row] = bool(file.read(1).strip())
    return np.stack([starts, stops], axis=1)[keep]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"a JSONL row must be UTF-8; byte {error.start} of it is not; save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"a JSONL row must be JSON on one line; {error.msg} at character {error.colno}; mend "
            "or remove the row"
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"a JSONL row must be plain JSON; {error}; mend or remove it") from error
    if not isinstance(row, dict):
        raise DataError(
            f"a JSONL row must be an object with messages; it is {type_name(row)}; write one "
            "object a line, without brackets around the whole"
        )
    refuse_unknown("row key", list(row), ROW_KEYS)
    return row


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    value = fields.get(key, [])
    if not isinstance(value, list):
        raise DataError(f"{key} must be a list; it is {type_name(value)}; write it in brackets")
    return value


def _string(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key, "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{key} must be a string; it is {type_name(value)}; write it in quotes")
    try:
        return Text(str(value)).text
    except DataError as error:
        raise DataError(f"{key}: {error.message}") from None


def _turn(turn: Any) -> Mapping[str, Any]:
    """A message, checked."""
    if not isinstance(turn, dict):
        raise DataError(
            f"a message must be an object with role and content; it is {type_name(turn)}; "
            'write {"role": ..., "content": ...}'
        )
    refuse_unknown("message key", list(turn), MESSAGE_KEYS)
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            said = type_name(turn[key]) if key in turn else "missing"
            raise DataError(f"a message's {key} must be a string; it is {said}; write it as one")
    refuse_unknown("role", [turn["role"]], ROLES)
    weight = turn.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise DataError(f"a message's weight must be a number; it is {type_name(weight)}")
    try:
        usable = math.isfinite(weight) and weight >= 0
    except OverflowError:  # JSON holds integers that no float does
        usable = False
    if not usable:
        said = f"{weight}"[:20]
        raise DataError(f"a message's weight must be 0 or more; it is {said}; use 0 to 1")
    return turn
