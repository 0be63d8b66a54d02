"""Plait: fine-tune models that read text, images, audio and video.

Importing this package loads neither torch nor transformers; each public name is fetched from its
module the first time it is used.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any


def _unhide_packages_named_like_our_rooms() -> None:
    """Take a source checkout's root, and this folder, off `sys.path`.

    The root holds folders named `datasets` and `kernels`, which would hide the PyPI packages of
    those names. An installed copy has no `pyproject.toml` beside it and is left alone.
    """
    here = Path(__file__).resolve().parent
    if not (here.parent / "pyproject.toml").is_file():
        return
    hiding = {here, here.parent}
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in hiding]


_unhide_packages_named_like_our_rooms()

_HOMES = {
    "Message": "plait.stream",
    "Sample": "plait.stream",
    "Text": "plait.modalities",
    "Image": "plait.modalities",
    "Audio": "plait.modalities",
    "Video": "plait.modalities",
    "FrameSampling": "plait.modalities",
    "PlaitError": "plait.errors",
    "EncoderSpec": "plait.trainer.spec",
    "LoraSpec": "plait.trainer.spec",
    "ModelSpec": "plait.trainer.spec",
    "AdamParams": "plait.types",
    "AudioChunk": "plait.types",
    "VideoChunk": "plait.types",
    "Datum": "plait.types",
    "EncodedTextChunk": "plait.types",
    "ImageChunk": "plait.types",
    "ModelInput": "plait.types",
    "OptimizerParams": "plait.types",
    "SamplingParams": "plait.types",
    "TensorData": "plait.types",
    "SamplingClient": "plait.client",
    "ServiceClient": "plait.client",
    "TrainingClient": "plait.client",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from plait.client import SamplingClient as SamplingClient
    from plait.client import ServiceClient as ServiceClient
    from plait.client import TrainingClient as TrainingClient
    from plait.errors import PlaitError as PlaitError
    from plait.modalities import Audio as Audio
    from plait.modalities import FrameSampling as FrameSampling
    from plait.modalities import Image as Image
    from plait.modalities import Text as Text
    from plait.modalities import Video as Video
    from plait.stream import Message as Message
    from plait.stream import Sample as Sample
    from plait.trainer.spec import EncoderSpec as EncoderSpec
    from plait.trainer.spec import LoraSpec as LoraSpec
    from plait.trainer.spec import ModelSpec as ModelSpec
    from plait.types import AdamParams as AdamParams
    from plait.types import AudioChunk as AudioChunk
    from plait.types import Datum as Datum
    from plait.types import EncodedTextChunk as EncodedTextChunk
    from plait.types import ImageChunk as ImageChunk
    from plait.types import ModelInput as ModelInput
    from plait.types import OptimizerParams as OptimizerParams
    from plait.types import SamplingParams as SamplingParams
    from plait.types import TensorData as TensorData
    from plait.types import VideoChunk as VideoChunk


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'plait' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
