"""The journal of timeouts: rows that a clock, and not their bytes, decided about.

Held-out rows are read once, before the first epoch, and stand under `HELD_OUT`.

Whether a row takes too long to decode may differ each time. So that a resumed run is the run that
was stopped, such a row is written down, safely on the disk, before the pack without it is used; a
run that goes on from an earlier step drops it again without trying. One JSON line a row:

    {"epoch": 0, "dataset": "films", "row": 3, "file": "", "reason": "..."}
"""

import json
import os
from pathlib import Path

from plait.datasets.ledger import RowName, row_name
from plait.errors import CheckpointError, DecodeTimeoutError, Origin

HELD_OUT = -1
"""The epoch of rows that are held out."""


class Journal:
    """Rows that timed out, by epoch.

    Args:
        path: Made at the first entry. A last line that a kill cut short is cut off: its pack was
            never used. None keeps the journal in memory.

    Raises:
        CheckpointError: the file cannot be read, or is no journal.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._errors: dict[tuple[int, RowName], DecodeTimeoutError] = {}
        if self.path is not None and self.path.is_file():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._errors)

    def error(self, epoch: int, origin: Origin) -> DecodeTimeoutError | None:
        """What a row raised in an epoch; None where it is not in the journal."""
        if not self._errors:
            return None
        return self._errors.get((epoch, row_name(origin.dataset, origin.row, origin.file)))

    def add(self, epoch: int, origin: Origin, reason: str) -> None:
        """Write a row down; when this returns it is on the disk. A row that stands there stays.

        Raises:
            CheckpointError: it cannot be written.
        """
        key = (epoch, row_name(origin.dataset, origin.row, origin.file))
        if key in self._errors:
            return
        if self.path is not None:
            line = {
                "epoch": epoch, "dataset": origin.dataset, "row": origin.row,
                "file": origin.file, "reason": reason,
            }  # fmt: skip
            text = json.dumps(line, ensure_ascii=False) + "\n"
            self._append(self.path, text.encode("utf-8", "backslashreplace"))
        self._errors[key] = DecodeTimeoutError(reason, origin)

    def write_to(self, path: Path) -> None:
        """Keep a journal that was in memory in a file from now on.

        Raises:
            CheckpointError: it cannot be written.
        """
        errors, self._errors, self.path = self._errors, {}, path
        for (epoch, _), error in errors.items():
            self.add(epoch, error.origin, error.message)

    @staticmethod
    def _append(path: Path, line: bytes) -> None:
        try:
            new = not path.exists()
            with path.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(line) != len(line):
                    file.truncate(before)
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
            if new:
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise CheckpointError(
                f"the journal {path} cannot be written: {error}; free some space and resume"
            ) from error

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            for text in content[:whole].splitlines():
                fact = json.loads(text)
                origin = Origin(fact["dataset"], fact["row"], fact["file"])
                key = (int(fact["epoch"]), row_name(origin.dataset, origin.row, origin.file))
                self._errors[key] = DecodeTimeoutError(str(fact["reason"]), origin)
            if whole < len(content):
                os.truncate(path, whole)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a journal of timeouts: {error}; move it away, or begin a new run "
                "folder"
            ) from error
