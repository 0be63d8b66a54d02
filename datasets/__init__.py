"""Records to samples to packs.

`plait.datasets.open(path)` gives the rows of a dataset, as samples; see `open_records`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.datasets.records.opening import open_records as open  # noqa: A004

__all__ = ["open"]


def __getattr__(name: str) -> Any:
    """`open` is brought when it is first used: importing a room stays light."""
    if name == "open":
        from plait.datasets.records.opening import open_records

        return open_records
    raise AttributeError(f"module 'plait.datasets' has no attribute {name!r}")
