"""What every medium other than text offers the rooms above it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from plait.modalities.limits import Limits
from plait.modalities.text import Text


class MediaHeader:
    """Facts that a file's first bytes give: enough to plan its positions, nothing decoded.

    Each medium adds its own: a picture its width and height, a sound its seconds.
    """

    __slots__ = ()

    format: str
    """The container's name ("PNG"), or "array" for pixels that are already in memory."""

    bytes: int
    """The size of the file, or of the array."""


class MediaPart(ABC):
    """One media item of a sample: where it lies, not its content.

    Parts are immutable and cheap, and every method may be called from several threads at once.
    A part that cannot be read raises `MediaError` with its `file`.
    """

    __slots__ = ()

    medium: ClassVar[str]
    """The name by which encoders say what they read: "image", "audio" or "video"."""

    @property
    @abstractmethod
    def file(self) -> str:
        """The path, or a description of what is in memory; for messages."""

    @property
    def in_memory(self) -> bool:
        """Whether it is an array already, so that no decoder can be stuck in it."""
        return False

    @abstractmethod
    def header(self, limits: Limits = ...) -> MediaHeader:
        """Read the header alone, and refuse what is over the limits."""

    @abstractmethod
    def load(self, limits: Limits, wanted: Any = None) -> Any:
        """What decoding needs of the file: the half that may run in a process of its own.

        Args:
            wanted: What an encoder asks for, of this medium's own type; None is the whole.
        """

    def finish(self, loaded: Any, wanted: Any = None) -> Any:  # noqa: ARG002
        """The canonical form, made in the caller's process of what `load` brought."""
        return loaded

    def decode(self, limits: Limits = Limits(), wanted: Any = None) -> Any:  # noqa: B008
        """The canonical form of this medium: `load`, then `finish`."""
        return self.finish(self.load(limits, wanted), wanted)

    def soundtrack(self, header: MediaHeader) -> "tuple[MediaPart | None, bool]":  # noqa: ARG002
        """The sound that is read beside this part, where it has one and the sample asks for it.

        The second value says whether it stands second by second between the part's own positions.
        """
        return None, False

    @property
    def cut(self) -> str:
        """What besides the file decides the content: the stretch that is read; "" for the whole."""
        return ""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256, in hex, of the file's bytes: the same file has the same digest anywhere."""


Part = Text | MediaPart
