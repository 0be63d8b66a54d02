"""Files stored once by their content: equal files of several checkpoints share one place.

`objects/ab/ab12...` is a second name (a hard link) of a file that lies in checkpoints, too. The
file system counts the names, so nothing else must: a file that has no name left but its object's is
of no checkpoint, and goes. Neither a kill nor another process can make that count wrong.
"""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from plait.trainer.files import ASIDE
from plait.trainer.manifest import sha256_of

SMALLEST = 16_384
"""Bytes; a smaller file is kept in each checkpoint. It costs little, and where the disk damages
the one place of a file, all checkpoints that share it are damaged."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
"""What a file system answers that has no hard links, or no more of them for this file."""


@dataclass(frozen=True, slots=True)
class Objects:
    """The folder of files by content."""

    folder: Path

    def share(self, file: Path, sha256: str) -> None:
        """Make `file`, whose content has this hash, the same place as any equal file's.

        Where that is impossible it stays a file of its own, which costs space and nothing else.

        Raises:
            OSError: the disk is full or fails.
        """
        if file.stat().st_size < SMALLEST:
            return
        kept = self.folder / sha256[:2] / sha256
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            if not kept.exists():
                os.link(file, kept)
            elif sha256_of(kept) == sha256:
                _link_over(kept, file)
            else:  # damaged since: what is saved from now on must not be
                _link_over(file, kept)
        except (FileExistsError, FileNotFoundError):
            pass  # somebody else's save or sweep came between
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise

    def sweep(self) -> None:
        """Remove what no checkpoint has, nor any that is being written."""
        for kept in self:
            with suppress(OSError):
                # A link that is made now keeps the content: only the object's name is lost.
                if kept.stat().st_nlink == 1 or kept.name.startswith(ASIDE):
                    kept.unlink()

    def __iter__(self) -> Iterator[Path]:
        return iter(self.folder.glob("*/*"))


def _link_over(source: Path, target: Path) -> None:
    """Make `target` another name of `source`, at once."""
    aside = target.with_name(f"{ASIDE}{uuid.uuid4().hex}")
    os.link(source, aside)
    try:
        aside.replace(target)
    finally:
        # Where both are one file already, `rename` does nothing and leaves both names.
        aside.unlink(missing_ok=True)
