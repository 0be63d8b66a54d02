"""peft's LoRA layers over a packed row whose documents use different adapters of one model.

The adapters are ordinary peft adapters (`add_adapter`, `inject_adapter_in_model`): names, tensors
and files stay peft's. Only the layers' forward is replaced, and `GroupedLora.remove` puts peft's
back. A layer that the grouped kernel cannot compute runs peft's own forward on each stretch.

Shape letters: T positions of the row, I inputs, O outputs of a layer.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from plait.errors import ModelError
from plait.kernels.grouped_lora import Segments, grouped_lora, grouped_lora_linear


class Stretches:
    """Which adapter each document of a row uses.

    Args:
        names: Each document's adapter, or None for the base alone.
        bounds: Each document's (start, stop), in row order.
        length: T; the last document's end where it is not given.

    Raises:
        ValueError: documents that overlap, or are not as many as `names`.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        bounds: Sequence[tuple[int, int]],
        length: int | None = None,
    ) -> None:
        last = bounds[-1][1] if bounds else 0
        self.length = last if length is None else length
        self.documents = list(zip(bounds, names, strict=True))
        self.adapters = tuple(dict.fromkeys(name for name in names if name is not None))
        self._segments: dict[tuple[str, ...], Segments] = {}
        self.segments(self.adapters)  # refuses now what would fail in the first layer

    def segments(self, adapters: tuple[str, ...]) -> Segments:
        """For a layer that has only these `adapters`, which are numbered in that order."""
        if adapters not in self._segments:
            number = {name: at for at, name in enumerate(adapters)}
            bounds = [bound for bound, _ in self.documents]
            numbers = [None if name is None else number.get(name) for _, name in self.documents]
            self._segments[adapters] = Segments(bounds, numbers, self.length)
        return self._segments[adapters]

    def covering(self, joined: bool) -> Iterator[tuple[int, int, str | None]]:
        """(start, stop, adapter) over the whole row in order, gaps too; neighbours if `joined`."""
        pieces: list[tuple[int, int, str | None]] = []
        at = 0
        for (start, stop), name in [*self.documents, ((self.length, self.length), None)]:
            if at < start:
                pieces.append((at, start, None))
            if start < stop:
                pieces.append((start, stop, name))
            at = stop
        for number in range(len(pieces) - 1, 0, -1):
            (start, stop, name), after = pieces[number - 1], pieces[number]
            if joined and name == after[2]:
                pieces[number - 1 : number + 1] = [(start, after[1], name)]
        yield from pieces


