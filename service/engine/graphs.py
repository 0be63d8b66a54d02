"""Losses of one's own that were traced by the Tinker client and sent as data.

Nothing of a graph is executable: each of its nodes names an operation, which is looked up in the
lists here. What is not in them is refused by name.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.errors import ConfigError, DataError, PlaitError, UnknownNameError
from plait.primitives.custom import unweighted
from plait.service.engine.bounds import MOST_PARTS, Bounded, Budget
from plait.service.wire.training import Call
from plait.types import Datum

MOST_NODES = 2000
MOST_DEPTH = 16
"""Of lists in lists among arguments."""

_LARGEST = 2**63
_LARGEST_POWER = 64

_BOTH = """abs add addcdiv addcmul all amax amin any argmax argmin argsort bmm ceil chunk clamp
clamp_max clamp_min clip cos cosh count_nonzero cummax cummin cumprod cumsum detach diff div divide
dot eq erf exp exp2 expm1 flatten flip floor floor_divide fmod gather ge gt index_select isfinite
isinf isnan le lerp log log10 log1p log2 log_softmax logaddexp logcumsumexp logical_and logical_not
logical_or logical_xor logit logsumexp lt masked_fill masked_select matmul max maximum mean median
min minimum mul multiply nan_to_num nanmean nansum ne neg negative norm numel outer permute pow prod
reciprocal relu remainder reshape roll round rsqrt select sigmoid sign sin softmax sort split sqrt
square squeeze std sub subtract sum take_along_dim tan tanh topk transpose tril triu true_divide
unbind unsqueeze var where xlogy"""
"""Of `torch` and of its tensors alike."""

_FUNCTIONS = "arange cat concat einsum full_like logspace ones_like stack zeros_like tensordot"
_METHODS = """bool clone contiguous dim double expand expand_as float int long new_ones new_zeros
size t to type_as view view_as"""
_FUNCTIONAL = """binary_cross_entropy binary_cross_entropy_with_logits elu gelu huber_loss kl_div
l1_loss leaky_relu log_softmax mse_loss relu sigmoid silu smooth_l1_loss softmax tanh"""
_NATIVE = "elu_ gelu huber_loss leaky_relu log_sigmoid softplus"
_OPERATORS = """abs add and_ eq floordiv ge gt iadd imul invert isub itruediv le lt matmul
mod mul ne neg not_ or_ pos pow sub truediv xor"""
_MATH = "ceil cos exp expm1 fabs floor log log10 log1p log2 pow sin sqrt tan tanh"
ATTRIBUTES = frozenset(("shape", "ndim", "dtype", "T", "mT", "device"))
_DTYPES = ("float32", "float64", "int64", "int32", "bool", "bfloat16", "float16")
_FORMATS = ("contiguous_format", "preserve_format")
_WORDS = ("sum", "mean", "none", "batchmean", "trunc", "floor", "fro", "tanh", "cpu", *ATTRIBUTES)
"""Texts among arguments; `einsum` takes an equation besides."""

_EQUATION = re.compile(r"[A-Za-z ,.>-]{1,200}")
_REFUSED = ("out", "generator", "names", "pin_memory")
"""Keywords that write elsewhere than into the result, or reach for more than it needs."""


def _attribute(value: Any, name: str) -> Any:
    if name not in ATTRIBUTES:
        raise UnknownNameError("attribute of a custom loss", name, ATTRIBUTES)
    if not isinstance(value, Tensor):
        raise TypeError("attributes are read of tensors alone")
    return getattr(value, name)


def _item(value: Any, index: Any) -> Any:
    if not isinstance(value, (Tensor, tuple, list, dict)):
        raise TypeError("items are taken of tensors, tuples, lists and dicts alone")
    return value[index]


def _operator(name: str) -> Callable[..., Any]:
    """One of Python's operators, on tensors and numbers: texts and lists could be multiplied."""
    function = getattr(operator, name)

    def apply(*args: Any) -> Any:
        if not all(isinstance(one, (Tensor, int, float)) for one in args):
            raise TypeError("operators take tensors and numbers")
        whole = all(isinstance(one, int) for one in args)
        if name == "pow" and whole and abs(args[1]) > _LARGEST_POWER:
            raise ValueError(f"whole numbers are raised to {_LARGEST_POWER} at most")
        return function(*args)

    return apply


