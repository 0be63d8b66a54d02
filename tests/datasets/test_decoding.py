"""Decoding in processes that can be killed: a stuck or crashing decoder costs one row."""

import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from plait.datasets.decoding import Decoder
from plait.errors import ConfigError, DecodeTimeoutError, MediaError, PlaitError
from plait.modalities import Audio, AudioRequest, FrameSampling, Image, Limits, MediaPart, Video
from plait.modalities.worker import Replies, packed, unpacked

LIMITS = Limits()
SHORT = Limits(max_decode_seconds=1.0)


def wav(path: Path, samples: int = 8000, rate: int = 8000) -> Path:
    """A rising saw of 8-bit samples."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(rate)
        file.writeframes((np.arange(samples) % 251).astype(np.uint8).tobytes())
    return path


def gif() -> bytes:
    frames = [PIL.Image.new("RGB", (8, 6), (40 * at, 0, 0)) for at in range(5)]
    held = io.BytesIO()
    frames[0].save(held, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return held.getvalue()


def png() -> bytes:
    held = io.BytesIO()
    PIL.Image.new("RGB", (5, 4), (10, 20, 30)).save(held, "PNG")
    return held.getvalue()


def pids(decoder: Decoder) -> list[int]:
    return [worker.process.pid for worker in decoder._all]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with Decoder(1) as made:
        yield made


def test_a_process_gives_what_the_part_gives(tmp_path: Path) -> None:
    sound, film, picture = Audio(wav(tmp_path / "a.wav")), Video(gif()), Image(png())
    with Decoder(1, untrusted=True) as decoder:
        for part in (sound, film, picture):
            assert decoder.header(part, LIMITS) == part.header(LIMITS)
        request = AudioRequest(16_000)
        np.testing.assert_array_equal(
            decoder.decode(sound, LIMITS, request), sound.decode(LIMITS, request)
        )
        np.testing.assert_array_equal(decoder.decode(picture, LIMITS), picture.decode(LIMITS))
        ours, theirs = (
            take(LIMITS, FrameSampling(count=3))
            for take in (film.decode, lambda *asked: decoder.decode(film, *asked))
        )
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        np.testing.assert_array_equal(ours.seconds, theirs.seconds)
        assert theirs.pixels.flags.writeable  # as torch asks
        assert len(pids(decoder)) == 1


def test_pictures_and_arrays_start_no_process(decoder: Decoder) -> None:
    decoder.decode(Image(png()), LIMITS)
    decoder.decode(Audio(np.zeros(10, np.float32), rate=8000), LIMITS)
    assert pids(decoder) == []


def test_an_error_comes_with_its_file_and_the_process_stays(
    decoder: Decoder, tmp_path: Path
) -> None:
    with pytest.raises(MediaError, match="no such file") as caught:
        decoder.decode(Audio(tmp_path / "no.wav"), LIMITS)
    assert caught.value.origin.file == str(tmp_path / "no.wav")
    before = pids(decoder)
    decoder.header(Audio(wav(tmp_path / "a.wav")), LIMITS)
    assert pids(decoder) == before


def test_a_stuck_decoder_costs_one_row(decoder: Decoder, tmp_path: Path) -> None:
    sound = Audio(wav(tmp_path / "a.wav"))
    decoder.header(sound, LIMITS)
    (stuck,) = pids(decoder)
    os.kill(stuck, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(DecodeTimeoutError, match=r"in 1 s.*a\.wav") as caught:
        decoder.decode(sound, SHORT)
    assert time.monotonic() - began < 10
    assert caught.value.origin.file == str(tmp_path / "a.wav")
    assert gone(stuck)
    assert len(decoder.decode(sound, LIMITS)) == 8000
    assert pids(decoder) != [stuck]


def test_a_request_that_is_not_even_read_ends_in_time(decoder: Decoder) -> None:
    """Bytes that fill the pipe before the stuck process takes them."""
    decoder.header(Video(gif()), LIMITS)
    os.kill(*pids(decoder), signal.SIGSTOP)
    with pytest.raises(DecodeTimeoutError):
        decoder.decode(Audio(bytes(8_000_000)), SHORT)


def test_a_crash_costs_one_row(decoder: Decoder, tmp_path: Path) -> None:
    sound = Audio(wav(tmp_path / "a.wav"))
    decoder.header(sound, LIMITS)
    (victim,) = pids(decoder)
    os.kill(victim, signal.SIGSTOP)  # so that it is killed during the call
    threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    with pytest.raises(MediaError, match=r"without a crash.*-9.*a\.wav") as caught:
        decoder.decode(sound, LIMITS)
    assert not isinstance(caught.value, DecodeTimeoutError)
    assert len(decoder.decode(sound, LIMITS)) == 8000


def test_a_process_that_died_unasked_is_replaced(decoder: Decoder, tmp_path: Path) -> None:
    sound = Audio(wav(tmp_path / "a.wav"))
    decoder.header(sound, LIMITS)
    os.kill(*pids(decoder), signal.SIGKILL)
    assert gone(*pids(decoder))
    assert len(decoder.decode(sound, LIMITS)) == 8000


def test_a_decoder_stays_within_its_memory(tmp_path: Path) -> None:
    large = Audio(wav(tmp_path / "large.wav", 60_000_000, 44_100))
    small = Audio(wav(tmp_path / "small.wav"))
    with Decoder(1, memory=450_000_000) as decoder:
        assert decoder.header(large, LIMITS)
        with pytest.raises(MediaError, match=r"memory|crash") as caught:
            decoder.decode(large, LIMITS)
        assert caught.value.origin.file.endswith("large.wav")
        assert len(decoder.decode(small, LIMITS)) == 8000


def test_threads_share_the_processes(tmp_path: Path) -> None:
    sounds = [Audio(wav(tmp_path / f"{n}.wav", 1000 + n)) for n in range(24)]
    with Decoder(2) as decoder, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda sound: len(decoder.decode(sound, LIMITS)), sounds))
        assert len(pids(decoder)) <= 2
    assert found == [1000 + n for n in range(24)]


def test_closing_ends_the_processes_and_those_who_wait(tmp_path: Path) -> None:
    sound = Audio(wav(tmp_path / "a.wav"))
    decoder = Decoder(1)
    decoder.header(sound, LIMITS)
    (pid,) = pids(decoder)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, decoder.close).start()
    with pytest.raises(PlaitError, match="closed"):
        decoder.decode(sound, LIMITS)
    assert gone(pid)
    with pytest.raises(PlaitError, match="closed"):
        decoder.header(sound, LIMITS)
    decoder.close()
    with pytest.raises(ConfigError, match="workers"):
        Decoder(0)


PROGRAM = """
import sys, time
from plait.datasets.decoding import Decoder
from plait.modalities import Audio, Limits
decoder = Decoder(1)
decoder.header(Audio(sys.argv[1]), Limits())
print(*[worker.process.pid for worker in decoder._all], flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


@pytest.mark.parametrize("end", ["exit", "wait"])
def test_no_process_outlives_its_parent(end: str, tmp_path: Path) -> None:
    """Neither one that ends nor one that is killed."""
    command = [sys.executable, "-c", PROGRAM, str(wav(tmp_path / "a.wav")), end]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if end == "wait":
        assert alive(pid)
        parent.kill()
    parent.communicate()
    assert gone(pid)


def test_a_stuck_process_whose_parent_is_gone_ends_itself(tmp_path: Path) -> None:
    """A clock of its own runs while it works, and ends it without anybody's help."""
    program = (
        "import signal, sys, plait.modalities.worker as w\n"
        "w._GRACE = 0.0\n"
        "def stuck(request):\n"
        "    while True: pass\n"
        "w.answer = stuck\n"
        "sys.argv[1:] = [str(4 << 30)]\n"
        "w.main()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    worker = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment,
    )  # fmt: skip
    for block in packed(("load", Audio("a.wav"), SHORT, None)):
        assert worker.stdin is not None
        worker.stdin.write(block)
    worker.stdin.flush()
    assert worker.wait(60) == -signal.SIGALRM


class _Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


def test_a_reply_of_unknown_types_is_not_read() -> None:
    blocks = packed(_Harm())[1:]
    with pytest.raises(pickle.UnpicklingError, match="may not hold"):
        unpacked(blocks, Replies)


class _Own(MediaPart):
    """A medium of somebody's own, which another process would not find."""

    medium = "smell"
    file = "rose"

    def header(self, limits: Limits = LIMITS) -> int:  # type: ignore[override]
        return os.getpid()

    def load(self, limits: Limits, wanted: object = None) -> int:
        return os.getpid()

    def digest(self) -> str:
        return ""


def test_a_medium_of_ones_own_is_read_here(decoder: Decoder) -> None:
    assert decoder.header(_Own(), LIMITS) == os.getpid() == decoder.decode(_Own(), LIMITS)
