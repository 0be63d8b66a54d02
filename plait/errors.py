"""Every error that Plait raises on purpose, in one tree.

    PlaitError
    ├── ConfigError           ValueError         a setting that cannot be used
    │   └── UnknownNameError  LookupError        a name nobody registered; the nearest is offered
    ├── DataError             ValueError         a row that cannot be used: dataset, row, file
    │   ├── MediaError                           a picture, sound or film that cannot be decoded
    │   │   └── DecodeTimeoutError               one whose decoding took too long and was ended
    │   ├── RenderError                          a sample that cannot become labelled positions
    │   └── FailureBudgetError                   too many broken rows
    ├── CheckpointError       RuntimeError       a checkpoint that cannot be written or read
    │   └── DamagedCheckpointError               one whose files are not what was saved
    ├── FetchError            RuntimeError       a download or conversion that did not succeed
    ├── ModelError            RuntimeError       a model that does not behave as it must
    │   └── RankDiedError                        a process of several that ended
    └── Interrupted           RuntimeError       the user stopped a run; what is saved is said

A message gives the rule, the value and the remedy. `exit_code` is what the command line returns:
2 for bad input, 1 for a failure.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar


def printable(name: str) -> str:
    """A file's name as text that can be written anywhere.

    Bytes that are not UTF-8, which file systems allow and Python keeps as half surrogate pairs,
    are spelt out: `caf\\xe9.png`.
    """
    if name.isascii():  # nearly all are, and this is asked of every row
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair that no file system wrote
        return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sample came from, for error messages and the ledger: names are kept printable."""

    dataset: str = ""
    row: int | None = None
    file: str = ""

    def __post_init__(self) -> None:
        if not (self.dataset.isascii() and self.file.isascii()):
            object.__setattr__(self, "dataset", printable(self.dataset))
            object.__setattr__(self, "file", printable(self.file))

    def __str__(self) -> str:
        facts = [f"dataset {self.dataset}"] if self.dataset else []
        if self.row is not None:
            facts.append(f"row {self.row}")
        if self.file:
            facts.append(f"file {self.file}")
        return ", ".join(facts)


class PlaitError(Exception):
    """The root: catch it to catch everything that Plait raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(PlaitError, ValueError):
    """A setting that cannot be used."""

    exit_code = 2


class UnknownNameError(ConfigError, LookupError):
    """A name that nobody registered.

    Args:
        kind: What the name should have named ("encoder", "key in train").
        name: What was given, which need not be a text.
        known: The names that would have been accepted; the nearest one is offered.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        near = get_close_matches(str(name), self.known, n=1, cutoff=0.5)
        known_ones = f"known: {', '.join(self.known)}" if self.known else "there are none"
        offer = f"did you mean {near[0]!r}?" if near else known_ones
        super().__init__(f"unknown {kind} {name!r}; {offer}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, self.name, self.known)


class DataError(PlaitError, ValueError):
    """A row that cannot be used; says which.

    Args:
        message: Rule, value and remedy.
        origin: The dataset, row and file; appended to the message where known.
    """

    exit_code = 2

    def __init__(self, message: str, origin: Origin | None = None) -> None:
        self.message, self.origin = message, origin or Origin()
        where = str(self.origin)
        super().__init__(f"{message} ({where})" if where else message)

    def at(self, origin: Origin) -> "DataError":
        """The same error with its place, keeping the file that the first report already named."""
        file = self.origin.file or origin.file
        return type(self)(self.message, Origin(origin.dataset, origin.row, file))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.origin)


class MediaError(DataError):
    """A picture, sound or film that cannot be read or decoded, or is over a limit."""


class DecodeTimeoutError(MediaError):
    """A picture, sound or film whose decoding took longer than it may, and was ended."""


class RenderError(DataError):
    """A sample that cannot become labelled stream positions."""


class FailureBudgetError(DataError):
    """More rows broke than the policy allows."""


class CheckpointError(PlaitError, RuntimeError):
    """A checkpoint that cannot be written, read or used here."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are missing or not what was saved; an older one may be whole."""


class FetchError(PlaitError, RuntimeError):
    """A download, checksum or conversion that did not succeed."""


class ModelError(PlaitError, RuntimeError):
    """A model that does not behave as training needs it to."""


class RankDiedError(ModelError):
    """One of several processes that compute together has ended, or does not answer."""


class Interrupted(PlaitError, RuntimeError):  # noqa: N818  (the field's word for Ctrl-C)
    """The user stopped a run; the message says what was saved and how to resume."""

    exit_code = 130
