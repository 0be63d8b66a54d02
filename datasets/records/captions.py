"""From a file, its text and its class to a sample; shared by folders, tables and shards."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from string import Formatter

from plait.datasets.records.media import MARKS
from plait.errors import ConfigError, DataError, UnknownNameError
from plait.modalities import MediaPart, Part, Text
from plait.stream import Message

PICTURE_MARK = MARKS["image"]
_MARK = re.compile("|".join(MARKS.values()))


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """How a text becomes the answer to learn.

    Raises:
        ConfigError: a field cannot be used.
    """

    line: int | None = None
    """Which line of the text is the caption, from 1, where others are translations; None is the
    whole text."""

    strip_final_stop: bool = False
    """Remove one full stop from the end; an ellipsis stays."""

    lower_first: bool = False
    """Lower-case the first character."""

    template: str = "{text}"
    """What is learned, of {text} and {class}: "{class}: {text}". A file without a class is learned
    as {text} alone."""

    prompt: str = PICTURE_MARK
    """The user's turn; <image> in it, or <audio> or <video>, is where the row's file stands,
    whatever its medium."""

    media: tuple[str, ...] | None = None
    """Whose captions are learned, of image, audio and video; null is all. Files of other media in
    a folder are left out, and accounted for."""

    def __post_init__(self) -> None:
        for medium in self.media or ():
            if medium not in MARKS:
                raise UnknownNameError("medium in captions.media", medium, MARKS)
        if self.line is not None and self.line < 1:
            raise ConfigError(f"captions.line counts from 1; it is {self.line}")
        if len(_MARK.findall(self.prompt)) != 1:
            raise ConfigError(
                f"captions.prompt must hold {PICTURE_MARK} once (or <audio> or <video>); it is "
                f"{self.prompt!r}"
            )
        if "text" not in self.fields() or not self.fields() <= {"text", "class"}:
            raise ConfigError(
                "captions.template must hold {text}, may hold {class} and nothing else in braces; "
                f"it is {self.template!r}; write {{{{ and }}}} for braces"
            )

    def fields(self) -> set[str]:
        """The names in the template's braces; "!" stands for what a template cannot hold."""
        try:
            pieces = list(Formatter().parse(self.template))
        except ValueError:
            return {"!"}
        plain = all(not spec and not conversion for _, _, spec, conversion in pieces)
        return {name for _, name, _, _ in pieces if name is not None} | (set() if plain else {"!"})

    def caption(self, text: str, label: str) -> str:
        """The answer for a whole text and a class, which may be empty.

        Raises:
            DataError: the line is missing, or empty after stripping.
        """
        caption = self._chosen(text).strip()
        if self.strip_final_stop and caption.endswith(".") and not caption.endswith(".."):
            caption = caption[:-1].rstrip()
        if not caption:
            raise DataError(
                f"a caption must not be empty; {self._where()} is; write a caption or remove the "
                "row"
            )
        if self.lower_first:
            caption = caption[0].lower() + caption[1:]
        if "class" in self.fields() and not label:
            return caption
        return self.template.format_map({"text": caption, "class": label})

    def _chosen(self, text: str) -> str:
        """The line of the text that is the caption, or all of it.

        Only \\n and \\r\\n end a line: `str.splitlines` would cut at U+2028 and form feeds too.
        """
        text = text.replace("\r\n", "\n")
        if self.line is None:
            return text
        lines = text.removesuffix("\n").split("\n")
        if self.line > len(lines):
            raise DataError(
                f"a caption must have line {self.line}; this text has {len(lines)} lines; add it, "
                "or change captions.line"
            )
        return lines[self.line - 1]

    def _where(self) -> str:
        return "this text" if self.line is None else f"line {self.line}"

    def notes(self, texts: Iterable[str]) -> list[str]:
        """Says of how many texts only one line is used."""
        if self.line is None:
            return []
        longer = sum("\n" in text.strip() for text in texts)
        if not longer:
            return []
        note = f"{longer} captions have several lines, of which line {self.line} alone is learned"
        return [f"{note}; captions.line: null learns them whole"]

    def messages(self, part: MediaPart, text: str, label: str) -> tuple[Message, ...]:
        """User: the prompt with the file in it; assistant: the caption.

        Raises:
            DataError: there is no caption.
        """
        if self.media is not None and part.medium not in self.media:
            raise DataError(
                f"a caption must be of a medium that captions.media names, {', '.join(self.media)};"
                f" this is of {part.medium}; remove the row, or name its medium"
            )
        before, after = _MARK.split(self.prompt)
        asked: list[Part] = [part]
        if before:
            asked.insert(0, Text(before))
        if after:
            asked.append(Text(after))
        answer = Text(self.caption(text, label))
        return Message("user", tuple(asked)), Message("assistant", (answer,))


def first_folder(relative: str) -> str:
    """The class that a relative path, with / between its parts, says; empty for a bare name."""
    folder, slash, _ = relative.partition("/")
    return folder if slash else ""
