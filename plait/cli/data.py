"""Commands about data: `plait fetch|info`."""

import argparse

from plait.cli.shared import add_command, terminal


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add them."""
    _add_fetch(commands)
    _add_info(commands)


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
        commands, "info", _info, "Say what is installed and cached, or what a path holds."
    )
    parser.add_argument("path", nargs="?", help="a run, a checkpoint, or a dataset")


def _info(words: argparse.Namespace) -> None:
    from plait.trainer.info import print_info

    print_info(words.path, terminal())
