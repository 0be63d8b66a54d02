"""Sixteen frames of a film by seeking, against decoding all of it.

    python -m benchmarks.video --json

The film is made for the measurement: 10 minutes of H.264, 640 x 360 at 24 frames a second, a
keyframe every 48. Both sides open the file, find the same uniform times and give the same array.
A number is only printed when every frame found by seeking equals the one that decoding everything
shows at its time.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import alternate, machine, summary
from plait.modalities import Frames, FrameSampling, Limits, Video

SECONDS, RATE, WIDTH, HEIGHT, KEYFRAMES = 600, 24, 640, 360, 48
SAMPLING = FrameSampling(count=16)
ROUNDS = 3


def make_film(path: Path, seconds: int) -> None:
    """A bar that moves over a drifting gradient; no two neighbouring frames are equal."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        options = {"preset": "ultrafast", "g": str(KEYFRAMES), "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(seconds * RATE):
            frame = av.VideoFrame.from_ndarray(picture(number), format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def picture(number: int) -> NDArray[np.uint8]:
    """A frame's planes, one below the other."""
    planes = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
    planes[:HEIGHT] = (np.arange(WIDTH, dtype=np.int64) + number) % 200 + 20
    at = 5 * number % (WIDTH - 40)
    planes[:HEIGHT, at : at + 40] = 30 + number % 190
    return planes


def by_seeking(path: Path) -> Frames:
    return Video(path).load(Limits(), SAMPLING)


def by_decoding_all(path: Path) -> Frames:
    """What a loop over the whole film gives: the last frame that begins at or before each time."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"  # what makes this side fastest
        times = SAMPLING.times(float(stream.duration * stream.time_base))
        taken: list[NDArray[np.uint8]] = []
        seconds: list[float] = []
        last: Any = None
        for frame in container.decode(stream):
            while len(taken) < len(times) and frame.time > times[len(taken)]:
                taken.append(last.to_ndarray(format="rgb24"))
                seconds.append(last.time)
            last = frame
        while len(taken) < len(times):
            taken.append(last.to_ndarray(format="rgb24"))
            seconds.append(last.time)
    return Frames(np.stack(taken), np.array(seconds))


def check(path: Path) -> None:
    """
    Raises:
        SystemExit: the two sides differ.
    """
    sought, decoded = by_seeking(path), by_decoding_all(path)
    if not np.array_equal(sought.pixels, decoded.pixels):
        raise SystemExit("seeking is wrong: its frames are not those of decoding all")
    if not np.allclose(sought.seconds, decoded.seconds, atol=1e-6):
        raise SystemExit("seeking is wrong: its frames have other times than in decoding all")


def main() -> None:
    parser = argparse.ArgumentParser(description="Sixteen frames of a film by seeking.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of the film")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        began = time.perf_counter()
        make_film(path, arguments.seconds)
        making, size = time.perf_counter() - began, path.stat().st_size
        check(path)
        pair = (lambda: by_seeking(path), lambda: by_decoding_all(path))
        found = summary(alternate([pair], ROUNDS))
    facts = {
        "film_seconds": arguments.seconds, "width": WIDTH, "height": HEIGHT, "rate": RATE,
        "keyframes_every": KEYFRAMES, "frames": SAMPLING.count, "film_bytes": size,
        "making_seconds": round(making, 1),
    }  # fmt: skip
    if not arguments.json:
        print(
            f"seeking {found['seconds']} s, decoding all {found['peer_seconds']} s: "
            f"{found['ratio']} times as fast"
        )
    print(json.dumps(found | facts | machine()))


if __name__ == "__main__":
    main()
