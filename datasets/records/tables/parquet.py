"""Parquet, through pyarrow: rows are decoded a row group at a time."""

import threading
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

from plait.datasets.records.tables.base import MAX_ROW_BYTES, Row, Table
from plait.errors import DataError, Origin

MAX_GROUP_BYTES = 2_000_000_000
"""Uncompressed bytes of a row group at most; one is held in memory."""


class ParquetTable(Table):
    """One row a row; the row group that was read last is kept. A null is a key that is absent."""

    kind: ClassVar[str] = "parquet"
    endings: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, file: Path, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        super().__init__(file, max_row_bytes)
        with self._opened() as held:
            self.columns = tuple(str(name) for name in held.schema_arrow.names)
            groups = [held.metadata.row_group(n) for n in range(held.num_row_groups)]
        self._starts: list[int] = [0, *accumulate(int(group.num_rows) for group in groups)]
        self._sizes = [group.total_byte_size for group in groups]
        self._lock = threading.Lock()
        self._kept: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._kept = threading.Lock(), None

    def row(self, number: int) -> Row:
        group = bisect_right(self._starts, number) - 1
        row = self._group(group).slice(number - self._starts[group], 1)
        self.check_size(row.nbytes)
        try:
            (values,) = row.to_pylist()
        except (ValueError, OSError) as error:  # text that is not UTF-8, a broken page
            raise self._error(error) from error
        return {key: value for key, value in values.items() if value is not None}

    def _group(self, number: int) -> Any:
        with self._lock:
            if self._kept is None or self._kept[0] != number:
                if self._sizes[number] > MAX_GROUP_BYTES:
                    raise DataError(
                        f"a row group must have at most {MAX_GROUP_BYTES:,} bytes; number {number} "
                        f"has {self._sizes[number]:,}; write the file with smaller row groups"
                    )
                self._kept = None
                with self._opened() as held:
                    try:
                        self._kept = number, held.read_row_group(number)
                    except (ValueError, OSError) as error:
                        raise self._error(error) from error
            return self._kept[1]

    def _opened(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.file)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise self._error(error).at(Origin(file=str(self.file))) from error

    def _error(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())[:200]
        return DataError(
            f"a Parquet file must be whole and readable; {reason}; write it again, or mend the path"
        )
