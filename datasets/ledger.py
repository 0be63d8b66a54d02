"""The ledger: what became of each row in each epoch. No row vanishes and none counts twice.

An append-only file of JSON lines:

    {"epoch": 0, "status": "used", "dataset": "stamps", "row": 3, "file": "", "reason": ""}

A checkpoint holds how long the file was; restoring cuts off what was written after it, a line
torn by a kill included. A row is known by dataset and row number, or file where it has no number.
The epoch is that of its own dataset; datasets of a blend are in different ones at one time.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from plait.errors import CheckpointError, ConfigError, Origin

Status = Literal["used", "truncated", "dropped", "broken", "left_out"]
STATUSES: tuple[str, ...] = get_args(Status)

RowName = tuple[str, int | str]

_BUFFERED_LINES = 512
_LINE_START = b'{"epoch": '


def row_name(dataset: str, row: int | None, file: str) -> RowName:
    """What a row is known by: a file names it only where it has no number."""
    return (dataset, file if row is None else row)


def empty_state() -> dict[str, Any]:
    """The state of a ledger without lines: restoring it begins the file anew."""
    return {"bytes": 0, "counts": {}}


class Ledger:
    """Writes the file. Lines that are there already are kept, and count as recorded.

    Args:
        path: Made where missing, its folder too. A torn last line is cut off.

    Raises:
        CheckpointError: the file cannot be read or written, or is no ledger.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._counts: dict[str, int] = {}
        self._seen = _Seen()
        self._lines: list[bytes] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise CheckpointError(f"the ledger {self.path} cannot be opened: {error}") from error
        self._bytes = 0
        self._reread(None)

    def record(self, epoch: int, status: Status, origin: Origin, reason: str = "") -> None:
        """Count a row of an epoch, once.

        Raises:
            CheckpointError: the row already has a line in this epoch, or the disk is full.
        """
        if status not in STATUSES:
            raise ConfigError(f"a row is one of {', '.join(STATUSES)}; not {status!r}")
        self._note(epoch, status, row_name(origin.dataset, origin.row, origin.file))
        line = {
            "epoch": epoch,
            "status": status,
            "dataset": origin.dataset,
            "row": origin.row,
            "file": origin.file,
            "reason": reason,
        }
        text = json.dumps(line, ensure_ascii=False)
        # Half a surrogate pair in a reason becomes the escape that JSON has for it.
        self._lines.append(text.encode("utf-8", "backslashreplace") + b"\n")
        if len(self._lines) >= _BUFFERED_LINES:
            self._write()

    def state(self) -> dict[str, Any]:
        """The file's length in bytes and the lines by status, all of it safely on the disk."""
        self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritten(error) from error
        return {"bytes": self._bytes, "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Cut the file to what `state` saw.

        Raises:
            CheckpointError: the file is shorter than that, or holds other lines.
        """
        self._lines.clear()
        self._reread(int(state["bytes"]))
        if self._counts != dict(state["counts"]):
            raise CheckpointError(
                f"the ledger {self.path} does not belong to this checkpoint: it counts "
                f"{self._counts} where the checkpoint counted {dict(state['counts'])}; restore the "
                "run's own ledger, or begin a new run folder"
            )

    def close(self) -> None:
        """Write what is buffered and close the file. A second call does nothing."""
        if not self._file.closed:
            try:
                self._write()
            finally:
                self._file.close()

    def _note(self, epoch: int, status: str, row: RowName) -> None:
        if not self._seen.add(epoch, row):
            raise CheckpointError(
                f"a row is counted once an epoch: {row} of epoch {epoch} is already in the ledger "
                f"{self.path}; restore the ledger with the checkpoint, or begin a new run folder"
            )
        self._counts[status] = self._counts.get(status, 0) + 1

    def _write(self) -> None:
        data = b"".join(self._lines)
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._bytes)  # no half-written line stays
            raise self._unwritten(error) from error
        self._bytes += len(data)
        self._lines.clear()

    def _unwritten(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the ledger {self.path} cannot be written: {error}; free some space and resume"
        )

    def _reread(self, length: int | None) -> None:
        """Read the first `length` bytes again (None: all whole lines) and cut off the rest."""
        self._counts, self._seen, self._bytes = {}, _Seen(), 0
        found = os.fstat(self._file.fileno()).st_size
        if length is not None and found < length:
            raise CheckpointError(
                f"the ledger {self.path} lost lines that the checkpoint saw: it has {found} bytes "
                f"and had {length}; restore the run's own ledger, or begin a new run folder"
            )
        self._file.seek(0)
        with self.path.open("rb") as lines:
            for line in lines:
                end = self._bytes + len(line)
                if length is not None and end > length:
                    break
                if not line.endswith(b"\n") and self._is_torn(line):
                    break
                self._read(line)
                self._bytes = end
        if length is not None and self._bytes != length:
            raise CheckpointError(
                f"the ledger {self.path} does not belong to this checkpoint: no line ends at byte "
                f"{length}; restore the run's own ledger, or begin a new run folder"
            )
        os.ftruncate(self._file.fileno(), self._bytes)

    @staticmethod
    def _is_torn(tail: bytes) -> bool:
        """Whether a kill cut this line of ours; any other file's last line must not be lost."""
        return tail.rstrip(b"\0").startswith(_LINE_START) or _LINE_START.startswith(
            tail.rstrip(b"\0")
        )

    def _read(self, line: bytes) -> None:
        try:
            fact = json.loads(line)
            row = row_name(fact["dataset"], fact["row"], fact["file"])
            self._note(fact["epoch"], fact["status"], row)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path} is not a ledger: line at byte {self._bytes} cannot be read; move it "
                "away or begin a new run folder"
            ) from error


