"""What every medium other than text offers the rooms above it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from numpy.typing import NDArray

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
    """The name by which encoders say what they read: "image"."""

    @property
    @abstractmethod
    def file(self) -> str:
        """The path, or a description of what is in memory; for messages."""

    @abstractmethod
    def header(self, limits: Limits = ...) -> MediaHeader:
        """Read the header alone, and refuse what is over the limits."""

    @abstractmethod
    def decode(self, limits: Limits = ...) -> NDArray[Any]:
        """The canonical array of this medium."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256, in hex, of the file's bytes: the same file has the same digest anywhere."""


Part = Text | MediaPart
