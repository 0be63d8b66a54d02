"""One command: its words, its errors and its exit code.

Errors that Plait raises on purpose become one line and an exit code: 2 for bad input, 1 for a
failure, 130 when the user stopped it.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from plait.cli import data, models, runs, serving
from plait.errors import Interrupted, PlaitError

ABOUT = "Fine-tune models that read text, pictures, sound and film, on your own machine."

EXAMPLES = """\
a first run:
  plait fetch stamps                 bring two small models and 785 captioned pictures
  plait train configs/stamps.yaml    train (about 7 minutes on two cores)
  plait report runs/stamps           write runs/stamps/report.html
  plait sample runs/stamps --image cat.png
  plait export runs/stamps out --merge   the language model, for plain transformers

your own pictures, with a .txt beside each or a captions.csv:
  plait train configs/stamps.yaml --data my-folder --run-dir runs/mine

  plait lint my-folder               every row's problems, without training
  plait convert my-folder shards     the same rows as WebDataset shards

a server, for this client, the tinker client and OpenAI's API:
  plait serve --model configs/stamps.yaml

other media: plait fetch speech, sounds, films or plaited, and the recipe of that name
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
    for group in (data, runs, models, serving):
        group.add_commands(commands)
    return parser
