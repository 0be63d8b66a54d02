"""Chat templates, read as pieces: which text stands where, and which of it is learned.

Labels come from the template's own assistant mask where it has one (`{% generation %}`), else
from rendering prefixes of the conversation, each checked to be a true prefix of the whole.
A template for which neither holds is refused.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from plait.errors import RenderError
from plait.modalities import MediaPart, Text
from plait.stream.samples import Message, Sample

_HAS_MASK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text with its loss weight, or a media part. `ends_turn` closes an answer."""

    text: str = ""
    part: MediaPart | None = None
    weight: float = 0.0
    ends_turn: bool = False


@dataclass(frozen=True, slots=True)
class _Learned:
    """Characters [start, stop) of the written conversation that an assistant turn says."""

    start: int
    stop: int
    weight: float
    masked: bool


def written_pieces(sample: Sample, tokenizer: Any, for_generation: bool) -> Iterator[Piece]:
    """The sample as its template writes it, cut at media and at the borders of what is learned."""
    if not sample.messages:
        yield from _bare_pieces(sample, tokenizer, for_generation)
        return
    writer = _Writer(sample, tokenizer)
    whole = writer.write(sample.messages, prompt=for_generation)
    start = 0
    # A prompt is cut at earlier answers too: the same text must become the same tokens.
    for span in writer.answers(whole) if for_generation else writer.learned(whole):
        yield from writer.split(whole[start : span.start], 0.0)
        pieces = list(writer.split(whole[span.start : span.stop], span.weight))
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1 and piece.part is None and not span.masked
            yield Piece(piece.text, piece.part, piece.weight, ends_turn=last)
        start = span.stop
    yield from writer.split(whole[start:], 0.0)


def _bare_pieces(sample: Sample, tokenizer: Any, for_generation: bool) -> Iterator[Piece]:
    """Parts without roles: all text is learned, and the row ends with the end token."""
    for part in sample.parts:
        if isinstance(part, Text):
            yield Piece(part.text, weight=1.0)
        else:
            yield Piece(part=part)
    if not for_generation and tokenizer.eos_token:
        yield Piece(tokenizer.eos_token, weight=1.0)


def _template_of(tokenizer: Any) -> str:
    """The template that a conversation without tools is written with, "" where there is none."""
    if not tokenizer.chat_template:
        return ""
    template: str = tokenizer.get_chat_template()
    return template


class _Writer:
    """Writes prefixes of one conversation, with a mark of its own for each media part."""

    def __init__(self, sample: Sample, tokenizer: Any) -> None:
        self.sample, self.tokenizer = sample, tokenizer
        self.template = _template_of(tokenizer)
        if not self.template:
            raise RenderError(
                "messages need a chat template and this tokenizer has none; set `template` in the "
                "model's configuration",
                sample.origin,
            )
        texts = "".join(
            part.text for m in sample.messages for part in m.parts if isinstance(part, Text)
        )
        # A mark made from the texts cannot stand in them, whoever wrote them.
        self.mark = f"\ue000{hashlib.sha256(texts.encode()).hexdigest()[:16]}:"
        self.media = list(sample.media())
        self.messages = self._as_dicts()

    def _as_dicts(self) -> list[dict[str, Any]]:
        number, written = 0, []
        for message in self.sample.messages:
            content = ""
            for part in message.parts:
                if isinstance(part, Text):
                    content += part.text
                else:
                    content += f"{self.mark}{number}\ue001"
                    number += 1
            entry: dict[str, Any] = {"role": message.role, "content": content}
            if message.tool_calls:
                entry["tool_calls"] = list(message.tool_calls)
            written.append(entry)
        return written

    def write(self, messages: tuple[Message, ...], prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                self.messages[: len(messages)], tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template may raise anything; say which sample it refused
            raise RenderError(
                f"the chat template refuses this conversation: {error}; change its roles or "
                "their order",
                self.sample.origin,
            ) from error
        return text

    def learned(self, whole: str) -> list[_Learned]:
        """The characters that assistant turns say, in order."""
        masked = self._masked_spans() if _HAS_MASK.search(self.template) else None
        found = []
        for number, message in enumerate(self.sample.messages):
            if message.role != "assistant":
                continue
            start, stop = self._turn(number, whole)
            if masked is None:
                found.append(_Learned(start, stop, message.weight, masked=False))
                continue
            inside = [(a, b) for a, b in masked if start <= a and b <= stop]
            found.append(_Learned(start, inside[0][0] if inside else stop, 0.0, masked=True))
            found += [_Learned(a, b, message.weight, masked=True) for a, b in inside]
        return [span for span in found if span.stop > span.start]

    def answers(self, whole: str) -> list[_Learned]:
        """As `learned`, with weight 0; a prompt that cannot be labelled is not cut."""
        try:
            return [replace(span, weight=0.0) for span in self.learned(whole)]
        except RenderError:
            return []

    def _turn(self, number: int, whole: str) -> tuple[int, int]:
        """Where turn `number` is said: after its prompt, to the end of the prefix it closes."""
        messages = self.sample.messages
        prompt = self.write(messages[:number], prompt=True)
        upto = self.write(messages[: number + 1], prompt=False)
        if not upto.startswith(prompt) or not whole.startswith(upto):
            raise RenderError(
                "this chat template cannot be labelled: the conversation up to assistant turn "
                f"{number} is not a prefix of the whole; use a template with "
                "{% generation %} marks or one that writes earlier turns unchanged",
                self.sample.origin,
            )
        return len(prompt), len(upto)

    def _masked_spans(self) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        special: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        render: Any = render_jinja_template  # its annotations name fewer keywords than it takes
        _, spans = render(
            conversations=[self.messages],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **special,
        )
        return [(int(start), int(stop)) for start, stop in spans[0]]

    def split(self, text: str, weight: float) -> Iterator[Piece]:
        """Text and media in order; marks become the parts they stand for."""
        pattern = re.escape(self.mark) + "([0-9]+)\ue001"
        for number, piece in enumerate(re.split(pattern, text)):
            if number % 2:
                yield Piece(part=self.media[int(piece)])
            elif piece:
                yield Piece(piece, weight=weight)
