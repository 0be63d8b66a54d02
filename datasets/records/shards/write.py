"""Shards of any records: written through the `webdataset` package, and read back before they count.

    written = write_shards(plait.datasets.open("rows.jsonl"), "shards/")

Media are copied as they are; pictures and sounds in memory become PNG and float WAV files. A row's
JSON names its own files alone, so that a shard can be moved, or streamed, by itself.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from plait.datasets.decoding import Decoder
from plait.datasets.headers import own_facts
from plait.datasets.policy import FailurePolicy
from plait.datasets.records.base import Records
from plait.datasets.records.captions import CaptionOptions
from plait.datasets.records.folder import FolderRecords
from plait.datasets.records.media import MediaFinder
from plait.datasets.records.rows import Reading, TableRecords
from plait.datasets.records.shards.index import Described, beside, scan
from plait.datasets.records.shards.rows import files_of
from plait.datasets.records.shards.table import ShardTable
from plait.datasets.records.shards.verify import check_copy
from plait.errors import ConfigError, DataError, Origin
from plait.modalities import FileSlice, Limits, Text
from plait.stream import Sample

SHARD_BYTES = 256_000_000
"""Of a shard at most, where its rows are smaller: enough to be read at a disk's full speed."""

SHARD_ROWS = 10_000
"""Of a shard at most."""

_HEADER_BYTES = 1024
"""What a file takes in a tar besides itself: a header, and half a block of padding."""


@dataclass(slots=True)
class Written:
    """What was written: rows, shards and bytes; and rows that could not be, with the reason."""

    folder: Path
    rows: int = 0
    shards: int = 0
    bytes: int = 0
    left_out: list[tuple[Origin, str]] = field(default_factory=list)


def write_shards(
    records: Records,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    shard_rows: int = SHARD_ROWS,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    policy: FailurePolicy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write WebDataset shards, each with its index, into a new folder.

    The folder appears when all is written and read back: after a kill there is none, and the same
    call begins anew.

    Args:
        out: A folder that does not exist yet, or is empty.
        shard_bytes, shard_rows: Of a shard at most; a larger row has one of its own.
        policy: What a broken row does; by default it ends the writing.
        progress: Called with (done, all) rows of `records`.

    Raises:
        ConfigError: the folder holds something, or a size is below 1.
        DataError: a row cannot be written, as the policy says, or no row can.
    """
    out, policy = Path(out), policy or FailurePolicy()
    if min(shard_bytes, shard_rows) < 1:
        raise ConfigError(f"a shard holds bytes and rows; they are {shard_bytes} and {shard_rows}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"shards are written into a new folder; {out} holds something; name another"
        )
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    written = Written(out)
    most, captioned = (shard_bytes, shard_rows), _are_captions(records)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, part, ignore_errors=True)  # after an error; else it has moved
        decoder = stack.enter_context(Decoder(workers=1))
        writer = _Writer(part, records, most, limits, decoder, written)
        stack.enter_context(closing(writer))
        for rows in _rows(records):
            if progress is not None:
                progress(rows.start, len(records))
            try:
                documents = [records[row] for row in rows]
                files = files_of(documents, limits, decoder.header, captioned=captioned)
            except DataError as error:
                placed = error.at(Origin(records.name, rows.start, error.origin.file))
                policy.failure(placed)
                written.left_out.append((placed.origin, placed.message))
                continue
            policy.success()
            writer.add(files, rows)
        writer.finish()
        if not written.rows:
            raise DataError(
                f"shards need a row, and of {len(records)} none could be written; the first: "
                f"{written.left_out[0][1]}",
                written.left_out[0][0],
            )
        if out.exists():
            out.rmdir()
        part.rename(out)
    if progress is not None:
        progress(len(records), len(records))
    return written


class _Writer:
    """Writes rows into shards, one after another, and reads back each that is full."""

    def __init__(
        self, folder: Path, records: Records, most: tuple[int, int], limits: Limits,
        decoder: Decoder, written: Written,
    ) -> None:  # fmt: skip
        self._folder, self._records, self._limits = folder, records, limits
        self._most_bytes, self._most_rows = most
        self._decoder, self._written = decoder, written
        self._file: BinaryIO | None = None
        self._tar: Any = None
        self._rows: list[range] = []
        self._size = 0

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._written.shards:06d}.tar"

    def add(self, files: Mapping[str, bytes], rows: range) -> None:
        """The files of a row, which is these samples of the records."""
        size = sum(len(content) + _HEADER_BYTES for content in files.values())
        full = self._size + size > self._most_bytes or len(self._rows) >= self._most_rows
        if self._rows and full:
            self.finish()
        if self._file is None:
            self._begin()
        self._tar.write({"__key__": f"{self._written.rows:09d}", **files})
        self._rows.append(rows)
        self._size += size
        self._written.rows += 1

    def _begin(self) -> None:
        import webdataset

        self._file = self._path.open("wb")
        # Nothing of the day or the user, so that the same rows give the same bytes.
        self._tar = webdataset.TarWriter(
            self._file, encoder=False, mtime=0, user="", group="", format="GNU_FORMAT"
        )

    def close(self) -> None:
        """End the file that is being written, if one is."""
        if self._file is not None:
            self._tar.close()
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """End the shard, read it back, and write what is known of it beside it.

        Raises:
            DataError: a row does not read the same from it.
        """
        if not self._rows:
            return
        self.close()
        bare = scan(self._path)
        table = ShardTable(self._path, [bare])
        reading = Reading(MediaFinder(self._folder))
        copies = TableRecords(self._path, table, reading, name=self._records.name)
        described = []
        for rows, copied in zip_longest(self._rows, _rows(copies)):
            originals = [self._records[row] for row in rows]
            samples = [copies[row] for row in copied]
            for original, sample in zip(originals, samples, strict=True):
                check_copy(original, sample, self._limits)
            described.append(_described(samples, self._limits, self._decoder))
        bare.described(described, self._limits).write(beside(self._path))
        self._written.bytes += bare.size
        self._written.shards += 1
        self._rows, self._size = [], 0


def _rows(records: Records) -> Iterator[range]:
    """The samples of each row: one, or the documents of one group that follow one another."""
    begin, group = 0, None
    for row in range(len(records)):
        try:
            found = records[row].group
        except DataError:
            found = None
        if row and (found is None or found != group):
            yield range(begin, row)
            begin = row
        group = found
    yield range(begin, len(records))


def _are_captions(records: Records) -> bool:
    """Whether all rows are a medium and its caption, taken as they are."""
    if isinstance(records, FolderRecords):
        return records.captions == CaptionOptions()
    return (
        isinstance(records, TableRecords)
        and records.dialect == "captions"
        and records.reading.captions in (None, CaptionOptions())
    )


def _described(samples: Sequence[Sample], limits: Limits, decoder: Decoder) -> Described:
    texts = [
        part.text for sample in samples for part in sample.every_part() if isinstance(part, Text)
    ]
    headers = {}
    for part in (part for sample in samples for part in sample.media()):
        source = getattr(part, "source", None)
        if isinstance(source, FileSlice):
            suffix = source.name.partition(".")[2]
            key = (suffix, own_facts(part))
            header: Any = decoder.header(part, limits)
            headers[key] = [*key, part.medium, asdict(header)]
    return Described(sum(map(len, texts)), json.dumps(list(headers.values())) if headers else "")