class GroupedLora:
    """Replaces the forward of every LoRA layer of `model` until `remove`, or the end of `with`.

    Which adapter a position uses is said per row; rows that nobody says it for run peft's own
    forward:

        with GroupedLora(model) as adapters:
            with adapters.on(stream.run, stream.bounds, stream.length):
                model.compute(stream).loss.backward()

    The layers ask this object, not a context variable: gradient checkpointing runs a forward again
    inside `backward`, which on a GPU is another thread's. Such a backward belongs inside `on`. One
    row at a time.

    Args:
        model: Holds peft's layers; adapters that train must have `requires_grad`, which peft
            switches off for all but the active one.

    Raises:
        ModelError: a peft layer of another method, or a copy of whole modules or token rows per
            adapter, which would follow the active adapter instead of the row.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._current: Stretches | None = None
        self._layers: list[tuple[Any, Any]] = []
        """Each layer, and the forward that it had of its own, not of its class."""

        self._described: set[int] = set()
        """Layers whose last forward, but for those that checkpointing repeats, was inside `on`."""

        self._said: set[tuple[str, str]] = set()
        self._known: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Look again which layers have which adapters, after one was added or removed."""
        from peft.tuners.lora.layer import LoraLayer

        replaced = {id(layer) for layer, _ in self._layers}
        adapters: set[str] = set()
        for name, module in self._model.named_modules():
            _check_layer(name, module)
            if isinstance(module, LoraLayer):
                layer: Any = module
                adapters.update(layer.lora_A.keys(), layer.lora_embedding_A.keys())
                if id(layer) not in replaced:
                    self._layers.append((layer, layer.__dict__.get("forward")))
                    layer.forward = functools.partial(self._forward, layer, name, layer.forward)
        self._known = adapters

    def remove(self) -> None:
        """Give every layer its own forward back; harmless twice."""
        while self._layers:
            layer, own = self._layers.pop()
            del layer.forward
            if own is not None:
                layer.forward = own

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @contextmanager
    def on(
        self,
        names: Sequence[str | None],
        bounds: Sequence[tuple[int, int]],
        length: int | None = None,
    ) -> Iterator[Stretches]:
        """Rows inside of this have these documents; see `Stretches`.

        Raises:
            ModelError: no layer has an adapter of that name.
        """
        stretches = Stretches(names, bounds, length)
        if not self._known.issuperset(stretches.adapters):
            self.refresh()
        unknown = [name for name in stretches.adapters if name not in self._known]
        if unknown:
            raise ModelError(
                f"no LoRA layer has an adapter {unknown[0]!r}; known: "
                f"{', '.join(sorted(self._known)) or 'none'}; add it with add_adapter"
            )
        before, self._current = self._current, stretches
        try:
            yield stretches
        finally:
            self._current = before

    def _forward(
        self,
        layer: Any,
        name: str,
        own: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        row = self._current
        self._check_recomputed(layer, name, row)
        if row is None or layer.disable_adapters:
            return own(x, *args, **kwargs)
        obstacle = _obstacle(layer, row.adapters)
        if obstacle is None and not args and not kwargs:
            return _grouped(layer, name, x, row)
        self._say(layer, obstacle or "it is called with more than its input")
        return _plain(layer, name, own, x, args, kwargs, row)

    def _check_recomputed(self, layer: Any, name: str, row: Stretches | None) -> None:
        """Refuse what checkpointing would compute again with other adapters than before."""
        inside_backward = torch._C._current_graph_task_id() >= 0
        if not inside_backward:
            (self._described.discard if row is None else self._described.add)(id(layer))
        elif row is None and id(layer) in self._described:
            raise ModelError(
                f"the forward of {name} is computed again in a backward pass outside of `on`, "
                "where nobody says which adapters its row has: move the backward inside"
            )

    def _say(self, layer: Any, reason: str) -> None:
        kind = f"{type(layer).__name__} over {type(layer.get_base_layer()).__name__}"
        if (kind, reason) not in self._said:
            self._said.add((kind, reason))
            warnings.warn(
                f"LoRA layers of kind {kind} run one adapter after another, which is slower than "
                f"grouped: {reason}",
                stacklevel=2,
            )


def _check_layer(name: str, module: nn.Module) -> None:
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    other = isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer)
    if other or isinstance(module, AuxiliaryTrainingWrapper):
        raise ModelError(
            f"rows of several adapters need plain LoRA layers; {name} is a "
            f"{type(module).__name__}, which follows the active adapter: leave it out of the "
            "adapters' configuration"
        )


_ADDING = {("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.bnb", "Linear4bit")}
"""peft's layers that add their factors' product to what their base gives; by name, because the
second can only be imported with bitsandbytes."""


def _obstacle(layer: Any, adapters: Sequence[str]) -> str | None:
    """Why the grouped kernel cannot compute this layer; None where it can."""
    if (type(layer).__module__, type(layer).__name__) not in _ADDING:
        return "only peft's Linear layer is grouped"
    if layer.merged_adapters:
        return "an adapter is merged into its base weight"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting its input is switched off"
    for name in adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            variant = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
            return f"an adapter is of the variant {variant}"
        if layer.use_rslora.get(name):
            return "an adapter scales by the root of its rank (rsLoRA)"
        if layer.lora_bias.get(name):
            return "an adapter has a bias"
        dropout = layer.lora_dropout[name]
        if dropout.training and getattr(dropout, "p", 0.0):
            return "an adapter has dropout"
        if type(layer.lora_A[name]) is not nn.Linear or type(layer.lora_B[name]) is not nn.Linear:
            return "a factor is no plain linear layer"
    return None


