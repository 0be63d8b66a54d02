"""Sounds and films for the unchanged tinker client, on a server of Plait.

    import tinker
    from plait.tinker_compat import audio_chunk, positions

    tokens = positions("http://127.0.0.1:8000", "my-model", audio=sound)
    chunk = audio_chunk(sound, tokens)          # stands in a tinker.ModelInput like any other
    prompt = tinker.ModelInput(chunks=[chunk, tinker.EncodedTextChunk(tokens=ids)])

The Tinker API's dmel chunk carries a tensor of which clients read the shape alone. Here it carries
the file, in as many rows as the model takes positions for it; see docs/tinker.md.
"""

from typing import Any

from plait.errors import ConfigError
from plait.service.wire.packing import packed


def audio_chunk(data: bytes, tokens: int, **options: Any) -> Any:
    """A sound, as a `tinker.types.DmelChunk`.

    Args:
        data: A file's bytes, in any format that Plait reads.
        tokens: Positions that the model takes for it; `positions` asks.
        options: `start` and `end` in seconds.
    """
    return _chunk("audio", data, tokens, options)


def video_chunk(data: bytes, tokens: int, **options: Any) -> Any:
    """A film, as a `tinker.types.DmelChunk`.

    Args:
        options: `start`, `end`, `sound` ("interleaved" or "after") and `sampling` (a dict of fps,
            max_frames or count), as of `plait.Video`.
    """
    return _chunk("video", data, tokens, options)


def _chunk(kind: str, data: bytes, tokens: int, options: dict[str, Any]) -> Any:
    from tinker.types import DmelChunk

    return DmelChunk(dmel=packed(kind, data, options, expected=tokens))


def positions(base_url: str, model: str, key: str | None = None, **media: bytes) -> int:
    """How many positions a model takes for a medium: `image=`, `audio=` or `video=`.

    Args:
        model: As the server offers it, or a run's id.
        key: $TINKER_API_KEY by default, as the tinker client has it.

    Raises:
        ConfigError: the server refuses, or more or less than one medium is given.
    """
    import base64
    import os

    import httpx

    if len(media) != 1 or next(iter(media)) not in ("image", "audio", "video"):
        raise ConfigError(f"name one medium, image=, audio= or video=; got {sorted(media)}")
    ((kind, data),) = media.items()
    key = key or os.environ.get("TINKER_API_KEY")
    part = {"type": kind, "data": base64.b64encode(data).decode()}
    body = {"model": model, "for_generation": True, "messages": [{"role": "user", "parts": [part]}]}
    answer = httpx.post(
        f"{base_url.rstrip('/')}/api/v1/render", json=body, timeout=120, trust_env=False,
        headers={"X-API-Key": key} if key else {},
    )  # fmt: skip
    said = answer.json()
    if answer.is_error:
        raise ConfigError(f"{base_url} refuses: {said.get('error')}")
    found = zip(said["pieces"], said["lengths"], strict=True)
    return sum(int(length) for piece, length in found if piece is None)
