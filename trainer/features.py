"""Whether a run keeps the features of its frozen encoders: decided once, and written down.

    runs/stamps/features.json    {"efficientnet_lite": {"cached": true, "why": ..., ...}}

A resumed run goes by what its first process decided: whether features come from the cache or are
computed beside others of a micro-batch changes their last bits. An encoder that trains is not
asked: its features change with every step.
"""

import statistics
import tempfile
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from plait.datasets.schedule import Schedule
from plait.encoders.feature_cache import FeatureCache
from plait.encoders.feature_folder import OVERHEAD, FeatureFolder
from plait.errors import DataError
from plait.stream import Item, ItemInputs
from plait.trainer.evaluation.exchanges import DERANGEMENT_SEEDS
from plait.trainer.files import write_json
from plait.trainer.loading import BATCH
from plait.trainer.rundir import read_json
from plait.trainer.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether an encoder's features are kept, and what that rests on.

    `reads` is how often the run needs features of `items`; `megabytes` what all of them take on
    the disk. The times are of one item, where they were measured.
    """

    cached: bool
    why: str
    items: int = 0
    reads: int = 0
    megabytes: float = 0.0
    encode_ms: float | None = None
    read_ms: float | None = None


@dataclass(slots=True)
class _Use:
    """What a run needs of one encoder."""

    items: dict[Hashable, Item] = field(default_factory=dict)
    reads: float = 0.0

    def bytes(self, position: float) -> float:
        """On the disk, with so many bytes a position."""
        positions = sum(item.plan.length for item in self.items.values())
        return positions * position + len(self.items) * OVERHEAD


@dataclass(frozen=True, slots=True)
class _Measured:
    """Seconds of an item, to encode it and to read its features, and bytes of a position.

    A position that a projector makes of several has the features of all of them.
    """

    encode: float
    read: float
    position: float


def settle(bench: Workbench, folder: FeatureFolder, file: Path) -> dict[str, Decision]:
    """What the run decided before, or decides now; the workbench then goes by it.

    Raises:
        CheckpointError: what was written down is damaged.
    """
    if file.is_file():
        found = {name: Decision(**facts) for name, facts in read_json(file).items()}
    else:
        found = decide(bench, folder)
        write_json(file, {name: asdict(decision) for name, decision in found.items()})
    bench.keep_caches({name for name, decision in found.items() if decision.cached})
    return found


def decide(
    bench: Workbench, folder: FeatureFolder | None, *, measure: bool = True
) -> dict[str, Decision]:
    """A decision for each frozen encoder.

    Args:
        folder: Where features would be kept; None asks for no room.
        measure: Encode and read a batch to see which is quicker.
    """
    mode = bench.config.train.cache_features
    if mode != "auto":
        return {name: Decision(mode == "always", f"cache_features: {mode}")
                for name in bench.loading.caches}  # fmt: skip
    room = None if folder is None else _Room(folder)
    uses = _uses(bench)
    return {name: _decide(bench, name, use, room, measure) for name, use in uses.items()}


@dataclass(slots=True)
class _Room:
    """The folder, and what the encoders that were decided on before will take of it."""

    folder: FeatureFolder
    keys: set[str] = field(default_factory=set)
    promised: float = 0.0

    def take(self, bench: Workbench, name: str, use: _Use, position: float) -> bool:
        """Whether all features of an encoder fit beside what else must stay; then they will."""
        cache = bench.loading.caches[name]
        items: dict[str, Item] = {}
        for item in use.items.values():
            with suppress(DataError):  # a broken row is the loader's to meet
                items[bench.loading.key(item)] = item
        self.folder.touch(cache, items)
        missing = _Use({key: item for key, item in items.items() if not cache.path(key).is_file()})
        needed = self.promised + missing.bytes(position)
        if not self.folder.make_room(round(needed), self.keys | items.keys()):
            return False
        self.keys |= items.keys()
        self.promised = needed
        return True


def _decide(bench: Workbench, name: str, use: _Use, room: _Room | None, measure: bool) -> Decision:
    encoder = bench.encoders[name].encoder
    position = float(encoder.width * encoder.dtype.itemsize)
    found = Decision(
        cached=True, why="they are read several times", items=len(use.items),
        reads=round(use.reads), megabytes=round(use.bytes(position) / 1e6, 3),
    )  # fmt: skip
    if use.reads <= len(use.items):
        return replace(found, cached=False, why="each item would be read about once")
    measured = _measure(bench, name, list(use.items.values())) if measure else None
    if measured is not None:
        position = measured.position
        found = replace(
            found, megabytes=round(use.bytes(position) / 1e6, 3),
            encode_ms=round(1000 * measured.encode, 3), read_ms=round(1000 * measured.read, 3),
        )  # fmt: skip
        if measured.read >= measured.encode:
            return replace(found, cached=False, why="encoding is quicker than reading")
    if room is not None and not room.take(bench, name, use, position):
        most = bench.config.train.cache_disk_mb
        return replace(
            found, cached=False, why=f"train.cache_disk_mb, {most}, has no room for them"
        )
    return found


def _uses(bench: Workbench) -> dict[str, _Use]:
    """What the run will read of each encoder whose features may be kept."""
    uses = {name: _Use() for name in bench.loading.caches}
    splits, train = bench.data.splits, bench.config.train
    drawn = _draws(bench)
    for row in splits.train:
        for item in bench.items(row):
            if item.plan.encoder in uses:
                use = uses[item.plan.encoder]
                use.reads += drawn.get(row, 0.0)
                views = range(bench.config.views.count) if item.part.medium == "image" else (0,)
                for view in views:
                    use.items.setdefault(_identity(item, view), replace(item, view=view))
    validations = train.steps // train.validate_every + 1
    for rows, times in ((splits.validation, validations), (splits.test, _measures(bench))):
        for row in rows:
            for item in bench.items(row):
                if item.plan.encoder in uses:
                    uses[item.plan.encoder].reads += times
                    uses[item.plan.encoder].items.setdefault(_identity(item, 0), item)
    return uses


def _identity(item: Item, view: int) -> Hashable:
    return item.part, str(item.plan.wanted), view


def _draws(bench: Workbench) -> dict[int, float]:
    """How often the run trains on each row: as often as in its first epoch, for all its packs."""
    packs = Schedule(bench.screened, bench.loader_settings, bench.data.shares).block(0)
    if not len(packs):
        return {}
    needed = bench.config.train.steps * bench.config.train.accumulate
    numbers = bench.screened.columns["row"]
    places, counts = np.unique(packs.places, return_counts=True)
    share = needed / len(packs)
    return dict(zip(numbers[places].tolist(), (counts * share).tolist(), strict=True))


def _measures(bench: Workbench) -> int:
    """How often a test row is read: before and after, and with each thing changed."""
    options = bench.config.evaluation
    changes = len(DERANGEMENT_SEEDS) + 4 * options.without + options.single_frame
    return 2 * (1 + changes + options.word_error_rate)


def _measure(bench: Workbench, name: str, items: Sequence[Item]) -> _Measured | None:
    """Decode and encode a batch, write its features and read them; None where all are broken."""
    loading = bench.loading
    started = time.perf_counter()
    decoded: list[tuple[Item, ItemInputs]] = []
    for item in items:
        with suppress(DataError):
            decoded.append((item, loading.decode(item)))
        if len(decoded) == BATCH:
            break
    if not decoded:
        return None
    encoded = loading.encode(name, [inputs for _, inputs in decoded])
    taken = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), name, memory_bytes=0)
        times = []
        for number, features in enumerate(encoded):
            started = time.perf_counter()
            cache.put(cache.key(str(number)), features)
            cache.get(cache.key(str(number)))
            times.append(time.perf_counter() - started)
        size = cache.size().disk_bytes - len(encoded) * OVERHEAD
    positions = sum(item.plan.length for item, _ in decoded)
    # The median: a neighbour that holds the processor for a moment decides nothing.
    return _Measured(taken / len(decoded), statistics.median(times), max(1.0, size / positions))
