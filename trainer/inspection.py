"""`plait lint` and `plait info`: datasets looked at row by row, alone or as a recipe reads them."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from plait.datasets.decoding import Decoder
from plait.datasets.headers import HeaderCache
from plait.datasets.packing import WINDOW, cost_stream, fill_of, stream_packs
from plait.datasets.policy import rule_of
from plait.datasets.records import Records
from plait.datasets.survey import Inspect, MediumFacts, Problem, Survey, survey
from plait.errors import DataError
from plait.home import home
from plait.modalities import Limits
from plait.stream import Sample, check_placeholders, render
from plait.trainer.build import build
from plait.trainer.config import RunConfig
from plait.trainer.progress import bar

SHOWN = 5
"""Problems of each rule that are printed one by one."""

_KIND = {True: "[yellow]warning[/]", False: "[red]error[/]"}
_UNITS = {"seconds": "s", "width": "px", "height": "px", "fps": "/s", "rate": "Hz", "channels": ""}


@dataclass(frozen=True, slots=True)
class Packing:
    """How rows fill packs, in one pass in their order; what does not fit is left out."""

    capacity: int
    packs: int
    fill: float


def look(
    opened: Sequence[Records],
    console: Console,
    *,
    recipe: RunConfig | None = None,
    decode: bool = False,
) -> list[Survey]:
    """Look at every row of some datasets.

    Args:
        recipe: Rows are also rendered as this recipe does, which loads its model.
        decode: Every medium is decoded to its end, in processes that can be killed.

    Raises:
        PlaitError: the recipe's model cannot be used.
    """
    limits = recipe.data.limits if recipe else Limits()
    found = []
    with ExitStack() as stack:
        decoder = stack.enter_context(closing(Decoder()))
        headers = stack.enter_context(closing(HeaderCache(home() / "headers", decoder.header)))
        inspect = None if recipe is None else _renderer(recipe, headers)
        for records in opened:
            with bar(console, f"reading {records.name}", len(records)) as advance:
                seen = survey(
                    records, headers, limits=limits, inspect=inspect, progress=advance,
                    decode=(lambda part: decoder.decode(part, limits)) if decode else None,
                )  # fmt: skip
            found.append(seen)
    return found


def _renderer(recipe: RunConfig, headers: HeaderCache) -> Inspect:
    """What a sample takes in the recipe's stream; refuses what its packs cannot hold."""
    built = build(recipe.model, recipe.seed, recipe.data.limits)
    for name in built.model.encoders:
        built.model.media_encoder(name).headers = headers
    capacity, too_long = recipe.train.capacity, recipe.data.broken.too_long

    def inspect(sample: Sample) -> int:
        document = render(sample, built.tokenizer, built.layout)
        check_placeholders(document, built.layout.placeholder_id)
        if document.length > capacity and too_long == "error":
            raise DataError(
                f"a row must fit in a pack of {capacity} positions; this one has "
                f"{document.length}; shorten it, raise train.capacity, or set data.broken.too_long"
            )
        return document.length

    return inspect


def lint(
    opened: Sequence[Records],
    console: Console,
    *,
    recipe: RunConfig | None = None,
    decode: bool = False,
    out: Path | None = None,
) -> None:
    """Print every problem of some datasets, the rules that were broken first.

    Args:
        out: Where all problems are written, one JSON object a line.

    Raises:
        DataError: a row cannot be used; all is printed before.
    """
    found = look(opened, console, recipe=recipe, decode=decode)
    problems = [problem for seen in found for problem in seen.problems]
    rows = sum(seen.rows for seen in found)
    if problems:
        console.print(_rules(problems))
    _print_some(problems, console)
    if out is not None:
        lines = (json.dumps(problem.plain(), ensure_ascii=False) for problem in problems)
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for records in opened:
        for note in records.notes():
            console.print(f"[yellow]note:[/] {note}")
    errors = sum(len(seen.errors) for seen in found)
    if errors:
        raise DataError(
            f"every row must be usable; {errors} of {rows} are not; mend or remove them, or skip "
            "them in training with data.broken.on_error: skip"
        )
    looked = "decoded" if decode else "headers alone were read; --decode reads all"
    console.print(f"{rows} rows, none broken ({looked})")


