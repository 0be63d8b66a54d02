"""An instruction and its answer, a row: Alpaca, prompt and completion, questions on a picture.

{"instruction": "Translate to French.", "input": "a frog", "output": "une grenouille"}
{"prompt": "The capital of France is", "completion": " Paris."}
{"question": "What is it?", "answer": "A frog.", "image": "frog.png"}
["What is it?", "A frog.", 17]                        as easy-vqa has it: images/17.png
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from plait.datasets.records.dialects.base import COMMON, Dealer, Dialect, Draft
from plait.datasets.records.dialects.sharegpt import SINGLE
from plait.datasets.records.media import ENDINGS, MediaFinder
from plait.datasets.records.tables import BARE
from plait.datasets.records.values import listed, text_of, type_name
from plait.errors import DataError
from plait.modalities import Part, Text
from plait.stream import Message

ANSWERS = {
    "instruction": ("output", "response"),
    "prompt": ("completion", "response", "output"),
    "question": ("answer", "response"),
}
"""By what is asked, what the answer may be called."""


class Instructions(Dialect):
    """One question and answer a row; Alpaca's `input` follows the instruction on a line of its own.

    Media of a row that marks no place stand before what is asked.
    """

    name: ClassVar[str] = "instructions"
    keys: ClassVar[tuple[str, ...]] = (
        *ANSWERS, "output", "response", "completion", "answer", "input", "system", "history",
        "image_id", *SINGLE, *COMMON,
    )  # fmt: skip

    def fits(self, keys: frozenset[str]) -> bool:
        return BARE in keys or _asked(keys) is not None

    def draft(
        self,
        row: Mapping[str, Any],
        side: str,  # noqa: ARG002  (a row is one document)
        finder: MediaFinder,
    ) -> Draft:
        row = _bare(row[BARE]) if BARE in row else row
        held = _asked(frozenset(row))
        if held is None:
            raise DataError("a row must have an instruction, prompt or question, and its answer")
        if "image_id" in row and "image" not in row:
            row = {**row, "image": _numbered(finder, text_of(row, "image_id"))}
        dealer = Dealer.of_row(row, finder, **SINGLE)
        messages = [Message(role, dealer.parts(text)) for role, text in _before(row)]
        question = "\n".join(t for t in (text_of(row, held[0]), text_of(row, "input")) if t)
        asked: tuple[Part, ...] = dealer.parts(question)
        asked = (*dealer.unmarked(), *asked)
        answer = text_of(row, held[1])
        dealer.check()
        if not answer:
            raise DataError(f"a row's {held[1]} must not be empty; this one is; fill or remove it")
        messages += [Message("user", asked), Message("assistant", (Text(answer),))]
        return Draft(tuple(messages))


def _asked(keys: frozenset[str]) -> tuple[str, str] | None:
    """The keys of what is asked and of the answer."""
    for question, answers in ANSWERS.items():
        if question in keys:
            found = next((answer for answer in answers if answer in keys), None)
            if found is not None:
                return question, found
    return None


def _before(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The turns that come first: the system's, and earlier questions and answers."""
    turns = [("system", text_of(row, "system"))] if text_of(row, "system") else []
    for pair in listed(row, "history"):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(t, str) for t in pair)
        ):
            raise DataError("history must hold pairs of a question and its answer, both strings")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def _bare(values: list[Any]) -> dict[str, Any]:
    """[question, answer, number of a picture]."""
    if len(values) != 3 or not all(isinstance(value, str) for value in values[:2]):
        kinds = ", ".join(type_name(value) for value in values[:5])
        raise DataError(
            "a row that is a list must be a question, its answer and the number of a picture; it "
            f"is {kinds or 'empty'}; write an object"
        )
    return {"question": values[0], "answer": values[1], "image_id": values[2]}


def _numbered(finder: MediaFinder, number: str) -> str:
    """The picture of that number, in a folder `images` beside the table."""
    if "/" in number or "\\" in number:
        raise DataError(f"an image_id must be a number or a name; it is {number[:80]!r}")
    for ending in (".png", ".jpg", *sorted(ENDINGS["image"])):
        if (finder.folder / "images" / f"{number}{ending}").is_file():
            return f"images/{number}{ending}"
    return f"images/{number}.png"  # which is then missing, and said when it is read
