"""What lies in a tar file: the files of each sample, found without unpacking anything.

Python's own `tarfile` parses. This file bounds what it reads, and accounts for what it and the
`webdataset` package pass over in silence: links, damaged headers, a cut-off end.
"""

import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Self

from plait.errors import DataError, printable

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""A sample's key ends at the first dot of a file's own name: the `webdataset` package's rule."""

_META = re.compile(r"__[^/]*__($|/)")
"""Files that the `webdataset` package keeps for itself."""

_MOST_NAME_BYTES = 1 << 20
"""Of a header that holds a name: `tarfile` would read whatever it promises."""

_NAMING = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
"""Headers whose data are names."""

_BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a sample: `suffix` stands behind the key, `offset` is its first byte."""

    name: str
    suffix: str
    offset: int
    size: int


@dataclass(slots=True)
class Entry:
    """A sample: files that follow one another under one key.

    `contents` holds, by suffix, what was read in passing; `problem` says why it cannot be used.
    """

    key: str
    members: list[Member] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""

    def spoil(self, problem: str) -> None:
        """Note why the sample cannot be used; the first reason stays."""
        self.problem = self.problem or problem


class Archive:
    """Goes through a tar file once, forwards.

    Args:
        file: At its beginning; a file on disk is not read but for its headers.
        keep: Which files of samples are read in passing, as a pipe must be; None reads none and
            needs a file that seeks. It may raise `DataError`, which spoils the sample.
    """

    def __init__(self, file: BinaryIO, keep: Callable[[Member], bool] | None = None) -> None:
        self.aside: list[tuple[str, str]] = []
        """(name, reason) of what is of no sample; complete after the last entry."""
        self._file, self._keep = file, keep
        self._size = os.fstat(file.fileno()).st_size if keep is None else None

    def entries(self) -> Iterator[Entry]:
        """Each sample, once all its files are known.

        Raises:
            DataError: it is no tar file, or one that is compressed and must not be.
        """
        try:
            mode = "r:" if self._keep is None else "r|*"
            opened: Any = _Tar.open(fileobj=self._file, mode=mode, tarinfo=_Header)  # type: ignore[call-overload]
            archive: _Tar = opened
        except _BROKEN as error:
            rule = "a tar file" if self._keep else "a tar file that is not compressed"
            raise DataError(
                f"a shard must be {rule}; this one cannot be read: {error}; mend or replace it"
            ) from error
        entry: Entry | None = None
        for info in self._headers(archive):
            found = self._named(info)
            if found is None:
                continue
            key, member = found
            if entry is None or entry.key != key:
                if entry is not None:
                    yield entry
                entry = Entry(key)
            self._take(archive, entry, member, info)
        if entry is not None:
            yield entry

    def _headers(self, archive: "_Tar") -> Iterator[tarfile.TarInfo]:
        """Each header; how the archive ended is noted at the end."""
        while True:
            try:
                info = archive.next()
            except _BROKEN as error:
                self._note_end(f"cannot be read: {error}")
                return
            archive.members = []  # or all of a million headers would be kept
            if info is None:
                break
            yield info
        if not isinstance(archive.ended, _END):
            self._note_end(f"has no end mark ({archive.ended})")
        elif self._keep is None and self._more_after(archive.offset):
            self._note_end("goes on behind its end mark: it is several that were joined")

    def _note_end(self, what: str) -> None:
        self.aside.append(
            ("", f"a shard must be whole; this one {what}; what comes there is not read: "
             "write it again")
        )  # fmt: skip

    def _more_after(self, end: int) -> bool:
        """Whether more than padding follows the end mark."""
        self._file.seek(end)
        return any(self._file.read(_MOST_NAME_BYTES))

    def _named(self, info: tarfile.TarInfo) -> tuple[str, Member] | None:
        """The key and the member; None where it is of no sample."""
        if info.isdir():
            return None
        match = _NAME.fullmatch(info.name)
        if match is None or _META.match(info.name):
            reason = "its name has no ending" if match is None else "it is metadata"
            self.aside.append((printable(info.name), f"{reason}, so it is of no sample"))
            return None
        member = Member(
            printable(info.name), printable(match[2]).lower(), info.offset_data, info.size
        )
        return printable(match[1]), member

    def _take(self, archive: "_Tar", entry: Entry, member: Member, info: tarfile.TarInfo) -> None:
        if any(held.suffix == member.suffix for held in entry.members):
            entry.spoil(f"a sample must have one file .{member.suffix}; it has two; rename one")
            return
        entry.members.append(member)
        if info.name.startswith("/") or ".." in info.name.replace("\\", "/").split("/"):
            entry.spoil(
                f"names in a shard must stay inside it; {member.name!r} does not; write it again"
            )
        elif not info.isreg() or info.issparse():
            entry.spoil(
                f"a shard must hold plain files; {member.name!r} is a link, a device or has holes; "
                "write it again"
            )
        elif self._size is not None and member.offset + member.size > self._size:
            entry.spoil(
                f"a shard must be whole; {member.name!r} ends {member.size:,} bytes after it "
                "begins, behind the file's end; write the shard again"
            )
        elif self._keep is not None:
            self._read(archive, entry, member, info)

    def _read(self, archive: "_Tar", entry: Entry, member: Member, info: tarfile.TarInfo) -> None:
        try:
            content = archive.extractfile(info)
            if content is not None and self._keep is not None and self._keep(member):
                entry.contents[member.suffix] = content.read()
        except DataError as error:
            entry.spoil(error.message)
        except _BROKEN as error:
            entry.spoil(
                f"a shard must be whole; {member.name!r} cannot be read to its end: {error}; write "
                "the shard again"
            )


_END: type[tarfile.TarError] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
"""What `tarfile` raises, and hides, at an end mark."""


class _Tar(tarfile.TarFile):
    """An archive that knows what ended it: `next` says None of an end mark and of damage alike."""

    members: list[tarfile.TarInfo]
    ended: tarfile.TarError | None = None


class _Header(tarfile.TarInfo):
    """A header that does not promise too much."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _NAMING and header.size > _MOST_NAME_BYTES:
            raise tarfile.HeaderError(f"a name in it would have {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tar: Any) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.TarError as error:
            tar.ended = error
            raise