def _allowed() -> dict[str, Callable[..., Any]]:
    functional, native = torch.nn.functional, torch._C._nn
    found = {f"torch.{name}": getattr(torch, name) for name in f"{_BOTH} {_FUNCTIONS}".split()
             if hasattr(torch, name)}  # fmt: skip
    found |= {f"torch.nn.functional.{n}": getattr(functional, n) for n in _FUNCTIONAL.split()}
    found |= {f"torch._C._nn.{n}": getattr(native, n) for n in _NATIVE.split()
              if hasattr(native, n)}  # fmt: skip
    found |= {f"operator.{name}": _operator(name) for name in _OPERATORS.split()}
    found |= {f"math.{name}": getattr(math, name) for name in _MATH.split()}
    attribute = {"builtins.getattr": _attribute, "getattr": _attribute}
    return {**found, "operator.getitem": _item, **attribute}


FUNCTIONS = _allowed()
METHODS = frozenset(f"{_BOTH} {_METHODS}".split())


@dataclass(frozen=True, slots=True)
class _Node:
    op: str
    name: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Graph:
    """A loss of one datum: (logprobs, *inputs) to a scalar and metrics."""

    name: str
    inputs: tuple[str, ...]
    """`logprobs`, and the loss inputs that it reads."""

    ranks: tuple[int, ...]
    nodes: tuple[_Node, ...]

    @classmethod
    def of(cls, given: Any) -> "Graph":
        """
        Raises:
            ConfigError: it has another form, or an operation that is not allowed.
        """
        try:
            inputs = [(str(one["name"]), int(one["rank"])) for one in given["inputs"]]
            nodes = tuple(
                _Node(
                    str(one["op"]), str(one["name"]), str(one["target"]),
                    list(one.get("args", [])), dict(one.get("kwargs", {})),
                )
                for one in given["graph"]["nodes"]
            )  # fmt: skip
            name = str(given["name"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(f"a custom loss has another form: {error!r}"[:300]) from error
        names, ranks = zip(*inputs, strict=True) if inputs else ((), ())
        graph = cls(name, tuple(names), tuple(ranks), nodes)
        graph._check()
        return graph

    def _check(self) -> None:
        if len(self.nodes) > MOST_NODES:
            raise ConfigError(f"a custom loss has up to {MOST_NODES} operations")
        if not self.inputs or self.inputs[0] != "logprobs":
            raise ConfigError("a custom loss reads logprobs first")
        placeholders = [node.target for node in self.nodes if node.op == "placeholder"]
        if placeholders != list(self.inputs):
            raise ConfigError("the placeholders of a custom loss must be its inputs, in order")
        for node in self.nodes:
            if not _shallow([node.args, node.kwargs]):
                raise ConfigError(f"arguments of a custom loss are nested up to {MOST_DEPTH} deep")
            if any(name in _REFUSED for name in node.kwargs):
                raise ConfigError(f"a custom loss may not use the keywords {', '.join(_REFUSED)}")
            if node.op == "call_function" and node.target not in FUNCTIONS:
                raise UnknownNameError("function of a custom loss", node.target, FUNCTIONS)
            if node.op == "call_method" and node.target not in METHODS:
                raise UnknownNameError("tensor method of a custom loss", node.target, METHODS)
            if node.op not in ("placeholder", "call_function", "call_method", "output"):
                raise ConfigError(f"a custom loss may not have a {node.op} ({node.target})")

    def plain(self, call: Call) -> list[Datum]:
        """The data with their targets alone.

        Raises:
            DataError: a datum lacks an input, or it has another rank.
        """
        for number, inputs in enumerate(call.more):
            named = zip(("target_tokens", *self.inputs[1:]), self.ranks, strict=True)
            for name, rank in named:
                if name not in inputs:
                    raise DataError(f"datum {number}: loss {self.name!r} reads {name!r}")
                if len(inputs[name].shape) != rank:
                    raise DataError(
                        f"datum {number}: loss {self.name!r} reads {name!r} of rank {rank}; its "
                        f"shape is {inputs[name].shape}"
                    )
        return unweighted(call.data)

    def losses(
        self, call: Call, logprobs: Sequence[Tensor]
    ) -> tuple[float, dict[str, float], list[Tensor]]:
        """The summed loss, metrics by name, and the loss's derivative by each datum's logprobs.

        Raises:
            ConfigError: an operation fails, or what is returned is no scalar.
        """
        total, sums, derivatives, budget = 0.0, dict[str, float](), [], Budget()
        for given, inputs in zip(logprobs, call.more, strict=True):
            leaf = given.clone().requires_grad_()
            values = [inputs[name].to_torch() for name in self.inputs[1:]]
            try:
                with Bounded(budget):
                    loss, metrics, derivative = self._derived(leaf, values)
            except PlaitError:
                raise
            except Exception as error:
                raise ConfigError(f"loss {self.name!r} fails: {_said(error)}") from error
            derivatives.append(derivative)
            total += loss
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value
        count = len(logprobs)
        means = {name: v / count if name.endswith(":mean") else v for name, v in sums.items()}
        return total, means, derivatives

    def _derived(
        self, leaf: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[float, dict[str, float], Tensor]:
        """The loss of one datum, its metrics, and its derivative."""
        loss, metrics = self._run(leaf, inputs)
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, [leaf], allow_unused=True)
        derivative = torch.zeros_like(leaf) if gradient is None else gradient
        numbers = {_metric(name): _number(value) for name, value in metrics.items()}
        return float(loss.detach()), numbers, derivative

    def _run(self, logprobs: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Any]]:
        values: dict[str, Any] = {}
        given = iter((logprobs, *inputs))
        for node in self.nodes:
            if node.op == "placeholder":
                values[node.name] = next(given)
                continue
            try:
                args = [_value(one, values) for one in node.args]
                kwargs = {name: _value(one, values) for name, one in node.kwargs.items()}
                if node.op == "output":
                    return _checked(self.name, args[0])
                values[node.name] = _plain(_called(node, args, kwargs))
            except PlaitError:
                raise
            except Exception as error:  # torch raises whatever it likes
                raise ConfigError(
                    f"loss {self.name!r} fails at {node.target}: {_said(error)}"
                ) from error
        raise ConfigError(f"loss {self.name!r} has no output")


def _said(error: Exception) -> str:
    """Its first line: what torch adds may name files."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def _shallow(given: Any, depth: int = MOST_DEPTH) -> bool:
    if not isinstance(given, (list, dict)):
        return True
    return depth > 0 and all(
        _shallow(one, depth - 1) for one in (given.values() if isinstance(given, dict) else given)
    )


def _plain(value: Any) -> Any:
    """A result, which is a tensor, a number of ordinary size, or few of them.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, (tuple, list)):
        if len(value) > MOST_PARTS:
            raise TypeError(f"a result has up to {MOST_PARTS} parts")
        for one in value:
            _plain(one)
    elif isinstance(value, int):
        if abs(value) >= _LARGEST:
            raise ValueError("a whole number of a custom loss has 64 bits")
    elif not isinstance(value, (Tensor, float, torch.dtype, torch.device)):
        raise TypeError(f"a custom loss may not make a {type(value).__name__}")
    return value