def _grouped(layer: Any, name: str, x: Tensor, row: Stretches) -> Tensor:
    """x (..., I), T positions in all -> (..., O)."""
    here = tuple(adapter for adapter in row.adapters if adapter in layer.lora_A)
    if not here:
        output: Tensor = layer.base_layer(x)
        return output
    rows = x.reshape(-1, x.shape[-1])
    _check_length(name, len(rows), row)
    a = [layer.lora_A[adapter].weight for adapter in here]
    b = [layer.lora_B[adapter].weight for adapter in here]
    scales = [layer.scaling[adapter] for adapter in here]
    base = layer.base_layer
    if _frozen_and_plain(base, rows):
        out = grouped_lora_linear(rows, base.weight, base.bias, a, b, scales, row.segments(here))
    else:
        out = grouped_lora(rows, base(rows), a, b, scales, row.segments(here))
    return out.view(*x.shape[:-1], out.shape[-1])


def _frozen_and_plain(base: nn.Module, rows: Tensor) -> bool:
    """Whether `base` is nothing but a product with a frozen weight of the rows' dtype."""
    if type(base) is not nn.Linear or torch.is_autocast_enabled(rows.device.type):
        return False
    hooks = (base._forward_hooks, base._forward_pre_hooks,
             base._backward_hooks, base._backward_pre_hooks)  # fmt: skip
    # A forward of its own: accelerate moves weights to where they are used in one.
    if any(hooks) or "forward" in base.__dict__:
        return False
    if any(parameter.requires_grad for parameter in base.parameters()):
        return False
    return type(base.weight) is nn.Parameter and base.weight.dtype == rows.dtype


def _check_length(name: str, length: int, row: Stretches) -> None:
    if length != row.length:
        raise ModelError(
            f"every LoRA layer must read and write the whole row of {row.length} positions; "
            f"{name} has {length}: leave it out of the adapters' targets, or run one adapter at a "
            "time"
        )


class _Cut(NamedTuple):
    """Where a layer's input and output hold positions, and whether these are independent."""

    read: int
    written: int
    independent: bool


_EACH = _Cut(-2, -2, True)
_CUTS = {nn.Linear: _EACH, nn.Embedding: _Cut(-1, -2, True), nn.Conv1d: _Cut(-1, -1, False)}
"""By the kind of base layer."""


def _cut_of(layer: Any) -> _Cut | None:
    """None for a layer whose input cannot be cut by position."""
    base = layer.get_base_layer()
    for kind, cut in _CUTS.items():
        if isinstance(base, kind):
            return cut
    # Quantised layers, and the Conv1D of GPT-2, are linear in all but their base's class.
    factors = [*layer.lora_A.values(), *layer.lora_B.values()]
    linear = "Linear" in type(layer).__name__
    return _EACH if linear and all(isinstance(factor, nn.Linear) for factor in factors) else None


def _plain(
    layer: Any,
    name: str,
    own: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    row: Stretches,
) -> Tensor:
    """peft's own forward on each stretch, with that stretch's adapter active."""
    cut = _cut_of(layer)
    pieces = list(row.covering(joined=cut is None or cut.independent))
    _check_merged(layer, name, {adapter for _, _, adapter in pieces})
    if len(pieces) == 1:
        with _active(layer, pieces[0][2]):
            return own(x, *args, **kwargs)
    if cut is None:
        raise ModelError(
            f"{name} is a {type(layer).__name__} over {type(layer.get_base_layer()).__name__}, "
            "whose input cannot be cut by adapter: leave it out of the adapters' targets, or run "
            "one adapter at a time"
        )
    _check_length(name, x.shape[cut.read], row)
    outs = []
    for start, stop, adapter in pieces:
        with _active(layer, adapter):
            outs.append(own(x.narrow(cut.read, start, stop - start), *args, **kwargs))
    joined = torch.cat(outs, cut.written)
    _check_length(name, joined.shape[cut.written], row)
    return joined


def _check_merged(layer: Any, name: str, adapters: set[str | None]) -> None:
    if layer.merged_adapters and adapters != set(layer.merged_adapters):
        raise ModelError(
            f"{name} has {', '.join(layer.merged_adapters)} merged into its base weight, so other "
            "adapters cannot use it: unmerge first (model.unmerge_adapter())"
        )


@contextmanager
def _active(layer: Any, adapter: str | None) -> Iterator[None]:
    """`adapter` alone is active in this layer; unlike peft's switch, nothing is frozen by it."""
    before = layer._active_adapter
    layer._active_adapter = [] if adapter is None else [adapter]
    try:
        yield
    finally:
        layer._active_adapter = before
