"""JSON: one array of rows, found without parsing them."""

import mmap
import re
from array import array
from typing import BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from plait.datasets.records.tables.base import IndexedTable, Row
from plait.datasets.records.tables.jsonl import parse_row
from plait.errors import DataError, Origin

# A whole string, a bracket or comma outside of strings, or a quote that nothing closes. Possessive:
# a string of 100 MB must not be remembered sign by sign.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]|"', re.DOTALL)
_SPACE = b" \t\r\n"


class JsonTable(IndexedTable):
    """One row an element of the array, an object or a list.

    A file that ends in the middle has its whole elements as rows, and a last one that is broken.
    """

    kind: ClassVar[str] = "json"
    what: ClassVar[str] = "a JSON file"
    endings: ClassVar[tuple[str, ...]] = (".json",)

    def index(self, content: BinaryIO) -> NDArray[np.int64]:
        if not content.seek(0, 2):
            return np.zeros((0, 2), np.int64)
        with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as held:
            begin = _first_sign(held)
            if held[begin : begin + 1] != b"[":
                raise DataError(
                    "a JSON table must be one array of rows, in square brackets; this file is "
                    "not; write it as one, or as JSONL with a row a line",
                    Origin(file=str(self.file)),
                )
            return _element_bounds(held, begin + 1)

    def parse(self, content: bytes) -> Row:
        return parse_row(content, "whole JSON")


def _first_sign(held: mmap.mmap) -> int:
    """Where the first byte that is neither space nor a byte order mark stands."""
    found = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*+").match(held)
    return found.end() if found else 0


def _element_bounds(held: mmap.mmap, begin: int) -> NDArray[np.int64]:
    bounds, depth, start, stop = array("q"), 0, begin, len(held)
    for token in _TOKENS.finditer(held, begin):
        sign = held[token.start() : token.start() + 1]
        if sign == b'"':
            if token.end() - token.start() == 1:  # nothing closes it: the rest is one broken row
                break
        elif sign in b"[{":
            depth += 1
        elif depth and sign in b"]}":
            depth -= 1
        elif not depth:  # a comma between elements, or the array's end
            _add(held, bounds, start, token.start())
            start = token.end()
            if sign != b",":
                stop = start
                break
    if stop > start:
        _add(held, bounds, start, stop)
    return np.frombuffer(bounds, np.int64).reshape(-1, 2).copy()


def _add(held: mmap.mmap, bounds: "array[int]", start: int, stop: int) -> None:
    """Add a stretch unless it is only space."""
    found = re.compile(rb"[ \t\r\n]*+").match(held, start, stop)
    if found and found.end() < stop:
        bounds.extend((found.end(), stop))
