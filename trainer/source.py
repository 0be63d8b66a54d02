"""Weights by path, wherever they lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plait.errors import ConfigError
from plait.trainer.manifest import MANIFEST
from plait.trainer.places import Place
from plait.trainer.store import Store


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint of a store (`tinker://...`), a checkpoint's folder, or the folder of a
    `plait train` run, which stands for its best weights."""

    store: Store
    path: str

    @contextmanager
    def reading(self) -> Iterator[Path]:
        """The checkpoint's folder, which stays as it is inside the block.

        Raises:
            ConfigError: there is none.
        """
        if "://" in self.path:
            with self.store.reading(Place.of(self.path)) as folder:
                yield folder
        else:
            yield weights_folder(self.path)

    def require(self) -> None:
        """Refuse at once what `reading` would refuse at this moment.

        Raises:
            ConfigError: there is none.
        """
        if "://" in self.path:
            self.store.require(Place.of(self.path))
        else:
            weights_folder(self.path)


def is_trained(path: str | Path) -> bool:
    """Whether this is the folder of a checkpoint or of a run, which has weights to read."""
    folder = Path(path)
    return (folder / "checkpoints").is_dir() or (folder / MANIFEST).is_file()


def weights_folder(path: str | Path) -> Path:
    """The folder of a checkpoint, or of the best weights of the run that is named.

    Raises:
        ConfigError: there are none.
    """
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        kept = sorted((folder / "checkpoints").glob("best-*"))
        if not kept:
            raise ConfigError(f"{folder} is a run without trained weights yet; let it train")
        folder = kept[-1]
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{path} is neither a checkpoint nor a run; name the folder of one")
    return folder
