"""Frozen means frozen, BatchNorm never trains, and a micro-batch without media still touches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.encoders.base import Encoder, Grid, Inputs, Shape
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import create_pool, create_projector
from plait.errors import ConfigError, DataError, ModelError, Origin, UnknownNameError
from plait.modalities import Image
from plait.stream import Encoded, ItemInputs


def loaded(encoder: Any, arrays: list[Any]) -> list[dict[str, torch.Tensor]]:
    return [encoder.encoder.process(array) for array in arrays]


def test_a_frozen_tower_stays_in_eval(make_encoder: Any, make_picture: Any) -> None:
    encoder = make_encoder().train()
    assert encoder.training and encoder.projector.training
    assert not any(module.training for module in encoder.encoder.modules())
    encoder.encoder.net.train()  # behind the encoder's back
    inputs = loaded(encoder, [make_picture(8, 8)])
    before = encoder.encoder.net[1].running_mean.clone()
    first, second = encoder.features(inputs)[0], encoder.features(inputs)[0]
    assert torch.equal(first.embeddings, second.embeddings)
    assert torch.equal(encoder.encoder.net[1].running_mean, before)


def test_a_frozen_tower_keeps_no_activations(make_encoder: Any, make_picture: Any) -> None:
    encoder = make_encoder().train()
    recorded: list[bool] = []
    encoder.encoder.net.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    features = encoder.features(loaded(encoder, [make_picture(8, 8)]))[0].embeddings
    assert recorded == [False]
    assert not features.requires_grad and features.grad_fn is None
    assert not any(p.requires_grad for p in encoder.encoder.parameters())
    encoder.project([Encoded(features, grid=(1, 2, 2))])[0].embeddings.sum().backward()
    assert all(p.grad is None for p in encoder.encoder.parameters())
    assert all(p.grad is not None for p in encoder.projector.parameters())


def test_a_trainable_tower_trains_but_its_batch_norm_does_not(
    make_encoder: Any, make_picture: Any
) -> None:
    encoder = make_encoder(trainable=True).train()
    norm, dropout = encoder.encoder.net[1], encoder.encoder.net[2]
    assert dropout.training and not norm.training
    before = norm.running_mean.clone()
    items = [ItemInputs(inputs) for inputs in loaded(encoder, [make_picture(8, 8)])]
    encoder(items)[0].embeddings.sum().backward()
    assert torch.equal(norm.running_mean, before)
    assert all(p.grad is not None for p in encoder.parameters())
    with torch.no_grad():
        assert not encoder(items)[0].embeddings.requires_grad
    encoder.eval()
    assert not dropout.training


@pytest.mark.parametrize("trainable", [False, True])
def test_touch_reaches_every_trainable_parameter(make_encoder: Any, trainable: bool) -> None:
    encoder = make_encoder(trainable=trainable).train()
    with torch.no_grad():
        next(encoder.projector.parameters()).fill_(float("inf"))
        next(encoder.encoder.parameters()).fill_(float("inf"))
    assert encoder.project([]) == [] and encoder.features([]) == []
    total = encoder.touch()
    assert total.shape == () and total.item() == 0
    total.backward()
    for parameter in encoder.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or not parameter.grad.any()


def test_the_projector_is_entered_once(make_encoder: Any, make_picture: Any) -> None:
    encoder = make_encoder()
    entered: list[int] = []
    encoder.projector.register_forward_hook(lambda *_: entered.append(1))
    arrays = [make_picture(8, 8, 1), make_picture(4, 12, 2), make_picture(8, 4, 3)]
    inputs = loaded(encoder, arrays)
    cached = encoder.features(inputs[1:2])[0]
    items = [ItemInputs(inputs[0]), ItemInputs(features=cached), ItemInputs(inputs[2])]
    together = encoder(items)
    assert len(entered) == 1
    for item, made, array in zip(inputs, together, arrays, strict=True):
        plan = encoder.plan(Image(array), Origin())
        assert made.grid == plan.grid and len(made.embeddings) == plan.length
        torch.testing.assert_close(made.embeddings, encoder([ItemInputs(item)])[0].embeddings)
    encoder.touch()
    assert len(entered) == 5


def test_an_item_without_anything_is_refused(make_encoder: Any) -> None:
    with pytest.raises(ModelError, match="neither inputs nor features"):
        make_encoder()([ItemInputs()])


def test_a_plan_names_the_row(make_encoder: Any) -> None:
    with pytest.raises(DataError, match="dataset d, row 3, file") as caught:
        make_encoder().plan(Image(b"no picture"), Origin("d", 3))
    assert caught.value.origin.file


def test_another_medium_is_refused(make_encoder: Any, make_picture: Any) -> None:
    encoder = make_encoder()
    encoder.encoder.medium = "audio"
    with pytest.raises(DataError, match="reads audio; it was given image"):
        encoder.plan(Image(make_picture(4, 4)), Origin("d", 1))


def test_the_fingerprint_changes_with_what_it_says(make_encoder: Any) -> None:
    encoder = make_encoder()
    first = encoder.fingerprint()
    assert first == encoder.fingerprint()
    pooled = make_encoder(pool="grid", height=2, width=2)
    pooled.encoder.load_state_dict(encoder.encoder.state_dict())
    assert pooled.fingerprint() != first
    assert pooled.encoder.fingerprint() == encoder.encoder.fingerprint()
    encoder.encoder.net[0].bias.data[0] += 1e-3
    assert encoder.fingerprint() != first
    assert encoder.encoder.double().fingerprint() != encoder.encoder.float().fingerprint()


def test_the_grid_pool_pools_frames_and_layers() -> None:
    pool = create_pool("grid", height=2, width=3)
    rows = torch.randn(2 * 4 * 6, 5, generator=torch.Generator().manual_seed(0))
    made = pool(Encoded(rows, (rows * 2,), (2, 4, 6), (0.0, 0.5)))
    expected = rows.view(2, 2, 2, 3, 2, 5).mean(dim=(2, 4)).view(-1, 5)
    torch.testing.assert_close(made.embeddings, expected)
    torch.testing.assert_close(made.layers[0], expected * 2)
    assert made.grid == pool.plan(Shape((2, 4, 6))).grid == (2, 2, 3) and made.seconds == (0.0, 0.5)


@pytest.mark.parametrize("grid", [(1, 7, 7), (1, 1, 1), (3, 2, 5)])
def test_the_grid_pool_keeps_its_plan(grid: tuple[int, int, int]) -> None:
    pool = create_pool("grid", height=3, width=3)
    made = pool(Encoded(torch.randn(grid[0] * grid[1] * grid[2], 4), grid=grid))
    assert made.grid == pool.plan(Shape(grid)).grid and len(made.embeddings) == grid[0] * 9


@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_projectors_start_with_the_embeddings_spread(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    projector = create_projector(name, 320, 192, embedding_std=0.05, generator=generator)
    out = projector(torch.randn(400, 320, generator=generator), [])
    assert out.shape == (400, 192)
    assert out.std().item() == pytest.approx(0.05, rel=0.1)
    again = create_projector(
        name, 320, 192, embedding_std=0.05, generator=torch.Generator().manual_seed(3)
    )
    for a, b in zip(projector.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_names_and_options_are_checked() -> None:
    generator = torch.Generator()
    with pytest.raises(UnknownNameError, match="did you mean 'mlp'"):
        create_projector("mpl", 4, 4, embedding_std=1, generator=generator)
    with pytest.raises(ConfigError, match="identity"):
        create_projector("identity", 4, 5, embedding_std=1, generator=generator)
    with pytest.raises(UnknownNameError, match="did you mean 'grid'"):
        create_pool("gird", height=3, width=3)
    with pytest.raises(ConfigError, match="does not take"):
        create_pool("grid", rows=3)
    with pytest.raises(ConfigError, match="0 x 3"):
        create_pool("grid", height=0, width=3)


def test_identity_has_nothing_to_touch(make_encoder: Any, make_picture: Any) -> None:
    encoder = make_encoder()
    encoder.projector = create_projector(
        "identity", 6, 6, embedding_std=1, generator=torch.Generator()
    )
    assert encoder.touch().item() == 0 and not encoder.touch().requires_grad
    features = encoder.features(loaded(encoder, [make_picture(8, 8)]))
    assert torch.equal(encoder.project(features)[0].embeddings, features[0].embeddings)


class Cells(Encoder):
    """Means of cells of 4 x 4 pixels: a tower without parameters."""

    medium = "image"
    width = 3

    def plan(self, header: Any) -> Grid:
        return 1, header.height // 4, header.width // 4

    def process(self, array: NDArray[np.uint8]) -> dict[str, Tensor]:
        return {"pixels": torch.from_numpy(array).permute(2, 0, 1).float() / 255}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        grids = [torch.nn.functional.avg_pool2d(item["pixels"], 4) for item in inputs]
        return [Encoded(grid.flatten(1).T, grid=(1, *grid.shape[1:])) for grid in grids]

    def processing(self) -> str:
        return "means of 4 x 4"


def test_a_tower_may_have_no_parameters(make_picture: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    projector = create_projector("linear", 3, 8, embedding_std=0.1, generator=generator)
    encoder = MediaEncoder(Cells("cells"), create_pool("keep"), projector)
    encoder.touch().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in projector.parameters())
    [encoded] = encoder([ItemInputs(encoder.encoder.process(make_picture(8, 12)))])
    assert encoded.embeddings.shape == (6, 8)
    assert encoder.encoder.dtype == torch.float32
    assert len(encoder.fingerprint()) == 64
