"""Table files: each a lazy sequence of rows as plain objects; what their keys mean is a dialect's.

To add a format, write a subclass of `Table` and its line in `TABLES`.
"""

from pathlib import Path

from plait.datasets.records.tables.base import BARE, MAX_ROW_BYTES, Row, Table
from plait.datasets.records.tables.csv import CsvTable
from plait.datasets.records.tables.json import JsonTable
from plait.datasets.records.tables.jsonl import JsonlTable
from plait.datasets.records.tables.parquet import ParquetTable

__all__ = ["BARE", "MAX_ROW_BYTES", "TABLES", "Row", "Table", "kind_of", "open_table", "tables_in"]

TABLES: dict[str, type[Table]] = {
    "jsonl": JsonlTable,
    "csv": CsvTable,
    "parquet": ParquetTable,
    "json": JsonTable,
}

_NOT_ROWS = frozenset({"fetched.json", "dataset_info.json", "package.json"})


def kind_of(file: Path) -> str | None:
    """The table that a file's name says, or None."""
    ending = file.suffix.lower()
    return next((kind for kind, table in TABLES.items() if ending in table.endings), None)


def open_table(file: Path, max_row_bytes: int = MAX_ROW_BYTES) -> Table:
    """The table in `file`, of the kind that its name says.

    A .json file that begins with an object is read as JSONL, as much software writes it.
    """
    kind = kind_of(file) or "jsonl"
    if kind == "json" and _first_sign(file) == b"{":
        kind = "jsonl"
    return TABLES[kind](file, max_row_bytes)


def tables_in(folder: Path) -> list[Path]:
    """The tables directly in a folder; .json files count only where there are no others."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    found = [p for p in files if kind_of(p) is not None and p.name not in _NOT_ROWS]
    return [p for p in found if p.suffix.lower() != ".json"] or [
        p for p in found if _first_sign(p) == b"["
    ]


def _first_sign(file: Path) -> bytes:
    try:
        with file.open("rb") as content:
            return content.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except OSError:
        return b""
