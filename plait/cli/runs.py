"""Commands about runs: `plait train|report|plan|preview`."""

import argparse
from pathlib import Path

from plait.cli.shared import add_command, add_recipe, recipe_of, terminal


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add them."""
    _add_train(commands)
    _add_report(commands)
    _add_plan(commands)
    _add_preview(commands)


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "train", _train, "Train from a recipe; run it again to resume after any stop."
    )
    add_recipe(parser)
    parser.add_argument(
        "--devices", type=int, metavar="N",
        help="train on so many GPUs, or in so many processes on a CPU; nothing else is to be run",
    )  # fmt: skip
    parser.add_argument(
        "--fresh", action="store_true", help="delete what the run's folder holds and start anew"
    )


def _train(words: argparse.Namespace) -> None:
    from plait.trainer.run import train

    if words.devices is not None:
        words.set = [*words.set, f"devices={words.devices}"]
    console, config = terminal(), recipe_of(words)
    metrics = train(config, console, fresh=words.fresh)
    if metrics is None:
        print(f"{config.folder} is finished; add --fresh to train it anew")
    else:
        from plait.trainer.summary import print_metrics

        print_metrics(metrics, console)
    print(f"next: plait report {config.folder}")


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "report", _report, "Write report.html of a finished run.")
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, for example: runs/stamps")


def _report(words: argparse.Namespace) -> None:
    from plait.trainer.reports.report import write_report

    print(f"wrote {write_report(Path(words.run_dir))}")


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "plan", _plan, "Say what a training would do and need, without training."
    )
    add_recipe(parser)


def _plan(words: argparse.Namespace) -> None:
    from plait.trainer.plan import plan, print_plan

    console = terminal()
    print_plan(plan(recipe_of(words)), console)


def _add_preview(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "preview", _preview,
        "Write an HTML page of samples as the model will see them, and what carries loss.",
    )  # fmt: skip
    add_recipe(parser)
    parser.add_argument("--rows", type=int, default=12, help="training rows to show")
    parser.add_argument("--out", default="preview.html", help="the page to write")


def _preview(words: argparse.Namespace) -> None:
    from plait.trainer.preview import preview

    print(f"wrote {preview(recipe_of(words), words.rows, Path(words.out))}")
