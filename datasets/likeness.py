"""Which pictures are nearly the same: a difference hash, and groups of what lies close.

A hash is 256 bits of edges and 16 brightnesses. The edges are those of an 8 x 8 difference hash
(dHash) taken both across and down, with a bit each for "brighter" and "darker", so that a flat
step is told from an edge: the usual 64 bits (across, one sign) cannot tell a blank page from the
letter F, or a ball from the moon, where most of a picture is white. The brightnesses, a 4 x 4
reduction, tell black from white where there are no edges. Hues are not compared: a red and a green
copy of one flag are near.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from plait.errors import DataError
from plait.modalities import Image, Limits
from plait.stream import Sample

Progress = Callable[[int, int], None]
"""Called with (done, all) from the thread that asked."""

MAX_BRIGHTNESS_DIFFERENCE = 96
"""Of 255. Recoloured copies differ by up to 76; a letter and an empty page by 255."""

_EDGES = 8  # steps across and down
_NOISE = 4  # of 255: a smaller step is no edge
_AREAS = 4  # areas across and down whose brightness is kept

Hash = tuple[NDArray[np.uint64], NDArray[np.int16]]


def picture_hash(pixels: NDArray[np.uint8]) -> Hash:
    """The edges, (4,) words of 64 bits, and the brightnesses, (16,), of a uint8 (H, W, 3)."""
    grey = PIL.Image.fromarray(pixels).convert("L")
    across = np.diff(_reduced(grey, _EDGES + 1, _EDGES), axis=1)
    down = np.diff(_reduced(grey, _EDGES, _EDGES + 1), axis=0)
    edges = [across > _NOISE, across < -_NOISE, down > _NOISE, down < -_NOISE]
    words = np.packbits(np.stack([edge.ravel() for edge in edges])).view(np.uint64)
    return words, _reduced(grey, _AREAS, _AREAS).ravel()


def _reduced(grey: PIL.Image.Image, width: int, height: int) -> NDArray[np.int16]:
    return np.asarray(grey.resize((width, height), PIL.Image.Resampling.BOX), dtype=np.int16)


def near_rows(
    edges: NDArray[np.uint64], brightness: NDArray[np.int16], bits: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each row, and the later rows within `bits` and the brightness bound.

    All N * N / 2 are compared; what is near one row is held at a time.
    """
    for row in range(len(edges)):
        distance = np.bitwise_count(edges[row] ^ edges[row + 1 :]).sum(axis=1)
        close = row + 1 + np.flatnonzero(distance <= bits)
        light = np.abs(brightness[close] - brightness[row]).max(axis=1, initial=0)
        yield row, close[light <= MAX_BRIGHTNESS_DIFFERENCE]


def joined(count: int, near: Iterable[tuple[int, Sequence[int] | NDArray[np.int64]]]) -> list[int]:
    """For each of `count` things the smallest member of its group; what is near joins groups."""
    leader = np.arange(count)

    def find(thing: int) -> int:
        while leader[thing] != thing:
            leader[thing] = leader[leader[thing]]
            thing = int(leader[thing])
        return thing

    for one, others in near:
        # Things of one group mostly have the same leader by now, which is looked up once.
        for other in np.unique(leader[np.asarray(others, dtype=np.int64)]).tolist():
            low, high = sorted((find(one), find(other)))
            leader[high] = low
    return [find(thing) for thing in range(count)]


def group_rows(
    samples: Sequence[Sample | None],
    bits: int,
    limits: Limits,
    progress: Progress | None = None,
) -> tuple[list[int], int]:
    """Rows that show nearly the same picture, and the number of pictures that cannot be read.

    A picture that several rows show is read once, and pictures with one hash are compared once.

    Args:
        progress: Each picture counts twice: when it is hashed and when it is compared.

    Returns:
        For each row the smallest row of its group, itself if it is alone; and a count. A row
        that is None, or whose picture is broken, is alone.
    """
    held = [(row, part) for row, sample in enumerate(samples) if sample for part in sample.media()]
    shown = [(row, part) for row, part in held if isinstance(part, Image)]
    pictures = list(dict.fromkeys(part for _, part in shown))
    tell = progress or _untold
    numbers: dict[bytes, int] = {}
    hashes: list[Hash] = []
    hash_of: dict[Image, int] = {}
    for done, (picture, found) in enumerate(_hashed(pictures, limits), start=1):
        if found is not None:
            key = b"".join(side.tobytes() for side in found)
            if key not in numbers:
                numbers[key] = len(hashes)
                hashes.append(found)
            hash_of[picture] = numbers[key]
        tell(done, 2 * len(pictures))
    groups = joined(len(hashes), _compared(hashes, bits, len(pictures), tell))
    rows_of: dict[int, list[int]] = {}
    for row, picture in shown:
        if picture in hash_of:
            rows_of.setdefault(groups[hash_of[picture]], []).append(row)
    near = ((rows[0], rows) for rows in rows_of.values())
    return joined(len(samples), near), len(pictures) - len(hash_of)


def _untold(done: int, total: int) -> None:
    """Progress that nobody asked for."""


def _hashed(pictures: Sequence[Image], limits: Limits) -> Iterator[tuple[Image, Hash | None]]:
    """Each picture and its hash, in order; None where it cannot be read."""

    def hashed(picture: Image) -> Hash | None:
        try:
            return picture_hash(picture.decode(limits))
        except DataError:
            return None

    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        yield from zip(pictures, pool.map(hashed, pictures), strict=True)


def _compared(
    hashes: Sequence[Hash], bits: int, pictures: int, tell: Progress
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """What is near each hash, told as the second half of the work on all pictures."""
    if hashes:
        edges, brightness = (np.stack(side) for side in zip(*hashes, strict=True))
        for row, close in near_rows(edges, brightness, bits):
            yield row, close
            tell(2 * pictures - len(hashes) + row + 1, 2 * pictures)
