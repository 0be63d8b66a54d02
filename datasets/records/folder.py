"""A folder of media files, each with a text of the same stem: `frog.png`, `frog.txt`."""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from plait.datasets.records.base import LeftOut, Records
from plait.datasets.records.captions import CaptionOptions, first_folder
from plait.datasets.records.media import ENDINGS, PARTS, medium_of
from plait.errors import DataError, Origin, printable
from plait.stream import Sample

MEDIA = frozenset(ending for endings in ENDINGS.values() for ending in endings)
"""Endings of what is read as a picture, a sound or a film, in lower case."""

DRAWINGS = frozenset({".ai", ".eps", ".svg", ".svgz", ".wmf"})
"""Endings of pictures that are not read, because other programs would have to draw them."""


class FolderRecords(Records):
    """One row a picture, sound or film that has a text, in the order of relative paths.

    The class is the first folder of the relative path; hidden files and folders are not looked
    at. Links to folders are followed; a folder that is reached twice is read once. `left_out`
    holds the media without a text, and whatever has one but is no file that is read.
    """

    dialect = "folder"

    def __init__(self, path: Path, *, name: str, captions: CaptionOptions | None = None) -> None:
        super().__init__(path, name=name)
        if not path.is_dir():
            raise DataError(
                "dialect 'folder' needs a folder of media files; this is a file; give its folder",
                Origin(name, None, str(path)),
            )
        self.captions = captions or CaptionOptions()
        self._rows: list[tuple[str, str]] = []  # relative paths of picture and text
        left_out: list[LeftOut] = []
        for folder, files in _folders(path):
            rows, others = _pair(folder, files, self.captions.media)
            self._rows += rows
            left_out += others
        self._rows.sort()
        self.left_out = tuple(sorted(left_out, key=lambda entry: entry.file))
        self.refuse_empty(
            f"put media files there with a .txt of the same name each ({len(left_out)} files "
            "there have none that can be used)"
        )

    def __len__(self) -> int:
        return len(self._rows)

    def notes(self) -> list[str]:
        return self.captions.notes(self._readable_texts())

    def _readable_texts(self) -> Iterator[str]:
        for row, (_, text) in enumerate(self._rows):
            with suppress(DataError):  # a broken row is told of when it is read
                yield self._text(row, text)

    def sample(self, row: int) -> Sample:
        picture, text = self._rows[row]
        file = self.path / picture
        name = printable(picture)
        origin = Origin(self.name, row, str(file))
        caption, label = self._text(row, text), first_folder(name)
        part = PARTS[medium_of(picture) or "image"](file, {})
        try:
            messages = self.captions.messages(part, caption, label)
        except DataError as error:
            raise error.at(origin) from None
        return Sample(messages=messages, id=name, origin=origin, label=label)

    def _text(self, row: int, relative: str) -> str:
        file = self.path / relative
        origin = Origin(self.name, row, str(file))
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"a caption file must be UTF-8; byte {error.start} is not; save it as UTF-8",
                origin,
            ) from error
        except OSError as error:
            raise DataError(
                f"a caption file must be readable; {error.strerror}; mend it or remove the row",
                origin,
            ) from error


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder under `root`, as a prefix that ends in / or is empty, with its files."""

    def stop(error: OSError) -> None:
        raise DataError(
            f"every folder of a dataset must be readable; {error.strerror}; mend its permissions",
            Origin(file=str(error.filename)),
        ) from error

    # Links come after all real folders, whose names then never depend on what points at them.
    waiting, seen = deque([root]), set[tuple[int, int]]()
    while waiting:
        for here, folders, files in os.walk(waiting.popleft(), onerror=stop):
            facts = Path(here).stat()
            if (facts.st_dev, facts.st_ino) in seen:
                folders.clear()
                continue
            seen.add((facts.st_dev, facts.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = (Path(here, name) for name in folders)
            waiting += [folder for folder in inside if folder.is_symlink()]
            relative = Path(here).relative_to(root).as_posix()
            yield "" if relative == "." else f"{relative}/", files


def _pair(
    folder: str, files: list[str], media: tuple[str, ...] | None
) -> tuple[list[tuple[str, str]], list[LeftOut]]:
    """The rows of one folder (file, text), and the media files that make none.

    Where a picture and a sound of one name share a text, it is the picture's, read or not: what is
    seen is what people write down, and a row counted for each would learn the same text twice.
    """
    named = sorted(Path(name) for name in files if not name.startswith("."))
    texts = {name.stem: name.name for name in named if name.suffix.lower() == ".txt"}
    held = [name for name in named if name.suffix.lower() in MEDIA]
    read = {name.stem for name in held}
    pictures = ENDINGS["image"] | DRAWINGS
    pictured = {name.stem for name in named if name.suffix.lower() in pictures}
    rows, left_out = [], []
    for name in held:
        reason = ""
        if name.stem not in texts:
            reason = "no .txt of the same name"
        elif name.stem in pictured and name.suffix.lower() not in ENDINGS["image"]:
            reason = "its .txt is that of the picture of the same name"
        elif media is not None and medium_of(name.name) not in media:
            reason = f"captions.media does not name {medium_of(name.name)}"
        if reason:
            left_out.append(LeftOut(printable(folder + name.name), reason))
        else:
            rows.append((folder + name.name, folder + texts[name.stem]))
    for name in named:
        ending = name.suffix.lower()
        if ending != ".txt" and name.stem in texts and name.stem not in read:
            reason = f"{printable(ending) or 'a file without an ending'} is not read as a medium"
            left_out.append(LeftOut(printable(folder + name.name), reason))
    return rows, left_out
