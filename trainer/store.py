"""The store behind `save_state`: checkpoints by name, immutable, whole or not there at all.

    root/
      objects/ab/ab12...             files by their content; see `plait.trainer.objects`
      <run>/weights/<name>/          checkpoints to resume from; see `plait.trainer.checkpoint`
      <run>/sampler_weights/<name>/  checkpoints that hold weights only
        lifetime.json                since when it is there, and until when
      .writing-*                     what is being written; that of a killed process is removed
      .lock                          held alone to change names, shared to read

Any number of processes may use one store. A kill at any moment leaves each checkpoint as it was
before or as it should be afterwards; the next one to open the store clears away the rest.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError, ConfigError
from plait.trainer.files import (
    ASIDE,
    is_write_failure,
    put_back,
    remove_leftovers,
    replace_folder,
    sync,
    waits_for_put_back,
)
from plait.trainer.lifetime import Lifetime, check_ttl
from plait.trainer.locks import alone, held, is_held, shared
from plait.trainer.manifest import digest_of, read_manifest
from plait.trainer.objects import Objects
from plait.trainer.places import KINDS, Place, fits


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint of a store, as its manifest and lifetime tell it; its files were not read."""

    place: Place
    lifetime: Lifetime
    size: int
    """In bytes, those that it shares with others too."""

    manifest: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    problem: str = ""
    """Why it cannot be used, where its manifest or lifetime is damaged."""


