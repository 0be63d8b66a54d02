"""What a dataset holds and what is wrong with it, row by row, before any training.

Headers are read, through the cache; media are decoded only on request. Nothing is left out: every
row is either described or a problem.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from plait.datasets.executor import Executor
from plait.datasets.headers import own_facts
from plait.datasets.planning import origin_of, placed, unread
from plait.datasets.records import Records
from plait.errors import DataError, Origin
from plait.modalities import Limits, MediaHeader, MediaPart, Text
from plait.stream import Sample

_ROWS_A_BATCH = 32

Inspect = Callable[[Sample], int]
"""Positions that a sample takes; raises `DataError` where it cannot be rendered."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used; with `warning`, why it is probably not what was meant."""

    origin: Origin
    message: str
    warning: bool = False

    def plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        place = {"dataset": self.origin.dataset, "row": self.origin.row, "file": self.origin.file}
        return {**place, "kind": "warning" if self.warning else "error", "message": self.message}


@dataclass(slots=True)
class MediumFacts:
    """The items of one medium: how many, of which formats, bytes in all, and numbers of each.

    `numbers` are what headers say, by name ("width", "seconds", ...), a value an item.
    """

    count: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def add(self, header: Any) -> None:
        self.count += 1
        self.bytes += header.bytes
        self.formats[header.format] += 1
        for name in ("width", "height", "seconds", "fps", "rate", "channels"):
            value = getattr(header, name, None)
            if value is not None:
                self.numbers.setdefault(name, []).append(float(value))


@dataclass(slots=True)
class Survey:
    """What was found. `characters` are those of each usable row's texts, `positions` what
    `inspect` gave; `kinds` counts rows by the media that they hold ("image + text")."""

    name: str
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    media: dict[str, MediumFacts] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        """What stops a row from being used."""
        return [problem for problem in self.problems if not problem.warning]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that can be used, as far as anybody looked."""

    sample: Sample
    origin: Origin
    headers: list[tuple[str, MediaHeader]]
    positions: int | None


def survey(
    records: Records,
    header: Callable[[MediaPart, Limits], MediaHeader],
    *,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    inspect: Inspect | None = None,
    decode: Callable[[MediaPart], object] | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Look at every row.

    Args:
        header: Reads a header, from many threads: a `HeaderCache`.
        inspect: Renders a sample; called by one thread at a time.
        decode: Decodes a medium to its end, from many threads.
        progress: Called with (done, all).
    """
    found = Survey(records.name, len(records))
    seen: dict[bytes, Origin] = {}
    reading, rendering = threading.Lock(), threading.Lock()

    def look(row: int) -> _Row | Problem:
        try:
            with reading:
                sample = records[row]
        except DataError as error:
            known = unread(error, row)
            return Problem(known.origin, known.message)
        origin = origin_of(sample, row)
        try:
            headers = [(part.medium, header(part, limits)) for part in sample.media()]
            for part in sample.media() if decode else ():
                decode(part)  # type: ignore[misc]
            with rendering:
                return _Row(sample, origin, headers, inspect(sample) if inspect else None)
        except DataError as error:
            known = placed(error, origin)
            return Problem(known.origin, known.message)

    numbers = range(len(records))
    batches = (numbers[at : at + _ROWS_A_BATCH] for at in range(0, len(records), _ROWS_A_BATCH))
    with closing(Executor(workers).map(look, batches)) as looked:
        for number, done in enumerate(done for batch in looked for done in batch):
            if progress is not None and number % _ROWS_A_BATCH == 0:
                progress(number, len(records))
            row = done.result()
            if isinstance(row, Problem):
                found.problems.append(row)
            else:
                _count(found, row)
                found.problems += _warnings(row, seen)
    found.problems += [
        Problem(Origin(records.name, None, left.file), left.reason, warning=True)
        for left in records.left_out
    ]
    if progress is not None:
        progress(len(records), len(records))
    return found


def _count(found: Survey, row: _Row) -> None:
    sample = row.sample
    for medium, header in row.headers:
        found.media.setdefault(medium, MediumFacts()).add(header)
    held = sorted({medium for medium, _ in row.headers})
    texts = [part.text for part in sample.every_part() if isinstance(part, Text)]
    found.kinds[" + ".join([*held, *(["text"] if texts else [])])] += 1
    found.characters.append(sum(map(len, texts)))
    found.turns.append(len(sample.messages))
    if sample.label:
        found.labels[sample.label] += 1
    if row.positions is not None:
        found.positions.append(row.positions)


def _warnings(row: _Row, seen: dict[bytes, Origin]) -> list[Problem]:
    """What training would take, and its author probably did not mean."""
    said = [] if row.sample.parts else [_answers(row.sample)]
    first = seen.setdefault(_fingerprint(row.sample), row.origin)
    if first is not row.origin:
        said.append(f"a row should be learned once; this one says what row {first.row} says")
    return [Problem(row.origin, message, warning=True) for message in said if message]


def _answers(sample: Sample) -> str:
    answers = [turn for turn in sample.messages if turn.role == "assistant" and turn.weight]
    if not answers:
        return "a row should teach an answer; this one has no assistant's turn with a weight"
    empty = [turn for turn in answers if not turn.tool_calls and not _text(turn.parts).strip()]
    return "an answer should say something; one of this row is empty" if empty else ""


def _text(parts: Sequence[object]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def _fingerprint(sample: Sample) -> bytes:
    """Of all that a row says: texts, roles, weights, and which media they are."""

    def part(one: Any) -> Any:
        if isinstance(one, Text):
            return one.text
        source = getattr(one, "source", None)
        where = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else one.file
        return [one.medium, where, own_facts(one)]

    turns = [[m.role, [part(p) for p in m.parts], m.weight, m.tool_calls] for m in sample.messages]
    said = json.dumps([[part(p) for p in sample.parts], turns], default=str)
    return hashlib.sha256(said.encode()).digest()
