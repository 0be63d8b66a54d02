"""Commands about models: `plait sample|export`."""

import argparse
from pathlib import Path

from plait.cli.shared import add_command
from plait.errors import ConfigError


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add them."""
    _add_sample(commands)
    _add_export(commands)


def _add_sample(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "sample", _sample, "Let a trained model answer, about media.")
    parser.add_argument("model", help="a run's folder or a checkpoint")
    for medium, name in (("image", "a picture"), ("audio", "a sound"), ("video", "a film")):
        parser.add_argument(
            f"--{medium}", action="append", default=[], metavar="FILE",
            help=f"{name} to read; each gets an answer of its own (may be repeated)",
        )  # fmt: skip
    parser.add_argument("--text", default="", help="text after the media in the user's turn")
    parser.add_argument(
        "--together", action="store_true", help="ask about all media at once, in this order: "
        "pictures, sounds, films"
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=32, help="length of an answer at most")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most probable token (default)"
    )
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of sampling with a temperature")


def _sample(words: argparse.Namespace) -> None:
    from plait.client import ServiceClient
    from plait.modalities import Audio, Image, MediaPart, Video
    from plait.types import SamplingParams

    media: list[MediaPart] = [
        *map(Image, words.image), *map(Audio, words.audio), *map(Video, words.video)
    ]  # fmt: skip
    if not media and not words.text:
        raise ConfigError(
            "a model needs something to read; add --image, --audio or --video FILE, or --text TEXT"
        )
    for part in media:
        part.header()  # refuse a bad file before minutes of loading
    client = ServiceClient().create_sampling_client(words.model)
    params = SamplingParams(
        max_tokens=words.max_tokens, temperature=words.temperature, seed=words.seed
    )
    tail = [words.text] if words.text else []
    if words.together or not media:
        asked = [("", client.prompt(*media, *tail))]
    else:
        asked = [(part.file, client.prompt(part, *tail)) for part in media]
    for name, prompt in asked:
        response = client.sample(prompt, words.samples, params).result()
        for sequence in response.sequences:
            text = client.get_tokenizer().decode(sequence.tokens, skip_special_tokens=True)
            print(f"{name}: {text.strip()}" if name else text.strip())


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "export", _export,
        "Write a checkpoint for plain transformers and peft, load it there and compare.",
    )  # fmt: skip
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint's, or a tinker:// path")
    parser.add_argument("out", metavar="OUT", help="the folder to write, which must be free")
    parser.add_argument(
        "--merge", action="store_true", help="the whole language model instead of its adapter"
    )
    parser.add_argument("--dtype", help="of a whole model's weights (default: the run's)")
    parser.add_argument(
        "--store", metavar="FOLDER", help="where tinker:// paths lie (default: $PLAIT_HOME/runs)"
    )


def _export(words: argparse.Namespace) -> None:
    from plait.home import home
    from plait.trainer.export import export
    from plait.trainer.source import Source
    from plait.trainer.store import Store

    store = Store(Path(words.store) if words.store else home() / "runs")
    done = export(
        Source(store, words.checkpoint), Path(words.out), merge=words.merge, dtype=words.dtype
    )
    found, loader = done.compared, "transformers" if done.merged else "peft"
    print(
        f"wrote {done.folder}; plain {loader} in another process computes its logits: at "
        f"{found.positions} positions they differ by {found.largest_difference:.1e} at most, of "
        f"logits up to {found.largest_logit:.1f} that training changed by "
        f"{found.trained_change:.1e} on average"
    )
