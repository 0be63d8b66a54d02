"""Shards read in order, from files, pipes and addresses: nothing is looked up, nothing is unpacked.

For data that are read once, or lie where reading by number is slow. Training on a plan, with exact
resume, needs rows by number: `plait.datasets.open`.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from plait.datasets.policy import FailurePolicy
from plait.datasets.records.captions import CaptionOptions
from plait.datasets.records.media import MediaFinder, medium_of, refuse_address
from plait.datasets.records.rows import Place, Reading
from plait.datasets.records.shards.archive import Archive, Entry, Member
from plait.datasets.records.shards.members import (
    CAPTION,
    CLASS,
    ROW,
    MemberFinder,
    row_of,
)
from plait.datasets.records.shards.table import shards_at
from plait.datasets.records.tables import MAX_ROW_BYTES
from plait.errors import ConfigError, DataError, Origin
from plait.modalities import Limits
from plait.stream import Sample

Shards = str | Path | BinaryIO
"""A tar file, a folder of them, an address, or an open file, which need not seek."""


def stream_shards(
    shards: Shards | Iterable[Shards],
    *,
    name: str = "",
    captions: CaptionOptions | None = None,
    remote: bool = False,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    policy: FailurePolicy | None = None,
) -> Iterator[Sample]:
    """The samples of shards, one after another, with their media in memory.

        for sample in plait.datasets.stream("shards/"):
        for sample in plait.datasets.stream(sys.stdin.buffer):
        for sample in plait.datasets.stream("s3://bucket/000000.tar", remote=True):

    Shards may be compressed (.tar.gz, .tar.bz2, .tar.xz). Samples are numbered from 0.

    Args:
        shards: One, or several in their order.
        name: What messages call the dataset.
        captions: How captions become samples.
        remote: Whether addresses (https://, s3://, ...) may be opened.
        limits: A larger medium is passed over, and its row is broken.
        policy: What a broken row does; by default it ends the stream.

    Raises:
        ConfigError: an address that was not asked for.
        DataError: no shard is there, one is no tar file or is damaged, or a row is broken and the
            policy does not skip it.
    """
    policy = policy or FailurePolicy()
    reading = Reading(MediaFinder(Path(), refuse_address), captions=captions)
    single = isinstance(shards, str | Path) or hasattr(shards, "read")
    listed: Iterable[Shards] = [shards] if single else shards  # type: ignore[list-item, assignment]
    number = 0
    for where in listed:
        for place, file in _opened(where, remote):
            with closing(file):
                archive = Archive(file, lambda member: _wanted(member, limits))
                for entry in _entries(archive, Origin(name, None, place)):
                    origin = Origin(name, number, f"{place}:{entry.key}")
                    yield from _documents(entry, reading, number, origin, policy)
                    number += 1
                for aside, reason in archive.aside:
                    policy.failure(DataError(reason, Origin(name, None, f"{place}:{aside}")))


def _opened(where: Shards, remote: bool) -> Iterator[tuple[str, BinaryIO]]:
    """The tar files of a place, each opened when it is its turn."""
    if not isinstance(where, str | Path):
        yield str(getattr(where, "name", "<stream>")), where
        return
    if "://" in str(where)[:32]:
        if not remote:
            raise ConfigError(
                f"shards are opened at an address only when asked; {where} is one; set remote=True"
            )
        import fsspec

        with fsspec.open(str(where), "rb") as file:
            yield str(where), file
        return
    path = Path(where)
    tars = shards_at(path) if path.is_dir() else [path]
    if not tars or not path.exists():
        raise DataError(
            "a stream needs shards; there are none; give a .tar file or a folder that holds some",
            Origin(file=str(path)),
        )
    for tar in tars:
        yield str(tar), tar.open("rb")


def _wanted(member: Member, limits: Limits) -> bool:
    """Whether a file is read.

    Raises:
        DataError: it is larger than it may be.
    """
    medium = medium_of(member.name)
    if medium is None and member.suffix not in (ROW, CAPTION, CLASS):
        return False
    most = getattr(limits, f"max_{medium}_bytes") if medium else MAX_ROW_BYTES
    if member.size > most:
        raise DataError(
            f"a file of a shard must have at most {most:,} bytes; {member.name!r} has "
            f"{member.size:,}; make it smaller or raise the limit"
        )
    return True


def _entries(archive: Archive, place: Origin) -> Iterator[Entry]:
    try:
        yield from archive.entries()
    except DataError as error:
        raise error.at(place) from None


def _documents(
    entry: Entry, reading: Reading, number: int, origin: Origin, policy: FailurePolicy
) -> Iterator[Sample]:
    """The samples of one row: two of a preference row, none of one that is skipped."""
    try:
        if entry.problem:
            raise DataError(entry.problem)
        names = {member.suffix: member.name for member in entry.members}
        row = row_of(names, entry.contents.__getitem__)
        members = {s: (names[s], content) for s, content in entry.contents.items()}
        finder = MemberFinder(reading.finder.folder, reading.finder.fetch, members)
        sides = reading.dialect(row).sides
        own = Place(number, entry.key, origin)
        found = [reading.sample(row, side, sides, finder, own) for side in sides]
    except DataError as error:
        policy.failure(error.at(origin))
        return
    policy.success()
    yield from found
