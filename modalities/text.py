"""Text: the one medium that needs no encoder."""

from dataclasses import dataclass

from plait.errors import DataError


@dataclass(frozen=True, slots=True)
class Text:
    """A strand of text, kept exactly as given.

    Raises:
        DataError: it is not a string, or holds half of a surrogate pair, which no tokenizer reads.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise DataError(f"Text must hold a string; it was given {type(self.text).__name__}")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text must be valid Unicode; character {error.start} is a lone surrogate "
                f"({self.text[error.start]!r}); write the whole character"
            ) from error
