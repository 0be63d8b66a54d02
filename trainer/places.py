"""Names of checkpoints in a store: `tinker://<run>/<kind>/<name>`."""

from dataclasses import dataclass
from pathlib import Path

from plait.errors import ConfigError

SCHEME = "tinker://"
KINDS = ("weights", "sampler_weights", "external_weights")
"""To resume from; weights alone, to sample from, or to be taken elsewhere."""

LONGEST = 200
"""Bytes of a name: file systems take 255, and a name that is set aside gets some more."""


def fits(word: str) -> bool:
    """Whether a run or a checkpoint may be called so."""
    short = 0 < len(word.encode()) <= LONGEST
    return short and "/" not in word and not word.startswith(".") and word.isprintable()


@dataclass(frozen=True, slots=True)
class Place:
    """Which checkpoint of a store."""

    run: str
    kind: str
    name: str

    def __post_init__(self) -> None:
        for word in (self.run, self.name):
            if not fits(word):
                raise ConfigError(
                    f"a checkpoint's name has 1 to {LONGEST} bytes, no / and no leading dot; got "
                    f"{word!r}"
                )

    @classmethod
    def of(cls, path: str) -> "Place":
        """
        Raises:
            ConfigError: the path has another form.
        """
        parts = path.removeprefix(SCHEME).split("/")
        odd = len(parts) != 3 or parts[1] not in KINDS or not all(map(fits, parts))
        if odd or not path.startswith(SCHEME):
            forms = " or ".join(f"{SCHEME}<run>/{kind}/<name>" for kind in KINDS)
            raise ConfigError(f"a path has the form {forms}; got {path}")
        return cls(*parts)

    @property
    def path(self) -> str:
        return f"{SCHEME}{self.run}/{self.kind}/{self.name}"

    def under(self, root: Path) -> Path:
        """The folder of the checkpoint."""
        return root / self.run / self.kind / self.name
