"""Projectors that join positions, and pools over time."""

from math import prod
from typing import Any

import pytest
import torch

from plait.encoders.base import Grid, Shape
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import Projector, create_pool, create_projector, pool_of
from plait.encoders.projectors.perceiver import sines
from plait.errors import ConfigError, UnknownNameError
from plait.stream import Encoded

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("stack", {}),
    ("stack", {"frames": 3}),
    ("stack", {"frames": 1}),
    ("conv", {}),
    ("conv", {"stride": 3, "kernel": 5}),
    ("conv", {"stride": 1, "kernel": 3}),
    ("perceiver", {"positions": 3}),
    ("perceiver", {"positions": 2, "per_row": True, "width": 24, "heads": 2, "layers": 1}),
]
GRIDS: list[Grid] = [(5, 1, 1), (1, 1, 1), (4, 2, 3), (1, 3, 3), (7, 1, 2), (2, 2, 3)]


def made(name: str, inputs: int = 10, outputs: int = 16, **options: Any) -> Projector:
    generator = torch.Generator().manual_seed(5)
    return create_projector(
        name, inputs, outputs, embedding_std=0.05, generator=generator, **options
    )


def items(grids: list[Grid], channels: int = 10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(prod(grid), channels, generator=generator) for grid in grids]


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_an_item_in_a_batch_equals_the_item_alone(name: str, options: dict[str, Any]) -> None:
    projector, features = made(name, **options), items(GRIDS)
    planned = [projector.plan(Shape(grid)).grid for grid in GRIDS]
    together = projector(torch.cat(features), GRIDS).split([prod(grid) for grid in planned])
    for item, grid, part in zip(features, GRIDS, together, strict=True):
        alone = projector(item, [grid])
        assert alone.shape == (prod(projector.plan(Shape(grid)).grid), 16)
        torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_another_item_changes_nothing_and_gives_no_gradient(
    name: str, options: dict[str, Any]
) -> None:
    projector, features = made(name, **options), items(GRIDS)
    features[2].requires_grad_()
    planned = [prod(projector.plan(Shape(grid)).grid) for grid in GRIDS]
    parts = projector(torch.cat(features), GRIDS).split(planned)
    sum(part.square().sum() for n, part in enumerate(parts) if n != 2).backward()
    assert features[2].grad is None or not features[2].grad.any()
    projector(torch.cat(features), GRIDS).split(planned)[2].square().sum().backward()
    assert features[2].grad is not None and features[2].grad.abs().sum(1).min() > 0


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_every_parameter_learns_and_nothing_read_gives_zeros(
    name: str, options: dict[str, Any], make_encoder: Any
) -> None:
    projector = made(name, inputs=6, **options)
    media = MediaEncoder(make_encoder().encoder, create_pool("keep"), projector)
    media.touch().backward()
    for parameter in projector.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    weights = torch.randn(1000, 16, generator=torch.Generator().manual_seed(2))
    out = projector(torch.cat(items(GRIDS, 6)), GRIDS)
    (out * weights[: len(out)]).sum().backward()
    for parameter_name, parameter in projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_outputs_start_with_the_embeddings_spread(name: str, options: dict[str, Any]) -> None:
    projector = made(name, 96, 192, **options)
    grids: list[Grid] = [(12, 2, 2)] * 12
    out = projector(3 * torch.cat(items(grids, 96)), grids)
    assert out.std().item() == pytest.approx(0.05, rel=0.15)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            projector.parameters(), made(name, 96, 192, **options).parameters(), strict=True
        )
    )


def test_stacked_rows_keep_their_order_and_the_first_time() -> None:
    projector = made("stack", 2, 8, frames=2)
    seen: list[torch.Tensor] = []
    projector.mlp.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr,operator]
    rows = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]])
    projector(rows.reshape(6, 2), [(3, 1, 2)])
    expected = [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 0, 0], [11, 12, 0, 0]]
    assert seen[0].tolist() == expected
    assert projector.plan(Shape((3, 1, 2), (0.0, 0.5, 1.0))) == ((2, 1, 2), (0.0, 1.0))


def test_the_convolution_equals_torchs_own() -> None:
    projector: Any = made("conv", 4, 8, stride=2, kernel=3)
    item = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    rows = projector.conv(projector.norm(item).T[None])[0].T
    expected = projector.mlp(torch.nn.functional.gelu(rows), [])
    torch.testing.assert_close(projector(item, [(5, 1, 1)]), expected)


def test_a_perceiver_knows_the_order_of_frames() -> None:
    projector = made("perceiver", positions=2)
    item = items([(4, 1, 1)])[0]
    forward, backward = projector(item, [(4, 1, 1)]), projector(item.flip(0), [(4, 1, 1)])
    assert not torch.allclose(forward, backward, atol=1e-3)
    per_row = made("perceiver", positions=2, per_row=True)
    shape = per_row.plan(Shape((4, 3, 3), (0.0, 1.0, 2.0, 3.0)))
    assert shape == ((4, 1, 2), (0.0, 1.0, 2.0, 3.0))
    assert projector.plan(Shape((4, 3, 3), (0.0, 1.0, 2.0, 3.0))) == ((1, 1, 2), (0.0,))
    assert len({tuple(row) for row in sines((3, 2, 2), 12).tolist()}) == 12


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("stack", {"frames": 0}, "at least 1; got 0"),
        ("conv", {"kernel": 4}, "odd"),
        ("conv", {"kernel": 3, "stride": 5}, "at least its stride"),
        ("perceiver", {"heads": 3, "width": 16}, "3 do not divide 16"),
        ("perceiver", {"positions": True}, "positions of projector 'perceiver'"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(name, **options)
    with pytest.raises(UnknownNameError, match="did you mean 'frames'"):
        made("stack", frame=2)


def test_time_rows_are_averaged_and_the_first_gives_the_time() -> None:
    rows = torch.arange(10.0).reshape(10, 1)
    pooled = create_pool("time", frames=2)(Encoded(rows, (rows * 2,), (5, 1, 2), (0, 1, 2, 3, 4)))
    assert pooled.embeddings.flatten().tolist() == [1, 2, 5, 6, 8, 9]
    assert pooled.layers[0].flatten().tolist() == [2, 4, 10, 12, 16, 18]
    assert pooled.grid == (3, 1, 2) and pooled.seconds == (0, 2, 4)
    with pytest.raises(ConfigError, match="got 0"):
        create_pool("time", frames=0)


@pytest.mark.parametrize("grid", [(1, 7, 7), (5, 4, 2), (6, 1, 1)])
def test_pools_join_and_keep_their_plan(grid: Grid) -> None:
    pool = pool_of((2, 2), 3)
    seconds = tuple(map(float, range(grid[0])))
    encoded = pool(Encoded(torch.randn(prod(grid), 4), (), grid, seconds))
    assert (encoded.grid, encoded.seconds) == tuple(pool.plan(Shape(grid, seconds)))
    assert len(encoded.embeddings) == prod(encoded.grid) and pool.width(4) == 4
    names = {pool_of(g, f).describe() for g in (None, (2, 2)) for f in (1, 2)}
    assert names == {"keep", "grid 2x2", "time 2", "grid 2x2, time 2"}
