"""Logs of a run: Lightning's CSV and TensorBoard loggers, and one table of losses.

Each start of a run logs into a folder of its own, named after the step it starts from, so that a
resumed run never rewrites what an earlier one logged; the table takes the newest row of each step.
"""

import csv
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

COLUMNS = ("step", "train_nll", "validation_nll", "lr", "positions", "grad_norm")


def make_loggers(folder: Path, start: int) -> list[Any]:
    """Loggers for a start from step `start`."""
    logs = folder / "logs"
    version = f"from-step-{start:06d}-{time.time_ns()}"
    return [
        CSVLogger(logs, name="csv", version=version, flush_logs_every_n_steps=1),
        TensorBoardLogger(str(logs), name="tensorboard", version=version),
    ]


def merge_losses(folder: Path) -> None:
    """Write losses.csv: one row per step; of steps done twice, the later start's row."""
    rows: dict[int, dict[str, str]] = {}
    logs = sorted((folder / "logs" / "csv").glob("from-step-*/metrics.csv"), key=_started)
    for file in logs:
        with file.open(newline="", encoding="utf-8") as content:
            for row in csv.DictReader(content):
                rows[int(row["step"])] = row
    with (folder / "losses.csv").open("w", newline="", encoding="utf-8") as content:
        writer = csv.DictWriter(content, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))


def _started(file: Path) -> int:
    return int(file.parent.name.rsplit("-", 1)[1])
