"""What training and sampling clients share."""

from typing import Any, Self

from plait.client.futures import AsyncNames, Ready
from plait.errors import ConfigError
from plait.modalities import Part
from plait.primitives.inputs import input_from
from plait.stream import Message, Sample, render
from plait.stream.samples import as_part
from plait.trainer.build import Built
from plait.trainer.engine.controller import Engine
from plait.types import ModelInput


class Client(AsyncNames, Ready):
    """What training and sampling clients share: rendering, and inputs to documents."""

    def __init__(self, engine: Engine, built: Built) -> None:
        self._engine, self._built = engine, built

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

    def close(self) -> None:
        """Give up what only this client uses, as the end of a `with` block does.

        A client that is dropped instead releases what it holds as well.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
