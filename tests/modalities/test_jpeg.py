"""JPEG by torchvision: Pillow's pixels, and Pillow's judgement of damaged files."""

import subprocess
import sys
from collections import Counter
from io import BytesIO

import numpy as np
import PIL.Image
import pytest

from plait.errors import MediaError
from plait.modalities import Image, Limits
from plait.modalities.jpeg import MODES, decode_jpeg
from plait.modalities.pixels import to_rgb

KINDS = (
    {"quality": 90},
    {"quality": 30, "progressive": True},
    {"quality": 95, "subsampling": 0},
    {"quality": 80, "subsampling": 1, "optimize": True},
    {"quality": 75, "restart_marker_rows": 1},
)


def jpegs() -> list[bytes]:
    """A small picture in every kind of JPEG, in colour and grey; its sides are odd."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise).resize((97, 61), PIL.Image.Resampling.BICUBIC)
    found = []
    for mode in sorted(MODES):
        for options in KINDS:
            held = BytesIO()
            picture.convert(mode).save(held, "JPEG", **options)
            found.append(held.getvalue())
    return found


def damaged(content: bytes, chance: np.random.Generator) -> bytes:
    """The file cut off, with bytes changed, without some, or with more."""
    at = int(chance.integers(2, len(content) - 8))
    noise = chance.integers(0, 256, int(chance.integers(1, 8)), dtype=np.uint8).tobytes()
    kind = chance.integers(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + noise + content[at + len(noise) :]
    return content[:at] + content[at + len(noise) :] if kind == 2 else (
        content[:at] + noise + content[at:]
    )  # fmt: skip


def pillow(content: bytes) -> np.ndarray | None:
    """What Pillow makes of a JPEG that it opens; None where it refuses."""
    try:
        with PIL.Image.open(BytesIO(content), formats=["JPEG"]) as picture:
            if picture.mode not in MODES or picture.width * picture.height > 1_000_000:
                return None
            return np.array(to_rgb(picture))
    except Exception:  # it raises anything
        return None


@pytest.mark.parametrize("content", jpegs())
def test_whole_files_have_pillow_s_pixels(content: bytes) -> None:
    found = decode_jpeg(content)
    assert found is not None and np.array_equal(found, pillow(content))
    assert found.flags.c_contiguous and np.array_equal(Image(content).decode(), found)


def test_damaged_files_are_read_and_refused_as_pillow_does() -> None:
    chance, whole = np.random.default_rng(1), jpegs()
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for number in range(2000):
        content = damaged(whole[number % len(whole)], chance)
        wanted, fast = pillow(content), decode_jpeg(content)
        if wanted is not None:
            assert fast is None or np.array_equal(fast, wanted)
            assert np.array_equal(Image(content).decode(), wanted)
        else:
            with pytest.raises(MediaError):
                Image(content).decode(Limits(max_image_pixels=1_000_000))
        outcomes[wanted is not None, fast is not None] += 1
    assert outcomes[True, True] > 800 and outcomes[False, False] > 400
    assert outcomes[False, True] <= 40, "what Pillow does not even open as a JPEG of these modes"


def test_a_process_without_torch_stays_without_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.jpg").write_bytes(jpegs()[0])
    code = (
        "import sys; from plait.modalities import Image; "
        f"print(Image({str(tmp_path / 'a.jpg')!r}).decode().sum(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(Image(jpegs()[0]).decode().sum()), "False"]
