"""The media: what each is in a sample, how its header is read, how it becomes an array.

One file per medium. A new medium subclasses `MediaPart`; nothing outside its file needs to know
its formats.
"""

from plait.modalities.audio import Audio, AudioHeader, AudioRequest
from plait.modalities.image import Image, ImageHeader
from plait.modalities.limits import Limits
from plait.modalities.part import MediaHeader, MediaPart, Part
from plait.modalities.sources import FileSlice
from plait.modalities.text import Text
from plait.modalities.video import Frames, FrameSampling, Video, VideoHeader

__all__ = [
    "Audio",
    "AudioHeader",
    "AudioRequest",
    "FileSlice",
    "FrameSampling",
    "Frames",
    "Image",
    "ImageHeader",
    "Limits",
    "MediaHeader",
    "MediaPart",
    "Part",
    "Text",
    "Video",
    "VideoHeader",
]
