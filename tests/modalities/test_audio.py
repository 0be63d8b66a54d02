"""Sounds: what headers promise is what decoding gives, for every format, cut and rate."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from plait.errors import MediaError
from plait.modalities import Audio, AudioRequest, Limits


def tone(seconds: float, rate: int) -> np.ndarray:
    """A rising tone, so that every moment of it differs from every other."""
    time = np.arange(int(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (200 + 50 * time) * time)).astype(np.float32)


def test_an_array_is_read_as_it_is() -> None:
    samples = tone(0.5, 16_000)
    audio = Audio(np.stack([samples, -samples / 2]), rate=16_000, start=0.1, end=0.2)
    header = audio.header()
    assert (header.samples, header.rate, header.channels) == (1600, 16_000, 2)
    np.testing.assert_allclose(audio.decode(), samples[1600:3200] / 4, atol=1e-7)
    assert len(audio.decode(wanted=AudioRequest(22_050))) == header.samples_at(22_050)


def test_parts_compare_hash_and_pickle() -> None:
    samples = tone(0.1, 8000)
    assert Audio("a.wav") == Audio("a.wav") != Audio("a.wav", end=1.0)
    assert Audio(Path("a.wav")) != Audio("a.wav")
    assert Audio(samples, rate=8000) != Audio(samples.copy(), rate=8000)
    assert len({Audio("a.wav"), Audio("a.wav"), Audio("a.wav", start=1.0)}) == 2
    copy = pickle.loads(pickle.dumps(Audio(samples, rate=8000)))
    np.testing.assert_array_equal(copy.decode(), samples)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"no such file.*a\.wav"):
        Audio(tmp_path / "a.wav").header(Limits())
