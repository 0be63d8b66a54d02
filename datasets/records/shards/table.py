"""Shards as a table: rows by number, each read where it lies."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tarfile import BLOCKSIZE, TarError, TarInfo
from typing import ClassVar

from plait.datasets.records.media import MediaFinder
from plait.datasets.records.shards.archive import Entry, Member
from plait.datasets.records.shards.index import ShardIndex, beside
from plait.datasets.records.shards.members import MemberFinder, row_of, unread_of
from plait.datasets.records.tables import MAX_ROW_BYTES, Row, Table
from plait.errors import DataError, Origin
from plait.modalities import FileSlice, Limits
from plait.modalities.sources import read_stored

ENDING = ".tar"

_LIMITS = Limits()


def shards_at(path: Path) -> list[Path]:
    """The tar files at a path: itself, or those directly in a folder, in the order of names."""
    if path.is_dir():
        return sorted(file for file in path.glob(f"*{ENDING}") if not file.name.startswith("."))
    return [path] if path.suffix.lower() == ENDING else []


class ShardTable(Table):
    """The samples of tar files, one after another, as rows.

    Args:
        file: What messages call the whole: the folder, or the only tar.
        shards: Their indexes, in order.
    """

    kind: ClassVar[str] = "shards"
    endings: ClassVar[tuple[str, ...]] = (ENDING,)

    def __init__(
        self, file: Path, shards: Sequence[ShardIndex], max_row_bytes: int = MAX_ROW_BYTES
    ) -> None:
        super().__init__(file, max_row_bytes)
        self.shards = tuple(shards)
        self.left_out = tuple(left for shard in self.shards for left in shard.left_out)
        self._stops = list(accumulate(map(len, self.shards)))
        self._last: tuple[int, Entry] | None = None

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def row(self, number: int) -> Row:
        shard, entry = self._entry(number)
        if entry.problem:
            raise DataError(entry.problem, Origin(file=self.place(number)))
        members = {member.suffix: member for member in entry.members}

        def read(suffix: str) -> bytes:
            self.check_size(members[suffix].size)
            return _read(shard, members[suffix])

        return row_of({suffix: member.name for suffix, member in members.items()}, read)

    def name(self, number: int) -> str:
        shard, within = self._shard(number)
        return shard.key(within)

    def place(self, number: int) -> str:
        shard, within = self._shard(number)
        return f"{shard.tar}:{shard.key(within)}"

    def finder(self, number: int, given: MediaFinder) -> MediaFinder:
        shard, entry = self._entry(number)
        return MemberFinder(
            given.folder,
            given.fetch,
            {
                member.suffix: (
                    member.name,
                    FileSlice(shard.tar, member.offset, member.size, shard.size, member.name),
                )
                for member in entry.members
            },
            shard.headers(self._shard(number)[1]),
            shard.limits or _LIMITS,
        )

    def unread(self, number: int) -> list[str]:
        _, entry = self._entry(number)
        found = unread_of({m.suffix: m.name for m in entry.members})
        return [f".{suffix}" for suffix in found]

    def _shard(self, number: int) -> tuple[ShardIndex, int]:
        at = bisect_right(self._stops, number)
        return self.shards[at], number - (self._stops[at - 1] if at else 0)

    def _entry(self, number: int) -> tuple[ShardIndex, Entry]:
        """A sample's files; those of the last row are at hand, which is asked for several times."""
        shard, within = self._shard(number)
        last = self._last
        if last is None or last[0] != number:
            last = self._last = (number, shard.entry(within))
        return shard, last[1]


def _read(shard: ShardIndex, member: Member) -> bytes:
    """A member, if the header before it is still the one that the index knows."""
    began = member.offset - BLOCKSIZE
    held = FileSlice(shard.tar, began, BLOCKSIZE + member.size, shard.size, member.name)
    content = read_stored(held)
    try:
        header = TarInfo.frombuf(content[:BLOCKSIZE], "utf-8", "surrogateescape")
    except TarError:
        header = None
    if header is None or header.size != member.size:
        raise DataError(
            "a shard must not change after its index was made; this one did; delete the index "
            f"beside it ({beside(shard.tar).name}), or write it again",
            Origin(file=f"{shard.tar}:{member.name}"),
        )
    return content[BLOCKSIZE:]