def _metric(name: str) -> str:
    """With a reduction, which clients require."""
    if name.count(":") > 1 or not name:
        raise ConfigError(f"a metric of a custom loss is called name:reduction; got {name[:80]!r}")
    return name if ":" in name else f"{name}:mean"


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _called(node: _Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    for place, one in enumerate((*args, *kwargs.values())):
        if isinstance(one, str) and one not in _WORDS:
            equation = node.target == "torch.einsum" and place == 0 and _EQUATION.fullmatch(one)
            if not equation:
                raise ConfigError(f"an argument of a custom loss may not be {one[:80]!r}")
    if node.op == "call_function":
        return FUNCTIONS[node.target](*args, **kwargs)
    if not isinstance(args[0], Tensor):
        raise TypeError(f"{node.target} is a method of tensors")
    return getattr(args[0], node.target)(*args[1:], **kwargs)


def _checked(name: str, output: Any) -> tuple[Tensor, Mapping[str, Any]]:
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        raise ConfigError(f"loss {name!r} must return a loss and metrics")
    loss, metrics = output
    if not isinstance(loss, Tensor) or loss.ndim or not isinstance(metrics, dict):
        raise ConfigError(f"loss {name!r} must return a scalar tensor and a dict of metrics")
    return loss, metrics


def _value(given: Any, values: Mapping[str, Any]) -> Any:
    """An encoded argument; see `custom_loss_graph` of the Tinker client."""
    if isinstance(given, list):
        return [_value(one, values) for one in given]
    if not isinstance(given, dict):
        return given
    if len(given) != 1:
        raise ConfigError(
            "an argument of a custom loss is a scalar, a list, or an object of one key"
        )
    ((kind, content),) = given.items()
    if kind == "ref":
        if content not in values:
            raise UnknownNameError("value of a custom loss", content, values)
        return values[content]
    if kind == "tuple":
        return tuple(_value(one, values) for one in content)
    if kind == "dict":
        return {name: _value(one, values) for name, one in content.items()}
    if kind == "slice":
        return slice(*(_value(one, values) for one in content))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "float":
        return float(content)
    if kind == "dtype" and content in _DTYPES:
        return getattr(torch, content)
    if kind == "device" and content == "cpu":
        return torch.device("cpu")
    if kind == "layout" and content == "strided":
        return torch.strided
    if kind == "memory_format" and content in _FORMATS:
        return getattr(torch, content)
    raise ConfigError(f"an argument of a custom loss may not be a {kind} {content!r}"[:200])
