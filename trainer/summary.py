"""A run's numbers as a table for the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

ROWS = {
    "nll_matched": "nll per token, right picture",
    "nll_shuffled": "nll per token, another class's picture",
    "class_accuracy": "class accuracy",
}


def print_metrics(metrics: dict[str, Any], console: Console) -> None:
    """Print before and after on the test rows."""
    table = Table(title=f"{metrics['name']}: {metrics['test']['count']} test rows")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for key, text in ROWS.items():
        table.add_row(text, _number(metrics["before"][key]), _number(metrics["test"][key]))
    console.print(table)
    seconds, memory = metrics["seconds"]["total"], metrics["peak_memory_mb"]
    console.print(f"{seconds:.0f} s, peak memory {memory} MB, best step {metrics['best_step']}")
    for note in metrics["notes"]:
        console.print(f"[yellow]note:[/] {note}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
