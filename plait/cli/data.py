"""Commands about data: `plait fetch|info|lint|convert`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from plait.cli.shared import add_command, add_overrides, recipe_of, terminal
from plait.errors import ConfigError

if TYPE_CHECKING:
    from plait.datasets.records import Records
    from plait.trainer.config import RunConfig


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add them."""
    _add_fetch(commands)
    _add_info(commands)
    _add_lint(commands)
    _add_convert(commands)


def _add_fetch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "fetch", _fetch, "Bring a recipe's weights and data to $PLAIT_HOME, checked."
    )
    parser.add_argument(
        "source",
        nargs="?",
        help="stamps, or another name that is listed, or a file of yours (.yaml)",
    )
    parser.add_argument("--list", action="store_true", help="say what can be brought")


def _fetch(words: argparse.Namespace) -> None:
    from plait.datasets.fetch import fetch, listing, terminal_progress

    if words.list or words.source is None:
        print(listing())
        return
    from plait.encoders.weights import resolve

    fetch(words.source, terminal_progress(), resolve)


def _add_info(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "info", _info,
        "Say what is installed and cached, or what a path holds: rows, media, lengths.",
    )  # fmt: skip
    parser.add_argument("path", nargs="?", help="a run, a checkpoint (tinker://... too), a dataset")
    _add_reading(parser)


def _info(words: argparse.Namespace) -> None:
    from plait.trainer.info import print_info
    from plait.trainer.inspection import describe

    if words.recipe is None and words.dialect is None and words.media_dir is None:
        print_info(words.path, terminal())
    else:
        opened, recipe = _read(words)
        describe(opened, terminal(), recipe=recipe)


def _add_lint(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "lint", _lint, "Look for problems in every row of a dataset, without training."
    )
    parser.add_argument("path", nargs="?", help="rows; a recipe's own where they are left out")
    _add_reading(parser)
    parser.add_argument("--decode", action="store_true", help="decode all media, too")
    parser.add_argument("--out", metavar="FILE", help="write all problems as JSON, one a line")


def _lint(words: argparse.Namespace) -> None:
    from plait.trainer.inspection import lint

    opened, recipe = _read(words)
    out = None if words.out is None else Path(words.out)
    lint(opened, terminal(), recipe=recipe, decode=words.decode, out=out)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """How rows are read that need not be a recipe's."""
    parser.add_argument("--recipe", help="read them as this recipe does, and count positions")
    parser.add_argument("--dialect", help="what the rows' keys mean, instead of recognising it")
    parser.add_argument("--media-dir", metavar="FOLDER", help="where relative media paths start")
    parser.set_defaults(run_dir=None, seed=None)
    add_overrides(parser)


def _read(words: argparse.Namespace) -> "tuple[list[Records], RunConfig | None]":
    """The rows that the words name, and the recipe."""
    from plait.datasets.records import open_records
    from plait.trainer.data import open_datasets

    if words.recipe is None:
        if words.path is None or words.set:
            raise ConfigError("name the rows to look at, or a --recipe whose rows they are")
        return [open_records(words.path, dialect=words.dialect, media_dir=words.media_dir)], None
    words.data = words.path
    words.set += [
        f"data.{key}={json.dumps(value)}"
        for key, value in (("dialect", words.dialect), ("media_dir", words.media_dir))
        if value is not None
    ]
    recipe = recipe_of(words)
    return open_datasets(recipe.data), recipe


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "convert", _convert, "Write rows and their media as WebDataset shards."
    )
    parser.add_argument("path", help="rows: a table, a folder of media with texts, or shards")
    parser.add_argument("out", help="a new folder for the shards")
    parser.add_argument("--dialect", help="what the rows' keys mean, instead of recognising it")
    parser.add_argument("--media-dir", metavar="FOLDER", help="where relative media paths start")
    parser.add_argument("--remote", action="store_true", help="fetch media at addresses")
    parser.add_argument(
        "--shard-mb", type=int, default=256, help="megabytes of a shard at most (256)"
    )
    parser.add_argument(
        "--skip-broken", action="store_true",
        help="leave broken rows out, and list them in OUT.left-out.jsonl",
    )  # fmt: skip


def _convert(words: argparse.Namespace) -> None:
    from plait.datasets.policy import FailurePolicy
    from plait.datasets.records import open_records
    from plait.datasets.records.shards.write import write_shards
    from plait.trainer.progress import bar

    records = open_records(
        words.path, dialect=words.dialect, media_dir=words.media_dir, remote=words.remote
    )
    for note in records.notes():
        print(f"note: {note}")
    policy = FailurePolicy()
    if words.skip_broken:
        policy = FailurePolicy(on_error="skip", max_consecutive=None, max_total=None)
    with bar(terminal(), "writing", len(records)) as advance:
        written = write_shards(
            records, words.out, shard_bytes=words.shard_mb * 1_000_000, policy=policy,
            progress=advance,
        )  # fmt: skip
    print(
        f"wrote {written.folder}: {written.rows:,} rows in {written.shards:,} shards, "
        f"{written.bytes / 1e6:,.1f} MB"
    )
    if written.left_out:
        file = Path(f"{written.folder}.left-out.jsonl")
        lines = [
            {"dataset": o.dataset, "row": o.row, "file": o.file, "reason": reason}
            for o, reason in written.left_out
        ]
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        print(f"left out {len(lines)} broken rows: {file} says which and why")
