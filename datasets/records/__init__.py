"""Rows on disk, read lazily as samples.

    open_records("stamps/", captions=CaptionOptions(lower_first=True))  # pictures with .txt files
    open_records("pairs/captions.csv")                                  # one row a picture
    open_records("chats.jsonl")                                         # messages and images

A row is read when it is asked for, and a broken one raises `DataError` then: whoever reads decides
whether to skip it. A dialect is a class in `DIALECTS`; to add one, write the class and its line.
"""

from pathlib import Path

from plait.datasets.records.base import LeftOut, Records
from plait.datasets.records.captions import CaptionOptions
from plait.datasets.records.csv import CsvRecords
from plait.datasets.records.folder import FolderRecords
from plait.datasets.records.jsonl import JsonlRecords
from plait.errors import ConfigError, DataError, Origin, UnknownNameError

__all__ = ["DIALECTS", "CaptionOptions", "LeftOut", "Records", "open_records"]

DIALECTS: dict[str, type[Records]] = {
    "jsonl": JsonlRecords,
    "csv": CsvRecords,
    "folder": FolderRecords,
}
"""By name, in the order in which a path is tried: a folder that holds a table is that table."""


def open_records(
    path: str | Path,
    *,
    name: str = "",
    dialect: str | None = None,
    media_dir: str | Path | None = None,
    captions: CaptionOptions | None = None,
) -> Records:
    """The rows at `path`; the dialect chosen is their `dialect`.

    Args:
        path: A .jsonl or .csv file, a folder that holds one, or a folder of pictures.
        name: What messages call the dataset; the file's or folder's own name by default.
        dialect: One of `DIALECTS`; recognised from the path by default.
        media_dir: Where relative picture paths start; the table's own folder by default.
        captions: How captions become samples; for the dialects that have captions.

    Raises:
        DataError: nothing is there, or there are no rows.
        ConfigError: the dialect cannot be told, or does not take an option that was given.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            "a dataset must exist; nothing is at this path; mend the path, or fetch the data first",
            Origin(dataset=name, file=str(path)),
        )
    chosen = recognise(path) if dialect is None else dialect
    if chosen not in DIALECTS:
        raise UnknownNameError("dialect", chosen, DIALECTS)
    given = {"media_dir": media_dir, "captions": captions}
    options = {option: value for option, value in given.items() if value is not None}
    reader = DIALECTS[chosen]
    for option in options:
        if option not in reader.options:
            raise ConfigError(
                f"dialect {chosen!r} takes no {option!r}; leave it out, or name another dialect"
            )
    return reader(path, name=name or path.resolve().stem, **options)


def recognise(path: Path) -> str:
    """The dialect of what lies at `path`.

    Raises:
        ConfigError: none or more than one fits.
    """
    if path.is_dir():
        tables = [name for name, reader in DIALECTS.items() if reader.tables(path)]
        if len(tables) > 1:
            raise ConfigError(
                f"{path} holds tables of the dialects {' and '.join(tables)}; give the path of one"
            )
        return tables[0] if tables else "folder"
    for name, reader in DIALECTS.items():
        if path.suffix.lower() == reader.suffix:
            return name
    suffixes = ", ".join(reader.suffix for reader in DIALECTS.values() if reader.suffix)
    raise ConfigError(
        f"a dataset must be a folder or a file ending in {suffixes}; {path} is neither; "
        f"rename it, or give dialect= one of {', '.join(DIALECTS)}"
    )
