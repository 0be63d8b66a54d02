"""What commands share: how one is added, and the recipe that several of them take."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from plait.trainer.config import RunConfig


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    """A command that `run` executes; `text` stands in both helps."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The words of a command that reads a recipe; `recipe_of` reads them."""
    parser.add_argument("recipe", help="a YAML recipe, for example: configs/stamps.yaml")
    parser.add_argument(
        "--data", metavar="PATH",
        help="use these rows: a folder of media with .txt files, a table, or shards",
    )  # fmt: skip
    parser.add_argument("--run-dir", metavar="FOLDER", help="where the run is kept")
    parser.add_argument("--seed", type=int, help="draws weights, order and views")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`--set`, for commands with a recipe."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="change any setting, for example: --set train.steps=50 (may be repeated)",
    )  # fmt: skip


def recipe_of(words: argparse.Namespace) -> "RunConfig":
    """The recipe that the words name, with what they change.

    Raises:
        ConfigError: it cannot be used.
    """
    from plait.trainer.config import load_config

    overrides = list(words.set)
    if words.data is not None:
        overrides += ["data.blend=null", f"data.path={_quoted(words.data)}"]
        if not _may_be_captions(words.data):
            overrides.append("data.captions=null")
    if words.run_dir is not None:
        overrides.append(f"run_dir={_quoted(words.run_dir)}")
    if words.seed is not None:
        overrides.append(f"seed={words.seed}")
    return load_config(words.recipe, overrides)


def _may_be_captions(path: str) -> bool:
    """Whether a recipe's choice of how captions become samples can hold for other rows.

    What cannot be opened may be: the error is told where the rows are really opened.
    """
    from plait.datasets.records import open_records
    from plait.errors import PlaitError

    try:
        return open_records(path).dialect in ("captions", "folder", "mixed")
    except PlaitError:
        return True


def _quoted(text: str) -> str:
    """A value in YAML that stays a string whatever it looks like."""
    import json

    return json.dumps(text)


def terminal() -> "Console":
    """Where tables and bars are printed."""
    from rich.console import Console

    return Console(highlight=False)
