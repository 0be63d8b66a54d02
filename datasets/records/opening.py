"""Opening a dataset: what lies at a path, and how it is read."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from plait.datasets.records.base import Records
from plait.datasets.records.captions import CaptionOptions
from plait.datasets.records.dialects import ROW_DIALECTS
from plait.datasets.records.folder import FolderRecords
from plait.datasets.records.media import Fetch, MediaFinder, refuse_address
from plait.datasets.records.own import OwnRecords
from plait.datasets.records.remote import RemoteFiles
from plait.datasets.records.rows import Reading, TableRecords
from plait.datasets.records.shards.index import beside, index_of
from plait.datasets.records.shards.table import ShardTable, shards_at
from plait.datasets.records.tables import (
    MAX_ROW_BYTES,
    TABLES,
    Table,
    kind_of,
    open_table,
    tables_in,
)
from plait.errors import ConfigError, DataError, Origin, UnknownNameError
from plait.modalities import Limits
from plait.stream import Sample

DIALECTS: tuple[str, ...] = (*ROW_DIALECTS, FolderRecords.dialect)
"""What `dialect` may name: the meanings of rows, and media with .txt files."""

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

Reader = Callable[[Path], Iterable[Sample]]
"""A reader of one's own: from a path to samples."""


def open_records(
    path: str | Path,
    *,
    name: str = "",
    dialect: str | None = None,
    media_dir: str | Path | None = None,
    captions: CaptionOptions | None = None,
    remote: bool = False,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    max_row_bytes: int = MAX_ROW_BYTES,
    reader: Reader | None = None,
) -> Records:
    """The rows at `path`, as a lazy sequence of samples; what was recognised is its `dialect`.

        rows = plait.datasets.open("chats.jsonl")
        rows[0].messages, rows.dialect, rows.notes()

        def poems(path):                                   # a reader of one's own
            for number, line in enumerate(path.read_text().splitlines()):
                yield plait.Sample(parts=(plait.Text(line),), id=str(number))

        rows = plait.datasets.open("poems.txt", reader=poems)

    Args:
        path: A .jsonl, .json, .csv or .parquet file; a folder that holds one; a WebDataset shard
            (.tar), or a folder of them; a folder of media files with a .txt each.
        name: What messages call the dataset; the file's or folder's own name by default.
        dialect: One of `DIALECTS`; then rows of another are broken. Recognised by default, each
            row from its own keys.
        media_dir: Where relative media paths start; the table's own folder by default.
        captions: How captions become samples; for the dialects that have captions.
        remote: Whether media at addresses (https://, s3://, ...) are fetched, once, into
            `$PLAIT_HOME/remote`; otherwise such rows are broken.
        limits: How large a file that is fetched may be.
        max_row_bytes: Of a table's row at most; a longer one is broken.
        reader: A function from the path to samples, which then alone says what is there. What it
            returns is kept if it is a sequence, and listed otherwise.

    Raises:
        DataError: nothing is there, or there are no rows.
        ConfigError: what is there cannot be told, or does not take an option that was given.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            "a dataset must exist; nothing is at this path; mend the path, or fetch the data first",
            Origin(dataset=name, file=str(path)),
        )
    if dialect is not None and dialect not in DIALECTS:
        raise UnknownNameError("dialect", dialect, DIALECTS)
    called = name or path.resolve().stem
    fetch: Fetch = RemoteFiles(limits) if remote else refuse_address
    if reader is not None:
        _refuse("a reader of one's own", dialect=dialect, media_dir=media_dir, captions=captions)
        return OwnRecords(path, reader(path), name=called)
    tars = shards_at(path)
    indexes = {beside(tar) for tar in tars}
    tables = [p for p in tables_in(path) if p not in indexes] if path.is_dir() else [path]
    if dialect == FolderRecords.dialect or not (tables or tars):
        _refuse("dialect 'folder'", media_dir=media_dir)
        return FolderRecords(path, name=called, captions=captions)
    file = path if tars else _one(path, tables, dialect)
    try:
        if tars:
            _refuse("a shard, which holds its media,", media_dir=media_dir)
            table = _shards(path, tars, tables, max_row_bytes)
        else:
            table = open_table(file, max_row_bytes)
    except DataError as error:
        raise error.at(Origin(called, None, str(file))) from None
    folder = Path(media_dir) if media_dir is not None else file.parent
    forced = None if dialect is None else ROW_DIALECTS[dialect]
    reading = Reading(MediaFinder(folder, fetch), forced, captions)
    return TableRecords(path, table, reading, name=called)


def _shards(path: Path, tars: Sequence[Path], tables: Sequence[Path], max_row_bytes: int) -> Table:
    if tables and path.is_dir():
        raise ConfigError(
            f"{path} holds shards and tables ({tables[0].name}); give the path of one, or keep "
            "them apart"
        )
    return ShardTable(path, [index_of(tar) for tar in tars], max_row_bytes)


def _one(path: Path, tables: Sequence[Path], dialect: str | None) -> Path:
    """The one table at a path.

    Raises:
        ConfigError: there are several, or the file's name says none.
    """
    if path.name.lower().endswith(_PACKED):
        raise ConfigError(
            f"a shard that is opened must not be compressed, or no row could be found in it; "
            f"{path} is; unpack it to .tar, or read it in order with plait.datasets.stream"
        )
    if len(tables) > 1:
        names = ", ".join(p.name for p in tables)
        raise ConfigError(f"{path} holds several tables ({names}); give the path of one")
    (file,) = tables
    if kind_of(file) is None and dialect is None:
        endings = ", ".join(ending for table in TABLES.values() for ending in table.endings)
        raise ConfigError(
            f"a dataset must be a folder or a file ending in {endings}, .tar; {path} is neither; "
            "rename it, or give dialect= and it is read as JSONL"
        )
    return file


def _refuse(what: str, **options: object) -> None:
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{what} takes no {option!r}; leave it out, or name another dialect")
