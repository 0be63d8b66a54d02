"""What training and sampling clients share."""

from typing import Any, Self

from plait.client.futures import AsyncNames, Ready
from plait.client.inputs import check_expected, input_from, piece_of
from plait.errors import ConfigError
from plait.modalities import Part
from plait.stream import Document, Message, Sample, render
from plait.stream.samples import as_part
from plait.trainer.build import Built
from plait.trainer.engine.controller import Engine
from plait.trainer.engine.inputs import document_from
from plait.trainer.model import LEARN, Objective
from plait.types import Datum, ModelInput


class Client(AsyncNames, Ready):
    """What training and sampling clients share: rendering, and inputs to documents."""

    def __init__(self, engine: Engine, built: Built) -> None:
        self._engine, self._built = engine, built

    @property
    def _vocabulary(self) -> int:
        return self._built.model.output_weight.shape[0]

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, with the template that renders messages."""
        return self._built.tokenizer

    def prompt(self, *content: Part | Message | str) -> ModelInput:
        """The input that asks for an assistant's answer to a user's parts, or to messages."""
        messages = tuple(part for part in content if isinstance(part, Message))
        parts = tuple(as_part(part) for part in content if not isinstance(part, Message))
        if messages and parts:
            raise ConfigError("a prompt is made of messages or of one user's parts, not of both")
        sample = Sample(messages=messages or (Message("user", parts),))
        document = render(sample, self._built.tokenizer, self._built.layout, for_generation=True)
        return input_from(document)

    def _document(
        self, datum: Datum, objective: Objective = LEARN, group: int | None = None
    ) -> Document:
        inputs = {name: value.to_numpy() for name, value in datum.loss_fn_inputs.items()}
        document = document_from(
            [piece_of(chunk) for chunk in datum.model_input.chunks],
            self._built.layout,
            self._encode,
            inputs or None,
            objective,
            vocabulary=self._vocabulary,
            group=group,
        )
        check_expected(datum.model_input, document, self._built.limits)
        return document

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._built.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def close(self) -> None:
        """Give up what only this client uses, as the end of a `with` block does.

        A client that is dropped instead releases what it holds as well.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
