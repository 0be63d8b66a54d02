"""Where the files of a shard's samples lie: beside each tar that Plait wrote, or found and kept.

    shards/000000.tar, shards/000000.parquet     written together by `plait convert`
    $PLAIT_HOME/shards/<hash>.parquet            of anybody's tar, found when it is first opened

One line a sample: its key; suffixes, names, offsets and sizes of its files; why it cannot be used
("" where it can); the characters of its texts; and the headers of its media, as JSON.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plait.datasets.headers import header_of
from plait.datasets.records.base import LeftOut
from plait.datasets.records.shards.archive import Archive, Entry, Member
from plait.errors import ConfigError, DataError, Origin
from plait.home import home
from plait.modalities import Limits, MediaHeader

FORMAT = "plait shard 1"
ENDING = ".parquet"

Headers = dict[tuple[str, str], MediaHeader]
"""By the file's suffix and the part's `own_facts`."""


@dataclass(frozen=True, slots=True)
class Described:
    """What is known of a sample besides where it lies: characters of text, headers of media."""

    characters: int = 0
    headers: str = ""


class ShardIndex:
    """The samples of one tar file, by number; read from an Arrow table, so that they take little.

    `left_out` is what lies in the tar and is of no sample; `limits` those under which the headers
    were read, None where there are none.
    """

    def __init__(self, tar: Path, table: Any) -> None:
        facts = json.loads(table.schema.metadata[b"plait"])
        self.tar, self.table = tar, table.combine_chunks()
        self.size: int = facts["size"]
        self.left_out = tuple(
            LeftOut(f"{tar}:{name}" if name else str(tar), reason)
            for name, reason in facts["aside"]
        )
        self.limits = None if facts["limits"] is None else Limits(**facts["limits"])

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tar, self.table)

    def key(self, number: int) -> str:
        """The key of a sample."""
        return str(self._cell("key", number))

    def entry(self, number: int) -> Entry:
        """A sample and its files."""
        columns = [self._cell(name, number) for name in ("name", "suffix", "offset", "size")]
        members = [Member(*facts) for facts in zip(*columns, strict=True)]
        return Entry(self.key(number), members, problem=str(self._cell("problem", number)))

    def characters(self) -> list[int]:
        """Of the texts of each sample; 0 where nobody counted."""
        found: list[int] = self.table.column("characters").to_pylist()
        return found

    def headers(self, number: int) -> Headers:
        """The headers of a sample's media that are known."""
        held = self._cell("headers", number)
        if not held:
            return {}
        return {
            (suffix, own): header_of(medium, values)
            for suffix, own, medium, values in json.loads(held)
        }

    def described(self, samples: Sequence[Described], limits: Limits) -> "ShardIndex":
        """The same with what is known of each sample, its headers read under `limits`."""
        facts = json.loads(self.table.schema.metadata[b"plait"]) | {"limits": asdict(limits)}
        table = self.table
        for name, column in _about(samples).items():
            table = table.set_column(table.schema.get_field_index(name), name, column)
        return ShardIndex(self.tar, table.replace_schema_metadata({"plait": json.dumps(facts)}))

    def _cell(self, column: str, number: int) -> Any:
        return self.table.column(column)[number].as_py()

    def write(self, file: Path) -> None:
        """Whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        import pyarrow.parquet as pq

        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".part-{os.getpid()}-{file.name}")
        try:
            pq.write_table(self.table, part)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


def beside(tar: Path) -> Path:
    """Where the index of a tar file lies that was written with it."""
    return tar.with_suffix(ENDING)


def index_of(tar: Path) -> ShardIndex:
    """The index beside a tar file, or the one that is kept, or a new one.

    Raises:
        DataError: it is no tar file, or cannot be read.
    """
    try:
        facts = tar.stat()
    except OSError as error:
        raise DataError(
            f"a shard must be readable; {error.strerror}; mend the path", Origin(file=str(tar))
        ) from error
    written = _read(tar, beside(tar), facts.st_size)
    if written is not None:
        return written
    state = f"{FORMAT} {tar.absolute()} {facts.st_size} {facts.st_mtime_ns}"
    name = hashlib.sha256(state.encode("utf-8", "surrogateescape")).hexdigest()
    kept = home() / "shards" / f"{name}{ENDING}"
    found = _read(tar, kept, facts.st_size)
    if found is None:
        found = scan(tar)
        with suppress(OSError):  # a home that cannot be written to only costs time
            found.write(kept)
    return found


def scan(tar: Path) -> ShardIndex:
    """Go through a tar file.

    Raises:
        DataError: it is no tar file, or cannot be read.
    """
    try:
        with tar.open("rb") as file:
            archive = Archive(file)
            entries = list(archive.entries())
            size = os.fstat(file.fileno()).st_size
    except DataError as error:
        raise error.at(Origin(file=str(tar))) from None
    except OSError as error:
        raise DataError(
            f"a shard must be readable; {error.strerror}; mend it", Origin(file=str(tar))
        ) from error
    return make(tar, entries, size, archive.aside)


def make(
    tar: Path, entries: Sequence[Entry], size: int, aside: Iterable[tuple[str, str]] = ()
) -> ShardIndex:
    """An index of entries, of whose media and texts nothing is known yet."""
    import pyarrow as pa

    texts, numbers = pa.list_(pa.string()), pa.list_(pa.int64())
    facts = {"format": FORMAT, "size": size, "aside": [list(one) for one in aside], "limits": None}
    table = pa.table(
        {
            "key": pa.array([entry.key for entry in entries], pa.string()),
            "problem": pa.array([entry.problem for entry in entries], pa.string()),
            **{
                name: pa.array([[getattr(m, name) for m in e.members] for e in entries], kind)
                for name, kind in (
                    ("name", texts), ("suffix", texts), ("offset", numbers), ("size", numbers),
                )
            },
            **_about([Described()] * len(entries)),
        }
    )  # fmt: skip
    return ShardIndex(tar, table.replace_schema_metadata({"plait": json.dumps(facts)}))


def _about(samples: Sequence[Described]) -> dict[str, Any]:
    import pyarrow as pa

    return {
        "characters": pa.array([one.characters for one in samples], pa.int64()),
        "headers": pa.array([one.headers for one in samples], pa.string()),
    }


def _read(tar: Path, file: Path, size: int) -> ShardIndex | None:
    """The index in a file; None where it is none, or not this tar's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        return None
    try:
        table = pq.read_table(file)
        facts = json.loads(table.schema.metadata[b"plait"])
        if facts["format"] != FORMAT or facts["size"] != size:
            return None
        return ShardIndex(tar, table)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, ConfigError):
        return None
