"""A cache of media headers, so that a dataset whose files did not change is planned at once.

    $PLAIT_HOME/headers/2.sqlite      one line a file and cut: its size, its mtime, its header

A header is taken from the cache where path, size, modification time in nanoseconds, the part's
own fields (a cut, a sampling) and the limits are those of the day it was read; then the file is
not opened. Only what lies at a path is kept; sources in memory are read each time. A cache that is
damaged is begun anew, one that is locked or cannot be written is passed over: it never fails.
"""

import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from plait.errors import DataError
from plait.modalities import (
    AudioHeader,
    FileSlice,
    ImageHeader,
    Limits,
    MediaHeader,
    MediaPart,
    VideoHeader,
)
from plait.stream import Sample

HEADERS: dict[str, type[Any]] = {
    "image": ImageHeader,
    "audio": AudioHeader,
    "video": VideoHeader,
}
"""The header of each medium; those of others are not kept."""

_FORMAT = 2
_IN_MEMORY = 8192
_WRITTEN_TOGETHER = 256
_WAIT_SECONDS = 2.0

_TABLE = """
CREATE TABLE IF NOT EXISTS headers (
    path TEXT NOT NULL, facts TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    header TEXT NOT NULL, PRIMARY KEY (path, facts)
) WITHOUT ROWID
"""

_Key = tuple[str, str]
_State = tuple[int, int]


class HeaderCache:
    """Reads headers through the cache: `cache(part, limits)`, from any thread and process.

    Args:
        folder: Made when the first header is written.
        read: Reads a header that is not in the cache.
    """

    def __init__(
        self,
        folder: str | Path,
        read: Callable[[MediaPart, Limits], MediaHeader] = lambda part, limits: part.header(limits),
    ) -> None:
        self._read = read
        self.path = Path(folder) / f"{_FORMAT}.sqlite"
        self._lock = threading.Lock()
        self._memory: OrderedDict[tuple[_Key, _State], MediaHeader] = OrderedDict()
        self._unwritten: dict[_Key, tuple[_State, str]] = {}
        self._connection: sqlite3.Connection | None = None
        self._process = 0
        self._usable = True

    def __call__(self, part: MediaPart, limits: Limits) -> MediaHeader:
        """The part's header.

        Raises:
            MediaError: as `part.header`; a header that cannot be read is tried each time.
        """
        source = getattr(part, "source", None)
        if part.medium not in HEADERS or not isinstance(source, str | Path | FileSlice):
            return self._read(part, limits)
        facts = facts_of(part, limits)
        known = source.known if isinstance(source, FileSlice) else None
        if known is not None and known.facts == facts:
            header: MediaHeader = known.header
            return header
        key, state = _key_of(source, facts), _state_of(source)
        if key is None or state is None:
            return self._read(part, limits)
        with self._lock:
            found = self._memory.get((key, state)) or self._stored(part.medium, key, state)
            if found is not None:
                self._remember(key, state, found)
                return found
        header = self._read(part, limits)
        with self._lock:
            self._remember(key, state, header)
            self._unwritten[key] = (state, json.dumps(asdict(header)))  # type: ignore[call-overload]
            if len(self._unwritten) >= _WRITTEN_TOGETHER:
                self._write()
        return header

    def read_ahead(self, sample: Sample, limits: Limits) -> None:
        """Read the headers of a sample's media; what cannot be read is left for later."""
        for part in sample.media():
            try:
                self(part, limits)
            except DataError:
                return

    def flush(self) -> None:
        """Write what is not written yet."""
        with self._lock:
            self._write()

    def close(self) -> None:
        """Write, and close the file; a later call opens it again."""
        with self._lock:
            self._write()
            self._disconnect()

    def _remember(self, key: _Key, state: _State, header: MediaHeader) -> None:
        self._memory[key, state] = header
        self._memory.move_to_end((key, state))
        if len(self._memory) > _IN_MEMORY:
            self._memory.popitem(last=False)

    def _stored(self, medium: str, key: _Key, state: _State) -> MediaHeader | None:
        query = "SELECT header FROM headers WHERE path=? AND facts=? AND size=? AND mtime_ns=?"
        rows = self._execute([(query, [(*key, *state)])])
        if not rows:
            return None
        try:
            return header_of(medium, json.loads(rows[0][0]))
        except (ValueError, TypeError, KeyError):
            return None

    def _write(self) -> None:
        waiting, self._unwritten = self._unwritten, {}
        if waiting:
            lines = [(*key, *state, header) for key, (state, header) in waiting.items()]
            self._execute([("INSERT OR REPLACE INTO headers VALUES (?, ?, ?, ?, ?)", lines)])

    def _execute(self, work: list[tuple[str, list[tuple[Any, ...]]]]) -> list[Any]:
        """Rows of one query, or many writes in one transaction; nothing where that fails."""
        for attempt in range(2):
            if not self._usable:
                return []
            try:
                connection = self._connect()
                for statement, values in work:
                    if statement.startswith("SELECT"):
                        return connection.execute(statement, values[0]).fetchall()
                    with connection:
                        connection.executemany(statement, values)
            except sqlite3.OperationalError as error:
                self._usable = "locked" in str(error)  # by another process, which will end
                return []
            except sqlite3.DatabaseError:
                self._rebuild()
                self._usable = attempt == 0
            except OSError:
                self._usable = False
            else:
                return []
        return []

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._process != os.getpid():
            self._connection = None  # a parent's, which a child must not touch
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_TABLE)
            self._connection, self._process = connection, os.getpid()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None and self._process == os.getpid():
            self._connection.close()
        self._connection = None

    def _rebuild(self) -> None:
        """Begin a damaged file anew."""
        self._disconnect()
        for ending in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + ending).unlink(missing_ok=True)


