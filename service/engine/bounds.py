"""How much a loss of one's own may compute: what each operation will make is known before it does.

Under `Bounded` torch asks before every operation, those inside `einsum` and those of the backward
pass too. Its shapes are taken from a run on tensors without content.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from plait.errors import ConfigError

MOST_VALUES = 1 << 24
"""Of one tensor, views included."""

MOST_BYTES = 1 << 29
"""Of all that is made for one datum, forward and backward."""

MOST_WORK = 1 << 34
"""Values read, written or multiplied in one call: seconds of one core."""

LEAST_WORK = 1 << 14
"""Of an operation, however small: to begin one takes as long as so many values."""

MOST_PARTS = 4096
"""Into which a tensor is split."""

_PARTS = ("aten::unbind", "aten::split", "aten::split_with_sizes", "aten::chunk")
_COMMON = """alias amax amin clone cumsum detach empty_like full_like logsumexp mean ones_like
permute select slice sort squeeze sum t transpose unsqueeze var view zeros_like _softmax
_log_softmax _unsafe_view"""
_NO_LARGER = frozenset(f"aten::{name}" for name in _COMMON.split())
"""Of which no result is larger than what is read: the most common ones, asked for nothing."""

_SCALARS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")


class Budget:
    """What is left of a call's work."""

    def __init__(self, work: int = MOST_WORK) -> None:
        self._left = work

    def spend(self, work: int) -> None:
        """
        Raises:
            ConfigError: it is used up.
        """
        self._left -= work
        if self._left < 0:
            raise ConfigError(
                "a custom loss computes too much for one call; send less data at once"
            )


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations whose results are too large, before they are made.

    Args:
        budget: Of the call; the bytes are those of this mode's lifetime.
    """

    def __init__(self, budget: Budget) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._budget, self._bytes = budget, MOST_BYTES

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, pointwise, view = _facts(func)
        if name not in _SCALARS:
            tensors = _tensors((*args, *kwargs.values()))
            if name in _PARTS:
                _check_parts(name, args, kwargs)
            read = max([one.numel() for one in tensors], default=0)
            if pointwise and tensors:
                made = [(_broadcast([one.shape for one in tensors]), 8)]
            elif name in _NO_LARGER:
                made = [(read, 8)]
            else:
                made = _made(func, name, args, kwargs, tensors)
            self._charge(made, view)
            work = _work(name, args, max(read, sum(size for size, _ in made)))
            self._budget.spend(max(work, LEAST_WORK))
        return func(*args, **kwargs)

    def _charge(self, made: Sequence[tuple[int, int]], view: bool) -> None:
        for values, size in made:
            if values > MOST_VALUES:
                raise ConfigError(
                    f"a tensor of a custom loss has up to {MOST_VALUES} values; this would have "
                    f"{values}"
                )
            self._bytes -= 0 if view else values * size
        if self._bytes < 0:
            raise ConfigError(
                f"a custom loss makes up to {MOST_BYTES} bytes of tensors for each datum"
            )


@functools.cache
def _facts(func: Any) -> tuple[str, bool, bool]:
    """An operation's name, whether it works value by value, and whether it makes nothing new."""
    return func._schema.name, torch.Tag.pointwise in func.tags, func.is_view


def _tensors(given: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for one in given:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += _tensors(one)
    return found


def _made(
    func: Any, name: str, args: Any, kwargs: Mapping[str, Any], tensors: Sequence[Tensor]
) -> list[tuple[int, int]]:
    """Values of each result, and the bytes of one of them."""
    if name == "aten::index" and _one_mask(args[1]):
        return [(tensors[0].numel(), tensors[0].element_size())]

    def bare(one: Any) -> Any:
        if isinstance(one, Tensor):
            return torch.empty_strided(one.size(), one.stride(), dtype=one.dtype, device="meta")
        return torch.device("meta") if isinstance(one, torch.device) else one

    try:
        results = func(*tree_map(bare, args), **tree_map(bare, _on_meta(func, kwargs)))
    except NotImplementedError:  # the size of the result depends on the values
        shapes = [one.shape for one in tensors]
        return [(_broadcast(shapes) * max([1, *map(len, shapes)]), 8)]
    results = results if isinstance(results, (list, tuple)) else (results,)
    return [(one.numel(), one.element_size()) for one in _tensors(results)]


def _broadcast(shapes: Sequence[Sequence[int]]) -> int:
    """Values of what these shapes make together; torch says itself where they do not fit."""
    sizes = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for place, size in enumerate(reversed(shape)):
            sizes[place] = size if sizes[place] == 1 else max(sizes[place], size)
    return math.prod(sizes)


def _on_meta(func: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Factories follow no tensor: they are told where."""
    takes_device = any(argument.name == "device" for argument in func._schema.arguments)
    return {**kwargs, "device": torch.device("meta")} if takes_device else dict(kwargs)


def _one_mask(indices: Sequence[Tensor | None]) -> bool:
    there = [one for one in indices if one is not None]
    return len(there) == 1 and there[0].dtype in (torch.bool, torch.uint8)


def _check_parts(name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
    """That a split gives few parts: each is an object, however small."""
    tensor, given = args[0], list(args[1:])
    sized = name != "aten::unbind"
    how = given.pop(0) if sized else None
    dim = given[0] if given else kwargs.get("dim", 0)
    length = tensor.shape[dim] if tensor.ndim else 1
    if isinstance(how, (list, tuple)):
        parts = len(how)
    elif name == "aten::chunk":
        parts = min(int(how or 1), length)
    else:
        parts = -(-length // max(int(how or 1), 1))
    if parts > MOST_PARTS:
        raise ConfigError(f"a custom loss splits a tensor into up to {MOST_PARTS} parts")


def _work(name: str, args: Any, values: int) -> int:
    """Values that are read, written or multiplied."""
    if name in ("aten::mm", "aten::bmm"):
        return max(values, int(args[0].numel() * args[1].shape[-1]))
    if name in ("aten::addmm", "aten::baddbmm"):
        return max(values, int(args[1].numel() * args[2].shape[-1]))
    return max(values, 1)
