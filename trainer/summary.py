"""A run's numbers as a table for the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

Values = dict[str, Any]

ROWS = {
    "nll_matched": "nll per token, right media",
    "nll_shuffled": "nll per token, another class's media",
    "class_accuracy": "class accuracy",
    "word_error_rate": "word error rate",
}


def print_metrics(metrics: dict[str, Any], console: Console) -> None:
    """Print before and after on the test rows."""
    table = Table(title=f"{metrics['name']}: {metrics['test']['count']} test rows")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for key, text in ROWS.items():
        before, after = metrics["before"][key], metrics["test"][key]
        if after is not None or key.startswith("nll"):
            table.add_row(text, _number(before), _number(after))
    for title, before, after in _gaps(metrics["before"], metrics["test"]):
        table.add_row(
            title, _number(before["difference"] if before else None), _with_interval(after)
        )
    console.print(table)
    seconds, memory = metrics["seconds"]["total"], metrics["peak_memory_mb"]
    console.print(f"{seconds:.0f} s, peak memory {memory} MB, best step {metrics['best_step']}")
    for note in metrics["notes"]:
        console.print(f"[yellow]note:[/] {note}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _gaps(before: Values, after: Values) -> Iterator[tuple[str, Values | None, Values]]:
    """(what was changed, before, after) of each measured gap."""
    if after["shuffled_gap"]:
        yield "lost with another's media", before["shuffled_gap"], after["shuffled_gap"]
    for medium, gap in after["without"].items():
        yield f"lost without {medium}", before["without"].get(medium), gap
    if after["single_frame"]:
        yield "lost with one frame", before["single_frame"], after["single_frame"]


def _with_interval(gap: Values) -> str:
    return f"{gap['difference']:.3f} ({gap['low']:.2f} to {gap['high']:.2f})"