def _state_of(source: str | Path | FileSlice) -> _State | None:
    """Size and modification time of the file; None where there is none to ask."""
    try:
        found = _path_of(source).stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def _path_of(source: str | Path | FileSlice) -> Path:
    return source.path if isinstance(source, FileSlice) else Path(source)


def own_facts(part: MediaPart) -> str:
    """What a part says itself of how its file is read: a cut, a sampling, a soundtrack."""
    names = [field.name for field in fields(part) if field.name != "source"]  # type: ignore[arg-type]
    own = {name: _plain(getattr(part, name)) for name in names}
    return json.dumps(own, sort_keys=True, default=str)


def facts_of(part: MediaPart, limits: Limits) -> str:
    """All that a header depends on besides the file."""
    return f"{part.medium} {own_facts(part)} {_limits_facts(limits)}"


@lru_cache(maxsize=8)
def _limits_facts(limits: Limits) -> str:
    return json.dumps(asdict(limits), sort_keys=True)


def _key_of(source: str | Path | FileSlice, facts: str) -> _Key | None:
    """The file, and all else that a header depends on; None where it is not kept."""
    where = f":{source.offset}+{source.size}" if isinstance(source, FileSlice) else ""
    try:
        name = str(_path_of(source).absolute())
        name.encode()
    except ValueError:  # a name that is not UTF-8, which the file could not hold
        return None
    return name + where, facts


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def header_of(medium: str, values: Mapping[str, Any]) -> MediaHeader:
    """A header from what `asdict` made of it.

    Raises:
        ValueError, TypeError, KeyError: it is none of this medium.
    """
    header: MediaHeader = _from_plain(HEADERS[medium], values)
    return header


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _from_plain(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass, and those inside it, from what `asdict` made of it."""
    made: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        if name not in values:
            continue
        value = values[name]
        inner = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
        made[name] = _from_plain(inner, value) if inner and isinstance(value, dict) else value
    if made.keys() != values.keys():
        raise ValueError("the header has other fields")
    return kind(**made)
