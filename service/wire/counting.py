"""How many parts a request has, counted before it is parsed: an empty part of two bytes becomes an
object of a hundred."""

from plait.errors import DataError

SMALL = 4_000_000
"""Bytes of a request that is parsed at once: whatever it holds, it stays small."""

MOST_PARTS = 1_000_000

_NESTED: dict[str, dict[int, str]] = {
    "request": {3: "datum", 5: "entry", 7: "entry"},
    "datum": {1: "chunk", 2: "entry", 3: "chunk", 4: "chunk"},
    "entry": {2: "tensor"},
    "chunk": {},
    "tensor": {},
}
_SHAPE = 4
"""The field of a tensor whose every byte may be a number."""


def check_parts(body: bytes) -> None:
    """
    Raises:
        DataError: a ForwardBackwardRequest has too many parts, or ends inside of one.
    """
    if len(body) <= SMALL:
        return
    try:
        parts = _counted(body, 0, len(body), "request", MOST_PARTS)
    except IndexError:
        raise DataError("the body must be a protobuf ForwardBackwardRequest") from None
    if parts > MOST_PARTS:
        raise DataError(f"a forward_backward has up to {MOST_PARTS} parts; send less at once")


def _counted(body: bytes, at: int, end: int, kind: str, most: int) -> int:
    """Fields between two places, those of messages inside too; stops behind `most`."""
    count, nested = 0, _NESTED[kind]
    while at < end and count <= most:
        count += 1
        tag, at = _varint(body, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(body, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            length, at = _varint(body, at)
            inner = nested.get(tag >> 3)
            if inner is not None and at + length <= end:
                count += _counted(body, at, at + length, inner, most - count)
            elif kind == "tensor" and tag >> 3 == _SHAPE:
                count += length
            at += length
        else:  # groups, which no field of ours is
            raise IndexError
    return count


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            return value, at
        shift += 7
