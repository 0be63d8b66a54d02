"""What only the server's model knows: its tokenizer, and how it reads messages and media."""

import io
import tarfile
import tempfile
from typing import Any

from plait.client.remote.inputs import sample_to_json
from plait.client.remote.transport import Transport
from plait.modalities import Audio, Image, MediaPart, Part, Video
from plait.primitives.inputs import question
from plait.stream import Message, Sample
from plait.types import (
    AudioChunk,
    Chunk,
    Datum,
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    VideoChunk,
)


class Rendering:
    """
    Args:
        model: A run, or a model that the server offers.
    """

    def __init__(self, transport: Transport, model: str) -> None:
        self._transport, self._model = transport, model
        self._tokenizer: Any = None

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, brought from the server once."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            path, params = "/api/v1/tokenizer", {"model": self._model}
            answer = self._transport.run(self._transport.answer("GET", path, params=params))
            with tempfile.TemporaryDirectory() as folder:
                with tarfile.open(fileobj=io.BytesIO(answer.result().content)) as tar:
                    tar.extractall(folder, filter="data")
                self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return self._tokenizer

    def prompt(self, *content: Part | Message | str) -> ModelInput:
        """The input that asks for an assistant's answer to a user's parts, or to messages."""
        sample = question(content)
        return _input(self._rendered(sample, for_generation=True), sample)

    def _datum(self, sample: Sample) -> Datum:
        said = self._rendered(sample, for_generation=False)
        inputs = {"target_tokens": said["targets"], "weights": said["weights"]}
        return Datum(_input(said, sample), inputs)

    def _rendered(self, sample: Sample, *, for_generation: bool) -> Any:
        async def ask() -> Any:
            body = await sample_to_json(self._transport, sample)
            said = {**body, "model": self._model, "for_generation": for_generation}
            return await self._transport.ask("POST", "/api/v1/render", json=said)

        return self._transport.run(ask()).result()


def _input(said: Any, sample: Sample) -> ModelInput:
    media = iter(sample.media())
    chunks = [
        EncodedTextChunk(tuple(piece)) if piece is not None else _chunk(next(media), length)
        for piece, length in zip(said["pieces"], said["lengths"], strict=True)
    ]
    return ModelInput(tuple(chunks))


def _chunk(part: MediaPart, length: int) -> Chunk:
    if isinstance(part, Image):
        return ImageChunk(part, expected_tokens=length)
    if isinstance(part, Audio):
        return AudioChunk(part, expected_tokens=length)
    assert isinstance(part, Video)
    return VideoChunk(part, expected_tokens=length)
