"""Data and prompts to the documents that the engine computes."""

from collections.abc import Iterator, Sequence

from plait.errors import ConfigError, DataError
from plait.primitives.inputs import check_data, check_expected, piece_of
from plait.primitives.objectives import evened
from plait.stream import Document
from plait.trainer.build import Built
from plait.trainer.engine.inputs import document_from
from plait.trainer.model import LEARN, Objective
from plait.types import Datum, ModelInput


def vocabulary_of(built: Built) -> int:
    """How many tokens the model scores."""
    return built.model.output_weight.shape[0]


def documents_of(data: Sequence[Datum], built: Built, objective: Objective) -> Iterator[Document]:
    """The documents of a call's data, in their order.

    Raises:
        DataError: one cannot be used; its number is in the message.
    """
    for number, datum in enumerate(evened(check_data(data), objective.loss)):
        group = number // 2 if objective.loss.paired else None
        try:
            yield document_of(datum, built, objective, group)
        except DataError as error:
            raise type(error)(f"datum {number}: {error.message}", error.origin) from error


def prompt_of(prompt: ModelInput, built: Built) -> Document:
    """The document of a prompt, of which nothing is learned."""
    if not isinstance(prompt, ModelInput):
        raise ConfigError(
            f"a prompt is a ModelInput; it was given as {type(prompt).__name__}: "
            "client.prompt(...) makes one of texts and media, ModelInput.from_ints of token ids"
        )
    return document_of(Datum(prompt), built)


def document_of(
    datum: Datum, built: Built, objective: Objective = LEARN, group: int | None = None
) -> Document:
    """
    Raises:
        DataError: a token, a length, or what a chunk says of its media is wrong.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = built.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    inputs = {name: value.to_numpy() for name, value in datum.loss_fn_inputs.items()}
    document = document_from(
        [piece_of(chunk) for chunk in datum.model_input.chunks],
        built.layout,
        encode,
        inputs or None,
        objective,
        vocabulary=vocabulary_of(built),
        group=group,
    )
    check_expected(datum.model_input, document, built.limits)
    return document
