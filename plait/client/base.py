"""What training and sampling clients share."""

from typing import Any, Self

from plait.client.futures import AsyncNames, Ready
from plait.modalities import Part
from plait.primitives.inputs import input_from, question
from plait.stream import Message, render
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
        tokenizer, layout = self._built.tokenizer, self._built.layout
        return input_from(render(question(content), tokenizer, layout, for_generation=True))

    def close(self) -> None:
        """Give up what only this client uses, as the end of a `with` block does.

        A client that is dropped instead releases what it holds as well.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
