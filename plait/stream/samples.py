"""What one row says: messages and their media, before a model's tokens are known."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plait.errors import DataError, Origin
from plait.modalities import MediaPart, Part, Text


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. A text is a part, and stands for a turn of that part alone.

    `weight` scales the loss of an assistant turn; 0 shows the turn without learning it. Turns of
    other roles never carry loss.
    """

    role: str
    parts: tuple[Part, ...]
    weight: float = 1.0
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        parts: Any = self.parts
        given = (parts,) if isinstance(parts, str | Part) else parts
        object.__setattr__(self, "parts", tuple(as_part(part) for part in given))


def as_part(content: Part | str) -> Part:
    """
    Raises:
        DataError: it is neither a part nor a text.
    """
    if isinstance(content, str):
        return Text(content)
    if not isinstance(content, Part):
        raise DataError(
            f"what is said is made of texts and media parts; {content!r} is neither: write it as "
            "Text, Image, Audio or Video"
        )
    return content


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row says: messages, or bare parts whose text is all learned.

    `view` picks one of the seeded augmentations of its pictures; 0 is the picture as it is.
    `label` is an optional class name, used only for evaluation and splits.
    """

    messages: tuple[Message, ...] = ()
    parts: tuple[Part, ...] = ()
    id: str = ""
    origin: Origin = field(default_factory=Origin)
    view: int = 0
    group: int | None = None
    label: str = ""

    def every_part(self) -> tuple[Part, ...]:
        """Texts and media, of all turns, in the order in which they are read."""
        return self.parts + tuple(part for message in self.messages for part in message.parts)

    def media(self) -> tuple[MediaPart, ...]:
        """The pictures, sounds and films in the order in which they are read."""
        return tuple(part for part in self.every_part() if isinstance(part, MediaPart))
