"""Sounds: what headers promise is what decoding gives, for every format, cut and rate."""

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio

from plait.errors import MediaError
from plait.modalities import Audio, AudioRequest, Limits, sound

SECONDS = 6.37
LIMITS = Limits()


def stored(folder: Path, ending: str, data: bytes) -> Path:
    path = folder / f"sound.{ending}"
    path.write_bytes(data)
    return path


def riff(
    samples: bytes, rate: int = 8000, channels: int = 1, bits: int = 16, size: int | None = None
) -> bytes:
    """A WAV file whose header may say anything."""
    block = channels * bits // 8
    each = rate * block & 0xFFFFFFFF
    form = struct.pack("<HHIIHH", 1, channels, rate, each, block, bits)
    size = len(samples) if size is None else size
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", (len(body) + size) & 0xFFFFFFFF) + body + samples


def correlation(a: Any, b: Any) -> float:
    size = min(len(a), len(b))
    return float(np.corrcoef(a[:size], b[:size])[0, 1])


def delay_of(late: Any, early: Any) -> int:
    """Samples, where the cross-correlation is highest."""
    size = 1 << (len(late) + len(early)).bit_length()
    product = np.fft.rfft(late, size) * np.conj(np.fft.rfft(early, size))
    found = int(np.fft.irfft(product).argmax())
    return found if found < size // 2 else found - size


def test_every_format_gives_what_its_header_says(maker: Any, tmp_path: Path) -> None:
    for ending, (_, _, rate) in maker.sounds.items():
        truth = maker.tone(SECONDS, rate)
        audio = Audio(stored(tmp_path, ending, maker.sound(ending, truth)))
        header = audio.header()
        assert (header.rate, header.channels) == (rate, 1), ending
        assert abs(header.samples - len(truth)) < 0.06 * rate, ending
        loaded = audio.load(LIMITS)
        assert loaded.rate == rate and loaded.samples.dtype == np.float32
        assert loaded.samples.shape == (header.samples,), ending
        if ending in maker.lossless:
            assert header.samples == len(truth)
            np.testing.assert_allclose(loaded.samples, truth, atol=1e-4, err_msg=ending)
        else:  # coders delay the sound by a frame at most, and change it a little
            delay = delay_of(loaded.samples, truth)
            assert 0 <= delay < 2200, ending
            assert correlation(loaded.samples[delay:], truth) > 0.97, ending
        assert len(audio.decode(wanted=AudioRequest(16_000))) == header.samples_at(16_000)


def test_a_cut_is_that_slice_of_the_whole(maker: Any, tmp_path: Path) -> None:
    for ending, (_, _, rate) in maker.sounds.items():
        if ending == "weba":  # its time stamps are whole milliseconds
            continue
        path = stored(tmp_path, ending, maker.sound(ending, maker.tone(SECONDS, rate)))
        whole = Audio(path).load(LIMITS).samples
        for start, end in [(0.0, 0.5), (0.3, 0.9), (3.3, 4.1), (5.0, None)]:
            cut = Audio(path, start=start, end=end)
            until = len(whole) if end is None else round(end * rate)
            expected = whole[round(start * rate) : until]
            assert cut.header().samples == len(expected), ending
            found = cut.load(LIMITS).samples
            assert np.abs(found - expected).mean() < 1e-3, f"{ending} {start}"
            if ending in maker.lossless:
                np.testing.assert_array_equal(found, expected)


def test_a_cut_decodes_only_its_part(
    maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path, "flac", maker.sound("flac", maker.tone(30, 44_100)))
    decoded = 0
    to_mono = sound.to_mono

    def counting(array: Any) -> Any:
        nonlocal decoded
        decoded += array.shape[1]
        return to_mono(array)

    monkeypatch.setattr(sound, "to_mono", counting)
    found = Audio(path, start=20, end=21).load(LIMITS).samples
    assert len(found) == 44_100 and decoded < 3.5 * 44_100


