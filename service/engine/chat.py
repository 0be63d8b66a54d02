"""Answers to conversations, as text: rendered, sampled, and told as they grow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from plait.errors import DataError
from plait.modalities import MediaPart, Text
from plait.primitives.documents import prompt_of
from plait.service.wire.chunks import Uploaded, decoded, media_part
from plait.stream import Document, Message, Sample, render
from plait.trainer.build import Built
from plait.trainer.engine import commands
from plait.types import ModelInput

Tell = Callable[[int, str], None]
"""(sequence, more of its text)"""

ROLES = ("system", "developer", "user", "assistant", "tool")


def rendered(given: Any, built: Built, uploaded: Uploaded) -> Document:
    """A conversation, or a text as it is, ready to be continued.

    Raises:
        DataError: a message has another form, or the model cannot read one of its parts.
    """
    if isinstance(given, str):
        check_texts([given], built)
        ids = built.tokenizer(given).input_ids
        return prompt_of(ModelInput.from_ints(ids), built)
    messages = tuple(_message(one, uploaded) for one in given)
    sample = Sample(messages=messages)
    check_texts(texts_of(sample), built)
    return render(sample, built.tokenizer, built.layout, for_generation=True)


def sample_of(given: Any, uploaded: Uploaded) -> Sample:
    """What a remote client renders: messages with weights, or bare parts.

    Raises:
        DataError: a message has another form.
    """
    messages = tuple(
        replace(_message(one, uploaded), weight=float(one.get("weight", 1.0)))
        for one in given.get("messages", ())
    )
    parts = tuple(_part(one, uploaded) for one in given.get("parts", ()))
    return Sample(messages=messages, parts=parts)


def texts_of(sample: Sample) -> list[str]:
    return [part.text for part in sample.every_part() if isinstance(part, Text)]


def check_texts(texts: Sequence[str], built: Built) -> None:
    """Whether texts could fit at all: to find out by their tokens takes long where they do not.

    Raises:
        DataError: they could not.
    """
    context, length = built.base.backbone.context, sum(map(len, texts))
    if context is None or length <= context:
        return
    if length > context * _longest_token(built.tokenizer):
        raise DataError(
            f"texts of {length} characters cannot be the {context} tokens that this model reads "
            "at most: send less"
        )


@lru_cache(maxsize=16)
def _longest_token(tokenizer: Any) -> int:
    return max(map(len, tokenizer.get_vocab()))


def _message(given: Any, uploaded: Uploaded) -> Message:
    role = given.get("role")
    if role not in ROLES:
        raise DataError(f"a message's role is one of {', '.join(ROLES)}; it is {role!r}"[:200])
    role = "system" if role == "developer" else role
    return Message(role, tuple(_part(part, uploaded) for part in given["parts"]))


def _part(given: Any, uploaded: Uploaded) -> Text | MediaPart:
    if given["type"] == "text":
        return Text(given["text"])
    data = uploaded(given["sha256"]) if "sha256" in given else decoded(given["data"])
    return media_part(given["type"], data, given.get("options") or {})


@dataclass(slots=True, eq=False)
class Growing:
    """One answer's text while its tokens come; what may yet be cut off is held back.

    Args:
        stops: Texts that end it and are no part of it.
    """

    tokenizer: Any
    stops: Sequence[str] = ()
    tokens: list[int] = field(default_factory=list)
    told: str = ""
    grown: str = ""
    """The text of the tokens so far, decoded a few at a time."""

    before: int = 0
    after: int = 0
    """Tokens from `before` on are decoded again with each new one, of which those up to `after` are
    in `grown`: what a token adds depends on its neighbours, and all of them would take long."""

    def add(self, token: int) -> str:
        """What can be told of its text now and could not before."""
        self.tokens.append(token)
        known = self._decoded(self.tokens[self.before : self.after])
        both = self._decoded(self.tokens[self.before :])
        if both.endswith("\ufffd"):  # the first bytes of a character
            return ""
        self.grown += both[len(known) :]
        self.before, self.after = self.after, len(self.tokens)
        text = self._cut(self.grown)
        held = max((len(stop) for stop in self.stops), default=1) - 1
        return self._tell(text[: len(text) - held] if held else text)

    def end(self) -> str:
        """The rest."""
        return self._tell(self.text())

    def text(self) -> str:
        """All of it, up to the first stop."""
        return self._cut(self._decoded(self.tokens))

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _cut(self, text: str) -> str:
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def _tell(self, text: str) -> str:
        more = text[len(self.told) :] if len(text) > len(self.told) else ""
        self.told += more
        return more


def answered(
    sampled: commands.Sampled, built: Built, stops: Sequence[str], prompt_tokens: int
) -> dict[str, Any]:
    """All answers, with the logprob of each token."""
    choices = []
    for row in sampled.samples:
        growing = Growing(built.tokenizer, stops, list(row.tokens))
        choices.append(
            {
                "text": growing.text(),
                "finish": "stop" if row.stopped else "length",
                "tokens": [
                    {"token": built.tokenizer.decode([token]), "logprob": logprob}
                    for token, logprob in zip(row.tokens, row.logprobs, strict=True)
                ],
            }
        )
    return {
        "choices": choices,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sum(len(row.tokens) for row in sampled.samples),
    }
