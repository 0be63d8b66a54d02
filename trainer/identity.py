"""What a checkpoint must find again: the language model, the renderer, encoders, preprocessing."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from plait.encoders.layouts.plain import PlainLayout
from plait.encoders.media_encoder import MediaEncoder
from plait.errors import RenderError
from plait.modalities import Text
from plait.stream import Layout, Message, Sample, render
from plait.trainer.spec import ModelSpec

TURNS = (
    ("user", "Which one is it?"),
    ("assistant", "The second, I think."),
    ("user", " Why?\n"),
    ("assistant", "It is blue."),
)
"""A conversation whose rendering stands for that of all others."""


def text_hash(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def hashes_of(
    language: str, tokenizer: Any, layout: Layout, encoders: Mapping[str, MediaEncoder]
) -> dict[str, str]:
    """Hashes by what they are of: `language`, `template`, `renderer`, `encoder:<name>`,
    `preprocessing:<name>`.

    Args:
        language: That of the language model's files.
        encoders: By name, before anything of them has trained.
    """
    hashes = {
        "language": language,
        "template": text_hash(tokenizer.chat_template or ""),
        "renderer": renderer_hash(tokenizer, layout),
    }
    for name, encoder in encoders.items():
        hashes[f"encoder:{name}"] = encoder.fingerprint()
        hashes[f"preprocessing:{name}"] = text_hash(encoder.encoder.processing())
    return hashes


def renderer_hash(tokenizer: Any, layout: Layout) -> str:
    """SHA-256 of what renders: of the tokens and weights it really makes, not of its code.

    A tokenizer, a template or a version of ours that writes a row otherwise has another hash, and
    one that only looks otherwise has the same.
    """
    stamped = sorted(layout.timestamped) if isinstance(layout, PlainLayout) else []
    facts = [type(layout).__name__, layout.placeholder_id, sorted(layout.banned_ids), stamped]
    digest = hashlib.sha256(json.dumps(facts).encode())
    probe = Sample(messages=tuple(Message(role, (Text(text),)) for role, text in TURNS))
    try:
        document = render(probe, tokenizer, layout)
    except RenderError:  # of a model without a template, which reads bare texts
        digest.update(np.array(tokenizer("It is blue.").input_ids).tobytes())
    else:
        for row in (document.token_ids, document.targets, document.weights):
            digest.update(row.tobytes())
    return digest.hexdigest()


def preprocessing_of(spec: ModelSpec, encoders: Mapping[str, MediaEncoder]) -> dict[str, Any]:
    """How each medium is read, as plain JSON: what somebody who serves the model must do, too."""
    return {
        medium: {
            **asdict(encoder),
            "processing": encoders[encoder.name].encoder.processing(),
            "pool": encoders[encoder.name].pool.describe(),
        }
        for medium, encoder in spec.encoders.items()
    }
