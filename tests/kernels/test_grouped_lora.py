"""Grouped LoRA against float64: rows of every kind of stretch, ranks mixed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plait.kernels.grouped_lora import Segments, grouped_lora, grouped_lora_linear, naive

RANKS = [1, 4, 8, 16, 17]
SCALES = [2.0, 0.5, 1.0, -1.5, 0.25]

Row = tuple[list[tuple[int, int]], list[int | None], int]
CASES: dict[str, Row] = {
    "one adapter over all": ([(0, 37)], [2], 37),
    "every adapter once": ([(0, 9), (9, 30), (30, 31), (31, 70), (70, 77)], [0, 1, 2, 3, 4], 77),
    "scattered and in any order": (
        [(0, 5), (5, 11), (11, 12), (12, 20), (20, 41), (41, 43)], [3, 0, 3, 4, 0, 3], 43,
    ),
    "many short stretches": ([(i, i + 1) for i in range(90)], [i % 3 for i in range(90)], 90),
    "neighbours of one adapter": ([(0, 3), (3, 8), (8, 8), (8, 15)], [1, 1, 4, 1], 15),
    "base alone between": ([(0, 4), (4, 10), (10, 13)], [0, None, 4], 13),
    "gaps at both ends": ([(3, 8), (9, 12)], [1, 1], 20),
    "adapters at both ends only": ([(0, 2), (28, 30)], [4, 0], 30),
    "empty stretches": ([(0, 0), (0, 6), (6, 6), (9, 9)], [0, 1, 2, 3], 9),
    "one position": ([(0, 1)], [4], 1),
    "no adapter at all": ([(0, 7)], [None], 7),
    "no position at all": ([], [], 0),
    "long enough to be read in place": (
        [(0, 100), (100, 230), (230, 300), (300, 391)], [3, 2, 3, 2], 391,
    ),
}  # fmt: skip


class Inputs:
    """Random x, base and factors for the five adapters."""

    def __init__(
        self, length: int, inputs: int = 19, outputs: int = 33, dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(length)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.x = draw(length, inputs).to(dtype).requires_grad_()
        self.base = draw(length, outputs).to(dtype).requires_grad_()
        self.a = [(draw(rank, inputs) / 4).requires_grad_() for rank in RANKS]
        self.b = [(draw(outputs, rank) / 4).requires_grad_() for rank in RANKS]
        self.seed = draw(length, outputs).to(dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.base, *self.a, *self.b]

    def run(self, segments: Segments, route: str = "cpu") -> tuple[Tensor, list[Tensor | None]]:
        out = grouped_lora(self.x, self.base, self.a, self.b, SCALES, segments, route)
        return out, self.gradients(out)

    def gradients(self, out: Tensor) -> list[Tensor | None]:
        total = (out * self.seed).sum()
        return list(torch.autograd.grad(total, self.leaves, allow_unused=True))


def close(have: Tensor, want: Tensor, tolerance: float) -> None:
    assert have.isfinite().all()
    difference = (have.double() - want.double()).norm()
    assert difference <= tolerance * want.double().norm() + 1e-12


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_definition(name: str) -> None:
    bounds, adapters, length = CASES[name]
    inputs = Inputs(length)
    out, have = inputs.run(Segments(bounds, adapters, length))
    expected = naive.grouped_lora(
        inputs.x, inputs.base, inputs.a, inputs.b, SCALES, bounds, adapters
    )
    close(out, expected, 1e-6)
    for leaf, mine, true in zip(inputs.leaves, have, inputs.gradients(expected), strict=True):
        assert mine is not None, "an adapter without positions has a gradient: zero"
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        close(mine, torch.zeros_like(leaf) if true is None else true, 1e-6)


def test_an_adapter_without_positions_has_a_gradient_of_exact_zero() -> None:
    inputs = Inputs(12)
    _, found = inputs.run(Segments([(0, 12)], [3], 12))
    for g in (0, 1, 2, 4):
        for gradient in (found[2 + g], found[2 + len(RANKS) + g]):
            assert gradient is not None and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_row_keeps_float32_factors_and_rounds_once(dtype: torch.dtype) -> None:
    bounds, adapters, length = CASES["scattered and in any order"]
    inputs = Inputs(length, dtype=dtype)
    out, have = inputs.run(Segments(bounds, adapters, length))
    expected = naive.grouped_lora(
        inputs.x, inputs.base, inputs.a, inputs.b, SCALES, bounds, adapters
    )
    assert out.dtype == dtype
    assert (out == expected.to(dtype)).float().mean() > 0.99, "one rounding of the exact sum"
    for leaf, mine, true in zip(inputs.leaves, have, inputs.gradients(expected), strict=True):
        assert mine is not None and mine.dtype == leaf.dtype
        value = torch.zeros_like(leaf) if true is None else true
        close(mine, value, 5e-3 if leaf.dtype == dtype else 1e-6)


def test_repetitions_give_the_same_bits() -> None:
    bounds, adapters, length = CASES["scattered and in any order"]
    runs = [Inputs(length).run(Segments(bounds, adapters, length)) for _ in range(3)]
    for out, found in runs[1:]:
        assert torch.equal(out, runs[0][0])
        for mine, first in zip(found, runs[0][1], strict=True):
            assert mine is not None and first is not None and torch.equal(mine, first)


@pytest.mark.parametrize("bias", [False, True])
def test_over_a_frozen_weight_it_is_the_same_operation(bias: bool) -> None:
    bounds, adapters, length = CASES["base alone between"]
    segments = Segments(bounds, adapters, length)
    inputs = Inputs(length)
    weight = torch.randn(33, 19, generator=torch.Generator().manual_seed(5))
    added = torch.randn(33) if bias else None
    base = torch.nn.functional.linear(inputs.x, weight, added)
    want = grouped_lora(inputs.x, base, inputs.a, inputs.b, SCALES, segments)
    have = grouped_lora_linear(inputs.x, weight, added, inputs.a, inputs.b, SCALES, segments)
    close(have, want, 1e-6)
    for mine, true in zip(inputs.gradients(have), inputs.gradients(want), strict=True):
        assert (mine is None) == (true is None)
        if mine is not None and true is not None:
            close(mine, true, 1e-6)


def test_a_base_that_trains_is_refused_where_it_would_get_no_gradient() -> None:
    inputs = Inputs(4)
    weight, bias = torch.randn(33, 19), torch.randn(33)
    rest: list[Any] = [inputs.a, inputs.b, SCALES, Segments([(0, 4)], [0], 4)]
    with pytest.raises(ValueError, match="must be frozen"):
        grouped_lora_linear(inputs.x, weight.requires_grad_(), bias, *rest)
    with pytest.raises(ValueError, match="must be frozen"):
        grouped_lora_linear(inputs.x, weight.detach(), bias.requires_grad_(), *rest)


def test_frozen_inputs_get_no_gradient_and_the_others_theirs() -> None:
    bounds, adapters, length = CASES["every adapter once"]
    segments = Segments(bounds, adapters, length)
    whole = Inputs(length).run(segments)[1]
    for kept in range(len(whole)):
        inputs = Inputs(length)
        for number, leaf in enumerate(inputs.leaves):
            leaf.requires_grad_(number == kept)
        out = grouped_lora(inputs.x, inputs.base, inputs.a, inputs.b, SCALES, segments)
        (found,) = torch.autograd.grad((out * inputs.seed).sum(), [inputs.leaves[kept]])
        assert torch.equal(found, whole[kept]) if whole[kept] is not None else False


def test_the_arguments_are_left_as_they_were() -> None:
    inputs = Inputs(20)
    before = [leaf.detach().clone() for leaf in inputs.leaves]
    inputs.run(Segments([(0, 20)], [1], 20))
    for leaf, value in zip(inputs.leaves, before, strict=True):
        assert torch.equal(leaf, value)


def test_neighbours_of_one_adapter_are_one_product() -> None:
    segments = Segments([(0, 3), (3, 8), (8, 8), (8, 15), (17, 18)], [1, 1, 4, 1, None], 20)
    (group,) = segments.groups
    assert segments.sizes == (15, 5) and group.pieces == (0,) and group.places == 15


def test_rows_that_are_not_contiguous_and_a_gradient_that_is_expanded() -> None:
    inputs = Inputs(30)
    segments = Segments([(0, 30)], [4], 30)
    wide = torch.cat([inputs.x, inputs.x], 1).detach()[:, :19].requires_grad_()
    out = grouped_lora(wide, inputs.base, inputs.a, inputs.b, SCALES, segments)
    (have,) = torch.autograd.grad(out.sum(), [wide])
    out = grouped_lora(inputs.x, inputs.base, inputs.a, inputs.b, SCALES, segments)
    (want,) = torch.autograd.grad((out * torch.ones_like(out)).sum(), [inputs.x])
    assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    inputs = Inputs(391, dtype=dtype)
    weight = torch.randn(33, 19, generator=torch.Generator().manual_seed(5)).to(dtype)
    bounds, adapters, length = CASES["long enough to be read in place"]
    rest: list[Any] = [inputs.a, inputs.b, SCALES, Segments(bounds, adapters, length)]

    def found() -> list[Tensor]:
        out = grouped_lora_linear(inputs.x, weight, None, *rest)
        leaves = [inputs.x, *inputs.a, *inputs.b]
        return [out, *torch.autograd.grad(out, leaves, inputs.seed)]

    want = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        have = found()
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize(
    ("bounds", "adapters", "rule"),
    [
        ([(0, 4), (3, 5)], [0, 0], "without overlap"),
        ([(4, 6), (0, 3)], [0, 0], "row order"),
        ([(0, 11)], [0], r"inside 0\.\.10"),
        ([(0, 4)], [0, 1], "1 stretches and 2 numbers"),
        ([(0, 4)], [-1], "numbered from 0"),
    ],
)
def test_stretches_that_break_the_rule_are_refused(
    bounds: list[tuple[int, int]], adapters: list[int], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        Segments(bounds, adapters, 10)


def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs = Inputs(6)
    segments = Segments([(0, 6)], [4], 6)
    good: list[Any] = [inputs.x, inputs.base, inputs.a, inputs.b, SCALES, segments]
    changes: list[tuple[int, Any, str]] = [
        (0, inputs.x[:5], "as many positions"),
        (1, inputs.base[:, :9], r"b\[0\] \(9, rank\)"),
        (2, inputs.a[:4], "every adapter needs"),
        (2, inputs.a[::-1], r"a\[0\] must be"),
        (4, SCALES[:2], "every adapter needs"),
    ]
    for at, value, rule in changes:
        with pytest.raises(ValueError, match=rule):
            grouped_lora(*[*good[:at], value, *good[at + 1 :]])
    with pytest.raises(ValueError, match="a route of grouped LoRA is one of cpu, triton"):
        grouped_lora(*good, route="gpu")