@dataclass(frozen=True, slots=True)
class Store:
    """Checkpoints under `root`.

    Args:
        clock: Seconds since the epoch, by which checkpoints expire.
    """

    root: Path
    clock: Callable[[], float] = time.time

    def open(self) -> None:
        """Clear away what killed processes left, what expired, and what no checkpoint uses."""
        if self.root.is_dir():
            # Where nothing may be written, or the disk is full, the next one to open it does it.
            with suppress(OSError), alone(self.root):
                self._sweep()

    def save(
        self,
        place: Place,
        write: Callable[[Path], None],
        *,
        overwrite: bool = False,
        ttl_seconds: float | None = None,
    ) -> str:
        """Keep what `write` puts into an empty folder, a manifest with it; returns its digest.

        Raises:
            CheckpointError: the name is taken and is not to be overwritten, or the disk is full;
                what was there is unchanged.
        """
        if not overwrite:
            self.refuse_taken(place)  # before minutes of writing, and again where it counts
        try:
            with self._aside() as aside:
                write(aside)
                manifest = read_manifest(aside)
                for name, sha256 in manifest["files"].items():
                    self._objects.share(aside / name, sha256)
                Lifetime.begin(self.clock(), ttl_seconds).write(aside)
                for path in [*sorted(aside.iterdir()), aside]:
                    sync(path)
                self._publish(place, aside, overwrite)
        except Exception as error:
            if not is_write_failure(error):
                raise
            raise CheckpointError(
                f"{place.path} cannot be saved in {self.root}: {error}; free some space; what was "
                "saved before is unchanged"
            ) from error
        return digest_of(manifest)

    def _publish(self, place: Place, aside: Path, overwrite: bool) -> None:
        """Give a whole checkpoint its name."""
        target = place.under(self.root)
        with alone(self.root):
            put_back(target)
            if not overwrite:
                self.refuse_taken(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            for folder in (target.parent.parent, self.root):
                sync(folder)
            replace_folder(target, aside)
            with suppress(OSError):  # the checkpoint is there, whatever else cannot be removed
                self._sweep()

    @contextmanager
    def reading(self, place: Place) -> Iterator[Path]:
        """A checkpoint's folder, which nobody overwrites or removes inside the block.

        Raises:
            ConfigError: it was deleted, it expired, or it never was.
            DamagedCheckpointError: its lifetime cannot be read.
        """
        if waits_for_put_back(place.under(self.root)):
            with alone(self.root):
                put_back(place.under(self.root))
        with shared(self.root):
            self.require(place)
            yield place.under(self.root)

    def require(self, place: Place) -> None:
        """Raises as `reading` does at this moment."""
        folder = place.under(self.root)
        if waits_for_put_back(folder):
            return
        if not folder.is_dir():
            raise ConfigError(
                f"{place.path} is neither a checkpoint nor a run in {self.root}: it was deleted, "
                "it expired or it was never saved; list_checkpoints names those there are"
            )
        if Lifetime.read(folder).over(self.clock()):
            raise ConfigError(
                f"checkpoint {place.path} has expired; what is needed longer needs a longer "
                "ttl_seconds, or none"
            )

    def entries(self) -> list[Entry]:
        """All checkpoints there are, the oldest first; damaged ones say so."""
        self.open()
        with shared(self.root):
            found = [self._entry(place) for place in self._places()]
            now = self.clock()
            live = [entry for entry in found if not entry.lifetime.over(now)]
        return sorted(live, key=lambda entry: (entry.lifetime.saved_at, entry.place.path))

    def entry(self, place: Place) -> Entry | None:
        """One of them; None where there is none, or it has expired."""
        with shared(self.root):
            found = self._entry(place) if place.under(self.root).is_dir() else None
        return None if found is None or found.lifetime.over(self.clock()) else found

    def _entry(self, place: Place) -> Entry:
        folder = place.under(self.root)
        size = sum(path.stat().st_size for path in folder.iterdir())
        try:
            manifest = read_manifest(folder)
            return Entry(place, Lifetime.read(folder), size, manifest, digest_of(manifest))
        except CheckpointError as error:
            return Entry(place, Lifetime.found(folder), size, problem=str(error))

    def delete(self, place: Place) -> None:
        """Remove a checkpoint, damaged or not; its name is free again.

        Raises:
            ConfigError: there is none.
        """
        with self._changing(place) as folder:
            self._remove(folder)
            with suppress(OSError):
                self._sweep()

    def set_ttl(self, place: Place, ttl_seconds: float | None) -> None:
        """Let a checkpoint expire so many seconds from now, or never.

        Raises:
            ConfigError: there is none, or the number is not above 0.
            DamagedCheckpointError: its lifetime cannot be read.
        """
        check_ttl(ttl_seconds)
        with self._changing(place) as folder:
            self.require(place)
            saved_at = Lifetime.read(folder).saved_at
            Lifetime.begin(self.clock(), ttl_seconds, saved_at).write(folder)
            sync(folder)

    @contextmanager
    def _changing(self, place: Place) -> Iterator[Path]:
        """A checkpoint's folder, alone."""
        folder = place.under(self.root)
        if not folder.is_dir():
            self.require(place)
        with alone(self.root):
            put_back(folder)
            if not folder.is_dir():
                self.require(place)
            yield folder

    def refuse_taken(self, place: Place) -> None:
        """
        Raises:
            CheckpointError: there is a checkpoint of this name.
        """
        folder = place.under(self.root)
        if folder.is_dir() and not Lifetime.found(folder).over(self.clock()):
            raise CheckpointError(
                f"a checkpoint does not change, and {place.path} is there already; save under "
                "another name, or with overwrite=True"
            )

    @property
    def _objects(self) -> Objects:
        return Objects(self.root / "objects")

    def _places(self) -> list[Place]:
        return [
            Place(kind.parent.name, kind.name, folder.name)
            for kind in self._kinds()
            for folder in sorted(kind.iterdir())
            if folder.is_dir() and fits(folder.name)
        ]

    def _kinds(self) -> list[Path]:
        """The folders that hold checkpoints; whatever else lies under the root is not ours."""
        found = [path for kind in KINDS for path in self.root.glob(f"*/{kind}")]
        return sorted(path for path in found if path.is_dir() and fits(path.parent.name))

    def _sweep(self) -> None:
        """Clear away; only alone. What is damaged stays until it is deleted by name."""
        for kind in self._kinds():
            remove_leftovers(kind)
        for aside in self.root.glob(f"{ASIDE}*"):
            if not is_held(aside):
                shutil.rmtree(aside, ignore_errors=True)
        for place in self._places():
            folder = place.under(self.root)
            remove_leftovers(folder)
            if Lifetime.found(folder).over(self.clock()):
                self._remove(folder)
        self._objects.sweep()

    def _remove(self, folder: Path) -> None:
        """Take the name away at once, then the files: no checkpoint is seen half removed."""
        aside = self.root / f"{ASIDE}{uuid.uuid4().hex}"
        folder.rename(aside)
        sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
        for parent in (folder.parent, folder.parent.parent):
            with suppress(OSError):  # there are others in it
                parent.rmdir()

    @contextmanager
    def _aside(self) -> Iterator[Path]:
        """A folder to fill, which no sweep takes for a dead process's while this one lives."""
        aside = self.root / f"{ASIDE}{uuid.uuid4().hex}"
        self.root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with alone(self.root):
                aside.mkdir()
                stack.enter_context(held(aside))
            stack.callback(shutil.rmtree, aside, ignore_errors=True)
            yield aside
