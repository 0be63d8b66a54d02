"""Records to samples to packs.

`plait.datasets.open(path)` gives the rows of a dataset, as samples; see `open_records`.
`plait.datasets.stream(shards)` reads WebDataset shards in order (`stream_shards`), and
`plait.datasets.write_shards(records, folder)` writes them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.datasets.records.opening import open_records as open  # noqa: A004
    from plait.datasets.records.shards.stream import stream_shards as stream
    from plait.datasets.records.shards.write import write_shards

__all__ = ["open", "stream", "write_shards"]

_FOUND_IN = {
    "open": ("plait.datasets.records.opening", "open_records"),
    "stream": ("plait.datasets.records.shards.stream", "stream_shards"),
    "write_shards": ("plait.datasets.records.shards.write", "write_shards"),
}


def __getattr__(name: str) -> Any:
    """Brought when it is first used: importing a room stays light."""
    if name in _FOUND_IN:
        from importlib import import_module

        module, function = _FOUND_IN[name]
        return getattr(import_module(module), function)
    raise AttributeError(f"module 'plait.datasets' has no attribute {name!r}")
