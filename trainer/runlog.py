"""Logs of a run: Lightning's CSV and TensorBoard loggers, and one table of losses.

Each start of a run logs into a folder of its own, named after the step it starts from, so that a
resumed run never rewrites what an earlier one logged. The table is the run's own: append-only, and
cut back on resume to what the checkpoint saw, so that it has each step once whatever was killed.
"""

import csv
import io
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from plait.errors import CheckpointError

COLUMNS = ("step", "train_nll", "validation_nll", "lr", "positions", "grad_norm")


def make_loggers(folder: Path, start: int) -> list[Any]:
    """Loggers for a start from step `start`."""
    logs = folder / "logs"
    version = f"from-step-{start:06d}-{time.time_ns()}"
    return [
        CSVLogger(logs, name="csv", version=version, flush_logs_every_n_steps=1),
        TensorBoardLogger(str(logs), name="tensorboard", version=version),
    ]


class LossTable:
    """losses.csv: one row per step, written as it is made.

    Args:
        more: Columns after `COLUMNS`.
    """

    def __init__(self, path: Path, more: Sequence[str] = ()) -> None:
        self.path, self.columns = path, (*COLUMNS, *more)

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the row of a step.

        Raises:
            CheckpointError: the disk is full.
        """
        self._write(_line([{"step": step, **metrics}.get(name, "") for name in self.columns]))

    def state(self) -> int:
        """The table's length in bytes, all of it safely on the disk."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size

    def restore(self, length: int) -> None:
        """Cut the table to what `state` saw; 0 begins it anew.

        Raises:
            CheckpointError: the table is shorter than that.
        """
        found = self.path.stat().st_size if self.path.is_file() else 0
        if found < length:
            raise CheckpointError(
                f"{self.path} lost rows that the checkpoint saw: it has {found} bytes and had "
                f"{length}; put it back, or start the run anew with --fresh"
            )
        if length:
            os.truncate(self.path, length)
        else:
            self.path.unlink(missing_ok=True)
            self._write(_line(self.columns))

    def _write(self, line: bytes) -> None:
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(line) != len(line):
                    file.truncate(before)
                    raise OSError("the disk is full")
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written: {error}; free some space and resume"
            ) from error


def _line(values: Any) -> bytes:
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerow(values)
    return content.getvalue().encode()
