"""A medium as the tensor of a dmel chunk; `chunks.media_chunk` reads it again.

dtype, number of dimensions, dimensions | MARK | lengths | description (JSON) | file | zeros
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

MARK = b"PLAITMEDIA1"
LENGTHS = struct.Struct("<IQ")
"""Of the description, and of the file."""

_UINT8 = 4


def packed(
    kind: str, data: bytes, options: Mapping[str, Any], *, expected: int | None = None
) -> bytes:
    """A medium as the tensor of a dmel chunk, uint8 [positions, width].

    Args:
        expected: The positions that it takes, where they are known; 1 otherwise.
    """
    said: dict[str, Any] = {"kind": kind, "options": dict(options)}
    if expected is not None:
        said["expected"] = expected
    head = json.dumps(said).encode()
    content = MARK + LENGTHS.pack(len(head), len(data)) + head + data
    rows = expected or 1
    width = -(-len(content) // rows)
    shape = bytes([_UINT8, 2]) + _varint(rows) + _varint(width)
    return shape + content.ljust(rows * width, b"\0")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