def test_the_header_decodes_nothing(maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = maker.sound("mp3", maker.tone(3, 44_100))
    monkeypatch.setattr(sound, "_blocks", lambda *_: pytest.fail("it was decoded"))
    assert abs(Audio(data).header().seconds - 3) < 0.1


def test_integers_are_scaled_and_channels_averaged(maker: Any) -> None:
    left = np.array([-32768, 0, 16384, 32767] * 50, "<i2")
    both = np.stack([left, np.zeros_like(left)], axis=1)
    found = Audio(riff(both.tobytes(), channels=2)).load(LIMITS).samples
    np.testing.assert_allclose(found[:4], [-0.5, 0, 0.25, 32767 / 65536], atol=1e-7)
    found = Audio(riff(bytes([0, 128, 255, 64] * 50), bits=8)).load(LIMITS).samples
    np.testing.assert_allclose(found[:4], [-1, 0, 127 / 128, -0.5], atol=1e-7)
    array = np.array([[-128, 64]], np.int8)
    np.testing.assert_allclose(Audio(array, rate=8000).decode(), [-1, 0.5])


def test_an_array_is_read_as_it_is(maker: Any) -> None:
    samples = maker.tone(0.5, 16_000)
    audio = Audio(np.stack([samples, -samples / 2]), rate=16_000, start=0.1, end=0.2)
    header = audio.header()
    assert (header.samples, header.rate, header.channels) == (1600, 16_000, 2)
    np.testing.assert_allclose(audio.decode(), samples[1600:3200] / 4, atol=1e-7)
    assert len(audio.decode(wanted=AudioRequest(22_050))) == header.samples_at(22_050)


@pytest.mark.parametrize(("rate", "wanted"), [(44_100, 16_000), (8000, 44_100), (48_000, 16_000)])
def test_usual_rates_are_resampled_by_torchaudio(maker: Any, rate: int, wanted: int) -> None:
    samples = maker.tone(0.7001, rate)
    expected = torchaudio.functional.resample(torch.from_numpy(samples), rate, wanted).numpy()
    np.testing.assert_array_equal(sound.resample(samples, rate, wanted), expected)


@pytest.mark.parametrize(("rate", "wanted"), [(44_101, 16_000), (11_027, 8000), (767_999, 16_001)])
def test_rates_without_a_common_factor_need_no_giant_filter(
    maker: Any, rate: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 0
    resample = torchaudio.functional.resample

    def watched(samples: Any, first: int, second: int) -> Any:
        nonlocal weights
        weights = first * second
        return resample(samples, first, second)

    monkeypatch.setattr(torchaudio.functional, "resample", watched)
    found = sound.resample(maker.tone(1, rate), rate, wanted)
    assert len(found) == -(-rate * wanted // rate) and weights < 10_000_000
    if rate > 8000:
        assert correlation(found, maker.tone(1, wanted)) > 0.999


def test_streams_without_a_length_are_counted(maker: Any, tmp_path: Path) -> None:
    samples = (maker.tone(2, 8000) * 30_000).astype("<i2").tobytes()
    for size in (0xFFFFFFFF, 0):
        header = Audio(riff(samples, size=size)).header()
        assert header.samples == 16_000, size
        assert Audio(riff(samples, size=size)).load(LIMITS).samples.shape == (16_000,)
    raw = maker.sound("mp3", maker.tone(2, 44_100), write_xing="0")
    assert abs(Audio(raw).header().seconds - 2) < 0.1


def test_an_ending_that_is_wrong_changes_nothing(maker: Any, tmp_path: Path) -> None:
    data = maker.sound("wav", maker.tone(1, 22_050))
    path = stored(tmp_path, "mp3", data)
    assert Audio(path).header() == Audio(data).header()
    np.testing.assert_array_equal(Audio(path).decode(), Audio(data).decode())


def test_the_sound_of_a_film_keeps_the_films_clock(maker: Any) -> None:
    """A track that begins half a second late is silent until then."""
    track = maker.tone(3, 48_000)
    film = maker.film("mp4", maker.pictures(84), track=track, track_after=0.5)
    found = Audio(film).decode()
    assert np.abs(found[: round(0.45 * 48_000)]).max() < 0.01
    assert max(correlation(found[24_000 + s :], track) for s in range(-64, 65, 4)) > 0.97
    cut = Audio(film, start=2.5, end=3.0).decode()
    np.testing.assert_allclose(cut, found[120_000:144_000], atol=1e-3)


def bad_files(folder: Path, maker: Any) -> dict[str, tuple[Any, str]]:
    """Case: (what stands for a sound, what the message must say)."""
    tone = maker.tone(3, 44_100)
    wav, flac, m4a = (maker.sound(ending, tone) for ending in ("wav", "flac", "m4a"))
    samples = bytes(16_000)
    texts = {"text.mp3": b"no sound at all " * 99, "empty.wav": b"", "zeros.wav": bytes(5000)}
    secret = stored(folder, "secret.wav", wav)
    texts["list.m3u8"] = f"#EXTM3U\n#EXTINF:3,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    texts["list.ffconcat"] = b"ffconcat version 1.0\nfile sound.secret.wav\n"
    texts["header.wav"] = wav[:44]
    texts["cut.wav"] = wav[: len(wav) // 2]
    texts["cut.flac"] = flac[: len(flac) // 2]
    mka = maker.sound("mka", maker.tone(3, 16_000))
    texts["cut.mka"] = mka[: len(mka) // 2]
    texts["cut.m4a"] = m4a[: len(m4a) // 2]
    texts["silent.mp4"] = maker.film("mp4", maker.pictures(5))
    texts["million.wav"] = riff(samples, size=0xF000_0000, rate=4200, bits=8)
    texts["still.wav"] = riff(samples, rate=0)
    texts["slow.wav"] = riff(samples, rate=1)
    texts["fast.wav"] = riff(samples, rate=4_000_000_000)
    texts["nothing.wav"] = riff(samples, channels=0)
    texts["nan.wav"] = maker.sound("float.wav", np.full(9000, np.nan, np.float32))
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    rules = {"empty.wav": "empty", "silent.mp4": "has none", "nan.wav": "finite",
             "cut.wav": "cut off", "million.wav": "cut off", "cut.mka": "cut off"}  # fmt: skip
    cases = {name: (folder / name, rules.get(name, "must")) for name in texts}
    cases["missing"] = (folder / "no.wav", "no such file")
    cases["directory"] = (folder, "a directory")
    cases["null byte"] = (folder / "a\0b.wav", "must")
    return cases


def test_every_bad_file_is_refused_by_name(maker: Any, tmp_path: Path) -> None:
    for case, (file, rule) in bad_files(tmp_path, maker).items():
        with pytest.raises(MediaError, match=rule) as caught:
            Audio(file).decode()
            pytest.fail(f"{case} was read")
        assert caught.value.origin.file == str(file), case
        assert str(file) in str(caught.value) and ";" in caught.value.message, case
        assert "\n" not in str(caught.value), case


def test_limits_are_checked_before_decoding(maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = maker.sound("wav", maker.tone(3, 22_050))
    monkeypatch.setattr(sound, "_blocks", lambda *_: pytest.fail("it was decoded"))
    for limits, rule in [
        (Limits(max_audio_seconds=2.9), "max_audio_seconds"),
        (Limits(max_audio_samples=60_000), "max_audio_samples"),
        (Limits(max_audio_bytes=1000), "max_audio_bytes"),
    ]:
        for read in (Audio(data).header, Audio(data).load):
            with pytest.raises(MediaError, match=rule):
                read(limits)
    assert Audio(data, start=1.0).header(Limits(max_audio_seconds=2.9)).seconds == 2


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"source": 12}, "int"),
        ({"source": np.zeros(9)}, "needs its rate"),
        ({"source": np.zeros((2, 2, 2)), "rate": 8000}, r"\(channels, samples\)"),
        ({"source": np.zeros((9000, 2)), "rate": 8000}, "transpose"),
        ({"source": np.zeros(0), "rate": 8000}, "must have samples"),
        ({"source": np.array(["a"]), "rate": 8000}, "integers or floats"),
        ({"source": "a.wav", "rate": 8000}, "leave out rate"),
        ({"source": "a.wav", "start": -1.0}, "start"),
        ({"source": "a.wav", "start": 2.0, "end": 2.0}, "end after it"),
        ({"source": "a.wav", "start": float("nan")}, "start"),
    ],
)
def test_what_cannot_be_a_sound_is_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(MediaError, match=rule):
        Audio(**arguments)


def test_a_cut_beyond_the_end_is_refused(maker: Any) -> None:
    data = maker.sound("wav", maker.tone(1, 22_050))
    assert Audio(data, end=9.0).header().seconds == 1
    with pytest.raises(MediaError, match=r"1 s long.*from 1 s"):
        Audio(data, start=1.0).header()


def test_parts_compare_hash_and_pickle(maker: Any) -> None:
    samples = maker.tone(0.1, 8000)
    assert Audio("a.wav") == Audio("a.wav") != Audio("a.wav", end=1.0)
    assert Audio(Path("a.wav")) != Audio("a.wav")
    assert Audio(samples, rate=8000) != Audio(samples.copy(), rate=8000)
    assert len({Audio("a.wav"), Audio("a.wav"), Audio("a.wav", start=1.0)}) == 2
    copy = pickle.loads(pickle.dumps(Audio(samples, rate=8000)))
    np.testing.assert_array_equal(copy.decode(), samples)
    assert Audio("a.wav").cut == "" != Audio("a.wav", end=1.0).cut != Audio("a.wav", end=2.0).cut


def test_the_digest_is_of_the_bytes_or_of_the_array(tmp_path: Path) -> None:
    data = riff(bytes(100))
    path = stored(tmp_path, "wav", data)
    assert Audio(path).digest() == Audio(data).digest() == hashlib.sha256(data).hexdigest()
    array = np.arange(8, dtype=np.float32)
    assert Audio(array, rate=8000).digest() != Audio(array, rate=8001).digest()
    assert Audio(array, rate=8000).digest() != Audio(array.reshape(2, 4), rate=8000).digest()
