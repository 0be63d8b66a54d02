"""Reading the `model.bin` of CTranslate2: names, shapes and bytes, nothing that runs.

A file holds a version, the model's kind, its revision, the variables and their aliases. A text is
its length (two bytes, the closing zero counted) and its bytes; numbers are little-endian.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from struct import calcsize, unpack
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = ("<f4", "i1", "<i2", "<i4", "<f2")
VERSION = 6


def variables(file: Path, kind: str) -> dict[str, NDArray[Any]]:
    """The variables of a model of this kind, as views of the file.

    Raises:
        ValueError: the file is of another kind, another version, or cut short.
    """
    reader = _Reader(np.memmap(file, dtype=np.uint8, mode="r"))
    version, found, _ = reader.number("<I"), reader.text(), reader.number("<I")
    if (version, found) != (VERSION, kind):
        raise ValueError(f"a {kind} of version {VERSION} was expected; got {found}, {version}")
    return dict(reader.variable() for _ in range(reader.number("<I")))


class _Reader:
    """A place in the file."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.place = data, 0

    def take(self, size: int) -> NDArray[np.uint8]:
        if self.place + size > len(self.data):
            raise ValueError("the file is cut short")
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, form: str) -> int:
        value: int = unpack(form, self.take(calcsize(form)).tobytes())[0]
        return value

    def text(self) -> str:
        return self.take(self.number("<H"))[:-1].tobytes().decode()

    def variable(self) -> tuple[str, NDArray[Any]]:
        name = self.text()
        shape = [self.number("<I") for _ in range(self.number("<B"))]
        dtype = self.number("<B")
        if dtype >= len(_DTYPES):
            raise ValueError(f"variable {name!r} has the unknown type {dtype}")
        content = self.take(self.number("<I"))
        return name, content.view(_DTYPES[dtype]).reshape(shape)


def layers(names: Iterable[str], part: str) -> int:
    """How many layers a part ("encoder") has."""
    numbered = re.compile(rf"{part}/layer_(\d+)/")
    return len({match[1] for match in map(numbered.match, names) if match})
