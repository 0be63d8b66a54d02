"""What training and sampling clients share."""

from collections.abc import Mapping
from typing import Any, Self

from plait.client.futures import Ready
from plait.client.inputs import check_expected, input_from, part_of, piece_of
from plait.errors import ConfigError
from plait.modalities import Part
from plait.stream import Document, Message, Sample, render
from plait.trainer.build import Built
from plait.trainer.engine.controller import Engine
from plait.trainer.engine.inputs import document_from
from plait.types import ModelInput, TensorData


class Client(Ready):
    """What training and sampling clients share: rendering, and inputs to documents."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def _built(self) -> Built:
        return self._engine.built

    @property
    def _vocabulary(self) -> int:
        return self._built.model.output_weight.shape[0]

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, with the template that renders messages."""
        return self._built.tokenizer

    def prompt(self, *content: Part | Message | str) -> ModelInput:
        """The input that asks for an assistant's answer to a user's parts, or to messages."""
        messages = tuple(part for part in content if isinstance(part, Message))
        parts = tuple(part_of(part) for part in content if not isinstance(part, Message))
        if messages and parts:
            raise ConfigError("a prompt is made of messages or of one user's parts, not of both")
        sample = Sample(messages=messages or (Message("user", parts),))
        document = render(sample, self._built.tokenizer, self._built.layout, for_generation=True)
        return input_from(document)

    def _document(self, model_input: ModelInput, inputs: Mapping[str, TensorData]) -> Document:
        targets, weights = inputs.get("target_tokens"), inputs.get("weights")
        length_known = [1.0] * len(targets.data) if targets is not None else None
        document = document_from(
            [piece_of(chunk) for chunk in model_input.chunks],
            self._built.layout,
            self._encode,
            None if targets is None else targets.tolist(),
            length_known if weights is None else weights.tolist(),
            vocabulary=self._vocabulary,
        )
        check_expected(model_input, document, self._built.limits)
        return document

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._built.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def close(self) -> None:
        """Finish what is queued and release the engine, as the end of a `with` block does.

        A client that is dropped instead releases what it holds as well, without waiting.
        """
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
