"""The command line: `plait fetch|train|report|sample|preview|plan|info`.

Each command parses its words and calls one function of a room. Errors that Plait raises on purpose
become one line and an exit code: 2 for bad input, 1 for a failure, 130 when the user stopped it.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plait.errors import ConfigError, Interrupted, PlaitError

if TYPE_CHECKING:
    from rich.console import Console

    from plait.trainer.config import RunConfig

ABOUT = "Fine-tune models that read text and pictures, on your own machine."

EXAMPLES = """\
a first run:
  plait fetch stamps                 bring two small models and 785 captioned pictures
  plait train configs/stamps.yaml    train (about 7 minutes on two cores)
  plait report runs/stamps           write runs/stamps/report.html
  plait sample runs/stamps --image cat.png

your own pictures, with a .txt beside each or a captions.csv:
  plait train configs/stamps.yaml --data my-folder --run-dir runs/mine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser().parse_args(words)
    try:
        _quiet_libraries()
        run: Callable[[argparse.Namespace], None] = parsed.run
        run(parsed)
        sys.stdout.flush()  # or a reader that has gone would be noticed after the exit code
    except PlaitError as error:
        prefix = "" if isinstance(error, Interrupted) else "error: "
        print(f"{prefix}{_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:  # what was asked for did not reach its reader: `plait ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _quiet_libraries() -> None:
    """What libraries print about themselves is not the user's concern."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"lightning|transformers|torch|torchvision")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plait",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_fetch(commands)
    _add_train(commands)
    _add_report(commands)
    _add_sample(commands)
    _add_preview(commands)
    _add_plan(commands)
    _add_info(commands)
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_fetch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(
        commands, "fetch", _fetch, "Bring a recipe's weights and data to $PLAIT_HOME, checked."
    )
    parser.add_argument(
        "source",
        nargs="?",
        help="stamps, or another name that is listed, or a file of yours (.yaml)",
    )
    parser.add_argument("--list", action="store_true", help="say what can be brought")


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(
        commands, "train", _train, "Train from a recipe; run it again to resume after any stop."
    )
    _add_recipe(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="delete what the run's folder holds and start anew"
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe, for example: configs/stamps.yaml")
    parser.add_argument(
        "--data", metavar="PATH",
        help="use these rows: a folder of pictures with .txt files or a .csv, or a .jsonl file",
    )  # fmt: skip
    parser.add_argument("--run-dir", metavar="FOLDER", help="where the run is kept")
    parser.add_argument("--seed", type=int, help="draws weights, order and views")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="change any setting, for example: --set train.steps=50 (may be repeated)",
    )  # fmt: skip


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "report", _report, "Write report.html of a finished run.")
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, for example: runs/stamps")


def _add_sample(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "sample", _sample, "Let a trained model answer, about pictures.")
    parser.add_argument("model", help="a run's folder or a checkpoint")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE",
        help="a picture to read; each gets an answer of its own (may be repeated)",
    )  # fmt: skip
    parser.add_argument("--text", default="", help="text after the picture in the user's turn")
    parser.add_argument("--max-tokens", type=int, default=32, help="length of an answer at most")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most probable token (default)"
    )
    parser.add_argument("--samples", type=int, default=1, help="answers per picture")
    parser.add_argument("--seed", type=int, default=0, help="of sampling with a temperature")


def _add_preview(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(
        commands, "preview", _preview,
        "Write an HTML page of samples as the model will see them, and what carries loss.",
    )  # fmt: skip
    _add_recipe(parser)
    parser.add_argument("--rows", type=int, default=12, help="training rows to show")
    parser.add_argument("--out", default="preview.html", help="the page to write")


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(
        commands, "plan", _plan, "Say what a training would do and need, without training."
    )
    _add_recipe(parser)


def _add_info(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(
        commands, "info", _info, "Say what is installed and cached, or what a path holds."
    )
    parser.add_argument("path", nargs="?", help="a run, a checkpoint, or a dataset")


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def _config(words: argparse.Namespace) -> "RunConfig":
    from plait.trainer.config import load_config

    overrides = list(words.set)
    if words.data is not None:
        overrides.append(f"data.path={_quoted(words.data)}")
        if words.data.endswith(".jsonl"):  # its rows are messages already
            overrides.append("data.captions=null")
    if words.run_dir is not None:
        overrides.append(f"run_dir={_quoted(words.run_dir)}")
    if words.seed is not None:
        overrides.append(f"seed={words.seed}")
    return load_config(words.recipe, overrides)


def _quoted(text: str) -> str:
    """A value in YAML that stays a string whatever it looks like."""
    import json

    return json.dumps(text)


def _fetch(words: argparse.Namespace) -> None:
    from plait.datasets.fetch import fetch, listing, terminal_progress

    if words.list or words.source is None:
        print(listing())
        return
    from plait.encoders.weights import resolve

    fetch(words.source, terminal_progress(), resolve)


def _train(words: argparse.Namespace) -> None:
    from plait.trainer.run import train

    console, config = _console(), _config(words)
    metrics = train(config, console, fresh=words.fresh)
    if metrics is None:
        print(f"{config.folder} is finished; add --fresh to train it anew")
    else:
        from plait.trainer.summary import print_metrics

        print_metrics(metrics, console)
    print(f"next: plait report {config.folder}")


def _report(words: argparse.Namespace) -> None:
    from plait.trainer.reports.report import write_report

    print(f"wrote {write_report(Path(words.run_dir))}")


def _sample(words: argparse.Namespace) -> None:
    from plait.client import ServiceClient
    from plait.modalities import Image
    from plait.types import SamplingParams

    if not words.image and not words.text:
        raise ConfigError("a model needs something to read; add --image FILE or --text TEXT")
    images = [Image(file) for file in words.image]
    for image in images:
        image.header()  # refuse a bad file before minutes of loading
    client = ServiceClient().create_sampling_client(words.model)
    params = SamplingParams(
        max_tokens=words.max_tokens, temperature=words.temperature, seed=words.seed
    )
    tail = [words.text] if words.text else []
    asked = {image.file: client.prompt(image, *tail) for image in images}
    for name, prompt in (asked or {"": client.prompt(*tail)}).items():
        response = client.sample(prompt, words.samples, params).result()
        for sequence in response.sequences:
            text = client.get_tokenizer().decode(sequence.tokens, skip_special_tokens=True)
            print(f"{name}: {text.strip()}" if name else text.strip())


def _preview(words: argparse.Namespace) -> None:
    from plait.trainer.preview import preview

    print(f"wrote {preview(_config(words), words.rows, Path(words.out))}")


def _plan(words: argparse.Namespace) -> None:
    from plait.trainer.plan import plan, print_plan

    console = _console()
    print_plan(plan(_config(words)), console)


def _info(words: argparse.Namespace) -> None:
    from plait.trainer.info import print_info

    print_info(words.path, _console())


if __name__ == "__main__":
    sys.exit(main())
