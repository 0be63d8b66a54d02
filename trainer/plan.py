"""`plait plan`: what a training would do and need, before it starts.

Counts come from headers and texts alone. Memory is predicted by rehearsal: the largest pack is
computed and stepped once, the longest evaluation stream once, and one batch of pictures encoded;
what only grows during a run (cached features) is added by arithmetic.
"""

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from plait.datasets.schedule import Block, PlanSummary, Schedule, summarise
from plait.datasets.truncation import truncated
from plait.stream import Item
from plait.stream import pack as join
from plait.trainer.build import build, parameter_counts
from plait.trainer.config import RunConfig
from plait.trainer.data import open_data
from plait.trainer.features import decide
from plait.trainer.optimiser import make_optimizer, prepare_step
from plait.trainer.phases import Phases
from plait.trainer.schedule import settings_at
from plait.trainer.together import Part, computed
from plait.trainer.workbench import Workbench


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What `plait plan` prints. Memory is in MB (10^6 bytes) of resident memory."""

    rows: PlanSummary
    held_out: dict[str, dict[str, int]]
    """Rows of validation and test, by dataset."""

    steps: int
    packs_per_step: int
    parameters: dict[str, dict[str, int]]
    predicted_peak_mb: float
    feature_cache_mb: float


def plan(config: RunConfig) -> TrainingPlan:
    """Load the model, read every header, and rehearse the largest pack.

    Raises:
        PlaitError: whatever would stop the training before its first step.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    phases = Phases()
    importlib.import_module("lightning")  # its memory counts, and a run needs it
    with phases("load"):
        built = build(config.model, config.seed, config.data.limits)
        bench = Workbench(config, built, open_data(config.data))
        bench.check_held_out()
        bench.require_rows()
    summary, packs = _packs(bench)
    decided = decide(bench, None, measure=False)
    bench.keep_caches({name for name, decision in decided.items() if decision.cached})
    batches = bench.batches_to_cache()
    with phases("features"):
        _encode_largest(bench, batches)
    with phases("evaluation"):
        bench.suite.measure(bench.data.test[:64])
    with phases("train"):
        _rehearse(bench, packs)
    cache_mb = _cache_mb(bench, [item for batch in batches for item in batch])
    splits = bench.data.splits
    return TrainingPlan(
        rows=summary,
        held_out={
            "validation": Counter(bench.data.dataset_of(row) for row in splits.validation),
            "test": Counter(bench.data.dataset_of(row) for row in splits.test),
        },
        steps=config.train.steps,
        packs_per_step=config.train.accumulate,
        parameters=parameter_counts(bench.built.model),
        predicted_peak_mb=phases.peak_memory_mb + cache_mb,
        feature_cache_mb=cache_mb,
    )


def _packs(bench: Workbench) -> tuple[PlanSummary, Block]:
    """The packs of the first epoch (of a blend: the first block), among the measured rows."""
    settings, measured = bench.loader_settings, bench.screened
    packs = Schedule(measured, settings, bench.data.shares).block(0)
    return summarise(measured, packs, limits=settings), packs


def _encode_largest(bench: Workbench, batches: Sequence[Sequence[Item]]) -> None:
    """Decode and encode the batch with the most positions, as the features phase does."""
    for batch in sorted(batches, key=lambda items: sum(i.plan.length for i in items))[-1:]:
        bench.loading.encode(batch[0].plan.encoder, [bench.loading.decode(i) for i in batch])


def _rehearse(bench: Workbench, packs: Block) -> None:
    """One optimiser step on the largest pack, on weights that are thrown away."""
    rows, lengths = bench.screened.rows, bench.screened.lengths
    largest = max(packs, key=lambda pack: int(lengths[list(pack)].sum()))
    documents = [
        truncated(bench.render(bench.data.records[rows[place].row]), rows[place].length)
        for place in largest
    ]
    inputs = [[bench.loading(item) for item in document.items] for document in documents]
    model = bench.built.model.train()
    trainable = list(model.trainable())
    optimizer = make_optimizer(trainable)
    for _ in range(2):  # the second finds the optimiser's state allocated
        with computed([Part(model, join(documents, inputs))]) as [sums]:
            sums.loss.backward()  # type: ignore[no-untyped-call]
        prepare_step(trainable, optimizer, settings_at(0, bench.config.train), sums.weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _cache_mb(bench: Workbench, items: Sequence[Item]) -> float:
    """Features that will be held in memory once all are computed, up to the bound."""
    total = 0.0
    for item in items:
        encoder = bench.encoders[item.plan.encoder]
        total += item.plan.length * encoder.encoder.width * encoder.encoder.dtype.itemsize
    return min(total / 1e6, float(bench.config.train.cache_memory_mb))


def print_plan(found: TrainingPlan, console: Console) -> None:
    """The plan as tables for a terminal."""
    rows, table = found.rows, Table(title="rows", title_justify="left")
    for column in ("dataset", "train", *found.held_out):
        table.add_column(column)
    for name, count in rows.samples.items():
        held_out = (str(held.get(name, 0)) for held in found.held_out.values())
        table.add_row(name, str(count), *held_out)
    console.print(table)
    packing = Table(title="packs", title_justify="left", show_header=False)
    for medium, positions in rows.positions.items():
        packing.add_row(f"positions of {medium}", f"{positions:,}")
    packing.add_row("packs an epoch", str(rows.packs))
    packing.add_row("fill of a pack", f"{rows.fill:.3f} of {rows.capacity} positions")
    packing.add_row("largest pack", f"{rows.largest_pack} positions")
    if rows.cut:
        packing.add_row("rows cut to fit", str(rows.cut))
    epochs = found.steps * found.packs_per_step / max(1, rows.packs)
    packing.add_row("steps", f"{found.steps} ({epochs:.1f} epochs)")
    console.print(packing)
    parts = Table(title="parameters", title_justify="left")
    for column in ("part", "trainable", "frozen"):
        parts.add_column(column, justify="left" if column == "part" else "right")
    for part, counts in found.parameters.items():
        parts.add_row(part, f"{counts['trainable']:,}", f"{counts['frozen']:,}")
    console.print(parts)
    console.print(f"predicted peak memory: {found.predicted_peak_mb:.0f} MB")
    for status, reasons in rows.reasons().items():
        for reason, count in reasons.items():
            console.print(f"[yellow]{status}:[/] {count} rows: {reason}")