class _Seen:
    """Which rows have a line in which epoch: a bit each, so that no epoch is ever forgotten."""

    def __init__(self) -> None:
        self._bits: dict[tuple[int, str], bytearray] = {}
        self._named: set[tuple[int, RowName]] = set()

    def add(self, epoch: int, row: RowName) -> bool:
        """Whether the row is new in this epoch; it is not any more."""
        dataset, number = row
        if not isinstance(number, int) or number < 0:
            new = (epoch, row) not in self._named
            self._named.add((epoch, row))
            return new
        bits = self._bits.setdefault((epoch, dataset), bytearray())
        place, bit = number >> 3, 1 << (number & 7)
        if place >= len(bits):
            bits.extend(bytes(max(place + 1, 2 * len(bits)) - len(bits)))
        new = not bits[place] & bit
        bits[place] |= bit
        return new


class NullLedger(Ledger):
    """Keeps nothing: for loops that do not ask what became of a row."""

    def __init__(self) -> None:
        """Open nothing."""

    def record(self, epoch: int, status: Status, origin: Origin, reason: str = "") -> None:
        """Count nothing."""

    def state(self) -> dict[str, Any]:
        """The state of an empty ledger."""
        return empty_state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to cut."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass(slots=True)
class LedgerSummary:
    """What a ledger file says, read independently of the code that wrote it.

    `epochs[e][status]` counts rows; `reasons[status][reason]` counts lines over all epochs;
    `twice` holds rows with more than one line in an epoch, and must be empty.
    """

    epochs: dict[int, dict[str, int]] = field(default_factory=dict)
    reasons: dict[str, dict[str, int]] = field(default_factory=dict)
    twice: list[tuple[int, RowName]] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Lines by status over all epochs."""
        return {status: sum(by_reason.values()) for status, by_reason in self.reasons.items()}


def count(path: str | Path) -> LedgerSummary:
    """Read a ledger file and add it up; a torn last line is passed over."""
    summary = LedgerSummary()
    rows: set[tuple[int, RowName]] = set()
    for text in Path(path).read_bytes().split(b"\n")[:-1]:
        fact = json.loads(text)
        epoch, status = fact["epoch"], fact["status"]
        row = (epoch, row_name(fact["dataset"], fact["row"], fact["file"]))
        if row in rows:
            summary.twice.append(row)
        rows.add(row)
        in_epoch = summary.epochs.setdefault(epoch, {})
        in_epoch[status] = in_epoch.get(status, 0) + 1
        by_reason = summary.reasons.setdefault(status, {})
        by_reason[fact["reason"]] = by_reason.get(fact["reason"], 0) + 1
    return summary
