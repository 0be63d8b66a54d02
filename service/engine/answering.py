"""What the engine answers at once: conversations, and what only a model's own tokenizer knows."""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from plait.encoders import weights
from plait.errors import DataError, MediaError
from plait.modalities import Audio, Image, Limits, Video
from plait.primitives.sampling import settings_of
from plait.service.engine.chat import Growing, answered, check_texts, rendered, sample_of, texts_of
from plait.service.engine.frames import Header
from plait.service.engine.worker import Answer, Worker, then
from plait.service.wire import sampling as wire_sampling
from plait.stream import render
from plait.trainer.build import Built
from plait.trainer.engine import commands
from plait.trainer.engine.inputs import Media, pieces_of


def chat(worker: Worker, header: Header, body: bytes) -> "Future[Answer]":
    """Answers to a conversation, as text."""
    hosted, given = worker.held(header["scope"]), json.loads(body)
    built = hosted.built
    prompt = rendered(given["prompt"], built, worker.uploaded(header))
    params = wire_sampling.params_from_json(given["sampling_params"])
    stops = tuple(one for one in params.stop or () if isinstance(one, str))
    command = commands.Sample(
        hosted.name,
        prompt,
        settings_of(params, header["seed"], built),
        given["n"],
        on_token=_texts_of(worker, header, built, stops, given["n"]) if given["stream"] else None,
        request=header["operation"],
    )
    length = prompt.length
    return then(
        worker.engine.submit(command),
        lambda done: ({"result": answered(done, built, stops, length)}, b""),
    )


def _texts_of(
    worker: Worker, header: Header, built: Built, stops: tuple[str, ...], count: int
) -> Callable[[int, int, float], None]:
    """Tells the server what comes of each answer's text."""
    growing = [Growing(built.tokenizer, stops) for _ in range(count)]

    def tell(sequence: int, token: int, _: float) -> None:
        if text := growing[sequence].add(token):
            worker.send({"event": "text", "of": header["id"], "sequence": sequence, "text": text})

    return tell


def check_media(worker: Worker, header: Header, _: bytes) -> Answer:
    """Whether an upload is a picture, a sound or a film that may be read; which comes back."""
    path = worker.uploads / header["owner_key"] / header["name"]
    errors = []
    for medium, part in (("image", Image), ("video", Video), ("audio", Audio)):
        try:
            found: Any = worker.decoder.header(part(path), Limits())
        except MediaError as error:
            errors.append(error)
            continue
        return {"result": {"medium": medium, "format": found.format}}, b""
    raise DataError(
        "an upload is a picture, a sound or a film in a format that is known; this file is none"
    ) from errors[-1]


def context(_: Worker, header: Header, __: bytes) -> Answer:
    """How many positions a language model was made for, as its configuration says."""
    folder = weights.resolve(header["language"])
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    return {"result": {"context": getattr(config, "max_position_embeddings", None)}}, b""


def tokenizer(worker: Worker, header: Header, _: bytes) -> Answer:
    """The tokenizer's files as one tar."""
    written = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        worker.held(header["scope"]).built.tokenizer.save_pretrained(folder)
        with tarfile.open(fileobj=written, mode="w") as tar:
            for file in sorted(Path(folder).iterdir()):
                tar.add(file, arcname=file.name)
    return {"result": {}}, written.getvalue()


def render_sample(worker: Worker, header: Header, body: bytes) -> Answer:
    """A sample as the model reads it: what the client's `datum` and `prompt` need."""
    hosted, given = worker.held(header["scope"]), json.loads(body)
    sample = sample_of(given, worker.uploaded(header))
    built = hosted.built
    check_texts(texts_of(sample), built)
    prompt = bool(given["for_generation"])
    document = render(sample, built.tokenizer, built.layout, for_generation=prompt)
    said: Header = {"lengths": [length for _, length in pieces_of(document)]}
    said["pieces"] = [
        [int(token) for token in piece] if not isinstance(piece, Media) else None
        for piece, _ in pieces_of(document)
    ]
    if not prompt:
        said["targets"] = document.targets.tolist()
        said["weights"] = document.weights.tolist()
    return {"result": said}, b""