def _print_some(problems: Sequence[Problem], console: Console) -> None:
    shown: Counter[tuple[bool, str]] = Counter()
    for problem in problems:
        rule = problem.warning, rule_of(problem.message)
        shown[rule] += 1
        if shown[rule] <= SHOWN:
            console.print(_KIND[problem.warning], end=" ")
            console.print(f"{problem.message} ({problem.origin})", markup=False)
    if any(count > SHOWN for count in shown.values()):
        console.print(f"{SHOWN} of each rule are shown; --out FILE writes all {len(problems):,}")


def describe(
    opened: Sequence[Records], console: Console, *, recipe: RunConfig | None = None
) -> None:
    """Print what some datasets hold: rows, media, lengths, and how they fill a recipe's packs."""
    capacity = recipe.train.capacity if recipe else None
    for records, seen in zip(opened, look(opened, console, recipe=recipe), strict=True):
        console.print(_facts(records, seen, capacity))
        if seen.media:
            console.print(_media(seen))
        for reason, count in Counter(rule_of(p.message) for p in seen.problems).most_common():
            console.print(f"[yellow]note:[/] {count} x {reason}")


def packing_of(positions: Sequence[int], capacity: int) -> Packing:
    """How rows of these lengths fill packs."""
    held = np.array([length for length in positions if length <= capacity], dtype=np.int64)
    costs = np.stack([held, np.ones_like(held)], axis=1)  # a document has a position
    packs = list(stream_packs(cost_stream(costs), (capacity, capacity), WINDOW))
    taken = [int(held[list(pack)].sum()) for pack in packs]
    return Packing(capacity, len(packs), fill_of(taken, capacity))


def _rules(problems: Sequence[Problem]) -> Table:
    """How often each rule was broken, and where first."""
    counts = Counter((problem.warning, rule_of(problem.message)) for problem in problems)
    table = Table("", "rows", "rule", "first")
    for (warning, rule), count in sorted(counts.items(), key=lambda one: (one[0][0], -one[1])):
        first = next(
            p.origin for p in problems if (p.warning, rule_of(p.message)) == (warning, rule)
        )
        table.add_row(
            _KIND[warning], str(count), rule, f"row {first.row}" if first.row is not None else "-"
        )
    return table


def _facts(records: Records, seen: Survey, capacity: int | None) -> Table:
    table = Table(title=str(records.path), show_header=False, title_justify="left")
    usable = seen.rows - len(seen.errors)
    table.add_row("dialect", records.dialect)
    table.add_row(
        "rows", f"{seen.rows:,}" + ("" if usable == seen.rows else f", {usable:,} usable")
    )
    for kind, count in seen.kinds.most_common():
        table.add_row(f"  {kind or 'nothing'}", f"{count:,}")
    if seen.labels:
        shown = ", ".join(f"{label} ({count})" for label, count in seen.labels.most_common(8))
        table.add_row(
            f"{len(seen.labels)} classes", shown + (" ..." if len(seen.labels) > 8 else "")
        )
    table.add_row("characters of a row", _spread(seen.characters))
    if max(seen.turns, default=0):
        table.add_row("turns of a row", _spread(seen.turns))
    if capacity is not None:
        packing = packing_of(seen.positions, capacity)
        table.add_row("positions of a row", _spread(seen.positions))
        table.add_row(f"packs of {capacity:,}", f"{packing.packs:,}, filled {packing.fill:.4f}")
    return table


def _media(seen: Survey) -> Table:
    table = Table("medium", "items", "MB", "formats", "of each: median (least to most)")
    for medium, facts in sorted(seen.media.items()):
        formats = ", ".join(f"{form} {count}" for form, count in facts.formats.most_common(5))
        table.add_row(
            medium, f"{facts.count:,}", f"{facts.bytes / 1e6:,.1f}", formats, _numbers(facts)
        )
    return table


def _numbers(facts: MediumFacts) -> str:
    lines = [
        f"{name} {_spread(values)} {_UNITS.get(name, '')}".rstrip()
        for name, values in facts.numbers.items()
    ]
    seconds = facts.numbers.get("seconds")
    return "\n".join([*lines, *([f"{sum(seconds) / 60:,.1f} minutes in all"] if seconds else [])])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle, least, most = np.median(values), min(values), max(values)
    return f"{middle:,.6g} ({least:,.6g} to {most:,.6g})"
