"""Which pictures are nearly the same: a difference hash, and groups of what lies close.

A hash is 256 bits of edges and 16 brightnesses. The edges are those of an 8 x 8 difference hash
(dHash) taken both across and down, with a bit each for "brighter" and "darker", so that a flat
step is told from an edge: the usual 64 bits (across, one sign) cannot tell a blank page from the
letter F, or a ball from the moon, where most of a picture is white. The brightnesses, a 4 x 4
reduction, tell black from white where there are no edges. Hues are not compared: a red and a green
copy of one flag are near.
"""

from collections.abc import Callable, Sequence
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


def near_pairs(
    edges: NDArray[np.uint64], brightness: NDArray[np.int16], bits: int
) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, within `bits` and the brightness bound. Compares all N * N / 2."""
    pairs = []
    for row in range(len(edges) - 1):
        distance = np.bitwise_count(edges[row] ^ edges[row + 1 :]).sum(axis=1)
        close = row + 1 + np.flatnonzero(distance <= bits)
        light = np.abs(brightness[close] - brightness[row]).max(axis=1, initial=0)
        pairs += [(row, int(other)) for other in close[light <= MAX_BRIGHTNESS_DIFFERENCE]]
    return pairs


def joined(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """For each of `count` things the smallest member of its group; pairs join groups."""
    leader = list(range(count))

    def find(thing: int) -> int:
        while leader[thing] != thing:
            leader[thing] = leader[leader[thing]]
            thing = leader[thing]
        return thing

    for one, other in pairs:
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

    Returns:
        For each row the smallest row of its group, itself if it is alone; and a count. A row
        that is None, or whose picture is broken, is alone.
    """
    held = [(row, part) for row, sample in enumerate(samples) if sample for part in sample.media()]
    pictures = [(row, part) for row, part in held if isinstance(part, Image)]

    def hashed(picture: Image) -> Hash | None:
        try:
            return picture_hash(picture.decode(limits))
        except DataError:
            return None

    hashes: list[Hash | None] = []
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        for result in pool.map(hashed, [picture for _, picture in pictures]):
            hashes.append(result)
            if progress is not None:
                progress(len(hashes), len(pictures))
    rows = [row for (row, _), found in zip(pictures, hashes, strict=True) if found is not None]
    whole = [found for found in hashes if found is not None]
    if not whole:
        return list(range(len(samples))), len(hashes)
    edges, brightness = (np.stack(side) for side in zip(*whole, strict=True))
    pairs = [(rows[i], rows[j]) for i, j in near_pairs(edges, brightness, bits)]
    return joined(len(samples), pairs), len(hashes) - len(whole)
