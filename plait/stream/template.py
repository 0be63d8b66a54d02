"""Chat templates, read as pieces: which text stands where, and which of it is learned.

Labels come from the template's own assistant mask where it has one (`{% generation %}`), else
from rendering prefixes of the conversation, each checked to be a true prefix of the whole.
A template for which neither holds is refused, and so is one that leaves out a turn or a picture.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
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
    if sample.parts:
        raise RenderError(
            "a sample is messages or bare parts; this one has both, and its parts would not be "
            "read; put them into a message",
            sample.origin,
        )
    writer = _Writer(sample, tokenizer)
    whole = writer.write(sample.messages, prompt=for_generation)
    writer.check_turns()
    writer.check_media(whole)
    writer.check_calls()
    start = 0
    for span in writer.answers(whole, for_generation):
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


def _rendered(
    template: str,
    messages: list[dict[str, Any]],
    special: dict[str, str],
    prompt: bool,
    marked: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as transformers writes it, and where `{% generation %}` marks stand in it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # its annotations name fewer keywords than it takes
    texts, spans = render(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=prompt,
        **special,
    )
    return texts[0], [(int(start), int(stop)) for start, stop in spans[0]] if marked else []


@lru_cache(maxsize=1024)
def _times_written(
    template: str, roles: tuple[str, ...], special: tuple[tuple[str, str], ...]
) -> tuple[int, ...] | None:
    """How often a template writes each turn of a conversation; None where it refuses the roles."""
    marks = [f"plaitturn{number:06d}" for number in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text, _ = _rendered(template, messages, dict(special), prompt=False)
    except Exception:  # the rendering of the sample itself says why
        return None
    return tuple(text.count(mark) for mark in marks)


def _marked_call(message: dict[str, Any], number: int) -> tuple[dict[str, Any], list[str]]:
    """The message with marks in one of its tool calls, and the marks."""
    calls = list(message["tool_calls"])
    function = dict(calls[number].get("function", {}))
    marks = [f"plaitcall{number:06d}"]
    function["name"] = marks[0]
    if function.get("arguments"):
        marks.append(f"plaitvalue{number:06d}")
        held = isinstance(function["arguments"], str)
        function["arguments"] = marks[1] if held else {"argument": marks[1]}
    calls[number] = {**calls[number], "function": function}
    return {**message, "tool_calls": calls}, marks


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
        self.pattern = re.escape(self.mark) + "([0-9]+)\ue001"
        self.media = list(sample.media())
        special = tokenizer.special_tokens_map.items()
        self.special = {name: text for name, text in special if isinstance(text, str)}
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
        if not messages:
            return self._empty_prompt()
        return self._applied(self.messages[: len(messages)], prompt)

    def _applied(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template may raise anything; say which sample it refused
            raise RenderError(
                f"the chat template refuses this conversation: {error}; change its roles or "
                "their order",
                self.sample.origin,
            ) from error
        return text

    def _empty_prompt(self) -> str:
        """The prompt of an answer that nothing precedes; transformers' own method refuses it."""
        try:
            return _rendered(self.template, [], self.special, prompt=True)[0]
        except Exception as error:
            raise RenderError(
                "a conversation may begin with an assistant turn only where the chat template can "
                f"write a prompt without messages; this one cannot: {error}; begin with a user "
                "turn, or set the assistant turn's weight to 0",
                self.sample.origin,
            ) from error

    def check_turns(self) -> None:
        """Refuse a template that leaves out a role: what it drops would be learned without."""
        roles = tuple(message.role for message in self.sample.messages)
        times = _times_written(self.template, roles, tuple(sorted(self.special.items())))
        for number, found in enumerate(times or ()):
            if found != 1:
                fault = f"writes {found} times" if found else "does not write"
                raise RenderError(
                    f"every turn must be written once: the chat template {fault} turn {number} "
                    f"({roles[number]!r}); remove the turn, give it another role, or use a "
                    "template that writes it",
                    self.sample.origin,
                )

    def check_calls(self) -> None:
        """Refuse a template that leaves out a tool call, or what it is called with.

        Each call is written with marks for its name and arguments, which must then stand there.
        """
        for turn, message in enumerate(self.messages):
            for number in range(len(message.get("tool_calls", ()))):
                marked, marks = _marked_call(message, number)
                conversation = [*self.messages[:turn], marked, *self.messages[turn + 1 :]]
                text = self._applied(conversation, prompt=False)
                if not all(mark in text for mark in marks):
                    raise RenderError(
                        "every tool call must be written with its arguments: the chat template "
                        f"does not write call {number} of turn {turn}; write the call into the "
                        "turn's content, or use a template for tools",
                        self.sample.origin,
                    )

    def check_media(self, whole: str) -> None:
        """Refuse a conversation whose pictures are not all written, once each and in order."""
        written = [int(number) for number in re.findall(self.pattern, whole)]
        expected = range(len(self.media))
        if written == list(expected):
            return
        wrong = next((number for number in expected if written.count(number) != 1), None)
        if wrong is None:
            wrong = next(number for number in expected if written[number] != number)
            fault = "writes in another place"
        else:
            times = written.count(wrong)
            fault = f"writes {times} times" if times else "does not write"
        turns = [
            f"turn {number} ({message.role!r})"
            for number, message in enumerate(self.sample.messages)
            for part in message.parts
            if isinstance(part, MediaPart)
        ]
        raise RenderError(
            f"every medium must be written once and in order: the chat template {fault} "
            f"{self.media[wrong].medium} {wrong + 1} of {len(self.media)}, in {turns[wrong]}; move "
            "it to a user turn, or use a template that writes that turn whole",
            self.sample.origin,
        )

    def answers(self, whole: str, for_generation: bool) -> list[_Learned]:
        """The characters that assistant turns say, in order.

        A prompt is cut there too, with weight 0: the same text must become the same tokens.
        """
        marked = _HAS_MASK.search(self.template) is not None
        found = (self._marked if marked else self._by_prefixes)(whole, for_generation)
        return [span for span in found if span.stop > span.start]

    def _marked(self, whole: str, for_generation: bool) -> list[_Learned]:
        """Answers by the template's own marks: the first belong to the first turn, and so on."""
        _, spans = _rendered(
            self.template, self.messages, self.special, prompt=for_generation, marked=True
        )
        turns = [n for n, message in enumerate(self.sample.messages) if message.role == "assistant"]
        if len(spans) != len(turns):
            if for_generation:
                return []
            raise RenderError(
                "a template must set one pair of {% generation %} marks for each assistant turn: "
                f"this conversation has {len(turns)} such turns and the template marks "
                f"{len(spans)}; put one pair around all that a turn says",
                self.sample.origin,
            )
        found: list[_Learned] = []
        for number, (start, stop) in zip(turns, spans, strict=True):
            weight = 0.0 if for_generation else self.sample.messages[number].weight
            said = self._said_from(number, whole, start)
            if said > stop or (found and said < found[-1].stop):
                said = start
            # Text between the prompt and the marks is cut off, so that prompts end at a cut.
            found.append(_Learned(min(said, start), start, 0.0, masked=True))
            found.append(_Learned(max(said, start), stop, weight, masked=True))
        return found

    def _said_from(self, number: int, whole: str, start: int) -> int:
        """Where the answer of a turn marked from `start` begins: after its generation prompt.

        Marks may enclose the header that the prompt ends with, which is not the model's to say.
        """
        before = self.sample.messages[:number]
        try:
            prompt = self.write(before, prompt=True)
            if whole.startswith(prompt):
                return len(prompt)
            # Earlier turns are written otherwise than alone: only the header can be known again.
            alone = self.write(before, prompt=False) if before else ""
        except RenderError:
            return start
        header = prompt[len(alone) :] if prompt.startswith(alone) else ""
        return start + len(header) if whole.startswith(header, start) else start

    def _by_prefixes(self, whole: str, for_generation: bool) -> list[_Learned]:
        """Answers by rendering the conversation up to each; what is not learned may be unknown."""
        found = []
        for number, message in enumerate(self.sample.messages):
            if message.role != "assistant":
                continue
            weight = 0.0 if for_generation else message.weight
            try:
                start, stop = self._turn(number, whole)
            except RenderError:
                if weight:
                    raise
                continue
            found.append(_Learned(start, stop, weight, masked=False))
        return found

    def _turn(self, number: int, whole: str) -> tuple[int, int]:
        """Where turn `number` is said: after its prompt, to the end of the prefix it closes."""
        messages = self.sample.messages
        prompt = self.write(messages[:number], prompt=True)
        upto = self.write(messages[: number + 1], prompt=False)
        if not upto.startswith(prompt) or not whole.startswith(upto):
            raise RenderError(
                "this chat template cannot be labelled: the conversation up to assistant turn "
                f"{number} is not a prefix of the whole; use a template with "
                "{% generation %} marks or one that writes earlier turns unchanged, or set the "
                "turn's weight to 0",
                self.sample.origin,
            )
        return len(prompt), len(upto)

    def split(self, text: str, weight: float) -> Iterator[Piece]:
        """Text and media in order; marks become the parts they stand for."""
        for number, piece in enumerate(re.split(self.pattern, text)):
            if number % 2:
                yield Piece(part=self.media[int(piece)])
            elif piece:
                yield Piece(piece, weight=weight)
