"""From a picture, its text and its class to a sample; shared by the folder and CSV dialects."""

from collections.abc import Iterable
from dataclasses import dataclass
from string import Formatter

from plait.datasets.records.base import PICTURE_MARK, interleave
from plait.errors import ConfigError, DataError, Origin
from plait.modalities import Image, Text
from plait.stream import Message, Sample


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
    """What is learned, of {text} and {class}: "{class}: {text}". A picture without a class is
    learned as {text} alone."""

    prompt: str = PICTURE_MARK
    """The user's turn; <image> in it is where the picture stands."""

    def __post_init__(self) -> None:
        if self.line is not None and self.line < 1:
            raise ConfigError(f"captions.line counts from 1; it is {self.line}")
        if self.prompt.count(PICTURE_MARK) != 1:
            raise ConfigError(
                f"captions.prompt must hold {PICTURE_MARK} once; it is {self.prompt!r}"
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
                "picture"
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

    def sample(self, picture: Image, text: str, label: str, name: str, origin: Origin) -> Sample:
        """User: the prompt with the picture; assistant: the caption.

        Args:
            name: The sample's id: its path relative to the dataset.
        """
        try:
            answer = Text(self.caption(text, label))
        except DataError as error:
            raise error.at(origin) from None
        asked = interleave(self.prompt, [picture])
        messages = (Message("user", asked), Message("assistant", (answer,)))
        return Sample(messages=messages, id=name, origin=origin, label=label)


def first_folder(relative: str) -> str:
    """The class that a relative path, with / between its parts, says; empty for a bare name."""
    folder, slash, _ = relative.partition("/")
    return folder if slash else ""
