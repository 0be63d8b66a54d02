"""Losses that others send: what is not allowed is refused by name, and nothing grows large."""

import copy
import json
import random
import resource
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from plait.errors import ConfigError, PlaitError
from plait.service.engine import bounds
from plait.service.engine.graphs import FUNCTIONS, METHODS, Graph
from plait.service.wire.training import Call
from plait.types import TensorData

Node = dict[str, Any]
LOGPROBS, ADVANTAGES = {"ref": "logprobs"}, {"ref": "advantages"}


def node(name: str, target: str, *args: Any, op: str = "call_function", **kwargs: Any) -> Node:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def method(name: str, target: str, *args: Any, **kwargs: Any) -> Node:
    return node(name, target, *args, op="call_method", **kwargs)


def output(loss: str = "loss", **metrics: Any) -> Node:
    said = {name: {"ref": ref} for name, ref in metrics.items()}
    return node("out", "output", {"tuple": [{"ref": loss}, {"dict": said}]}, op="output")


def graph(*nodes: Node) -> dict[str, Any]:
    names = ("logprobs", "advantages")
    places = [node(name, name, op="placeholder") for name in names]
    inputs = [{"name": name, "rank": 1} for name in names]
    return {"name": "mine", "inputs": inputs, "graph": {"format": 1, "nodes": [*places, *nodes]}}


def run(given: Any, length: int = 1000, data: int = 1) -> tuple[float, dict[str, float], Any]:
    inputs = {"advantages": TensorData(np.linspace(-1, 1, length, dtype=np.float32))}
    call = Call([], "custom", {}, True, [inputs] * data)
    logprobs = [torch.linspace(-2, -0.1, length) for _ in range(data)]
    return Graph.of(given).losses(call, logprobs)


PPO = graph(
    node("ratio", "torch.exp", LOGPROBS),
    method("held", "clamp", {"ref": "ratio"}, 0.8, 1.2),
    node("a", "operator.mul", {"ref": "ratio"}, ADVANTAGES),
    node("b", "operator.mul", {"ref": "held"}, ADVANTAGES),
    node("least", "torch.minimum", {"ref": "a"}, {"ref": "b"}),
    node("sum", "torch.sum", {"ref": "least"}),
    node("loss", "operator.neg", {"ref": "sum"}),
    node("mean", "torch.mean", {"ref": "ratio"}),
    output(ratio="mean"),
)


def test_a_loss_of_allowed_operations_is_computed() -> None:
    loss, metrics, (gradient,) = run(PPO)
    leaf = torch.linspace(-2, -0.1, 1000, requires_grad=True)
    advantages, ratio = torch.linspace(-1, 1, 1000), leaf.exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()))
    assert metrics == {"ratio:mean": pytest.approx(float(ratio.mean().detach()))}
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize(
    ("nodes", "word"),
    [
        ([node("e", "builtins.eval", "1")], "unknown function"),
        ([node("e", "torch.load", "weights.pt")], "unknown function"),
        ([node("e", "os.system", "true")], "unknown function"),
        ([node("e", "operator.attrgetter", "__class__")], "unknown function"),
        ([method("e", "__reduce__", LOGPROBS)], "unknown tensor method"),
        ([method("e", "numpy", LOGPROBS)], "unknown tensor method"),
        ([method("e", "register_hook", LOGPROBS)], "unknown tensor method"),
        ([method("e", "set_", LOGPROBS, ADVANTAGES)], "unknown tensor method"),
        ([method("e", "as_strided", LOGPROBS, [2**20], [1], 0)], "unknown tensor method"),
        ([node("e", "getattr", LOGPROBS, "__class__")], "may not be"),
        ([node("e", "getattr", LOGPROBS, "data")], "may not be"),
        ([node("e", "getattr", LOGPROBS, "sum")], "unknown attribute"),
        ([node("e", "x", op="get_attr")], "may not have a get_attr"),
        ([node("e", "x", op="call_module")], "may not have a call_module"),
        ([node("e", "torch.exp", LOGPROBS, out=ADVANTAGES)], "keywords"),
        ([node("e", "torch.sum", {"ref": "another_run"})], "unknown value"),
        ([node("e", "torch.zeros_like", LOGPROBS, device="cuda")], "may not be 'cuda'"),
        ([node("e", "torch.zeros_like", LOGPROBS, device={"device": "cuda"})], "may not be a"),
        ([method("e", "to", LOGPROBS, "meta")], "may not be 'meta'"),
        ([node("e", "torch.norm", LOGPROBS, "nuc")], "may not be 'nuc'"),
        ([node("e", "operator.iadd", LOGPROBS, 1.0)], "in-place"),
        ([node("e", "operator.mul", [1], 10**9)], "tensors and numbers"),
        ([node("e", "operator.mul", "a", 10**9)], "may not be 'a'"),
        ([node("e", "operator.mod", "%0999999999d", 1)], "may not be"),
        ([node("e", "operator.pow", 10, 10**9)], "are raised to"),
        ([node("e", "operator.mul", 2**62, 2**62)], "has 64 bits"),
        ([node("e", "math.e")], "unknown function"),
        ([node("e", "torch.exp", [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]])], "nested"),
    ],
)  # fmt: skip
def test_what_leads_elsewhere_is_refused(nodes: list[Node], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        run(graph(*nodes, node("loss", "torch.sum", LOGPROBS), output()))


def square(name: str) -> Node:
    return node(name, "torch.outer", LOGPROBS, LOGPROBS)


@pytest.mark.parametrize(
    ("nodes", "word"),
    [
        ([method("x", "expand", LOGPROBS, 10**5, 1000)], "up to 16777216 values"),
        ([square("s"), node("f", "torch.flatten", {"ref": "s"}),
          node("x", "torch.outer", {"ref": "f"}, {"ref": "f"})], "up to 16777216 values"),
        ([square("s"), node("f", "torch.flatten", {"ref": "s"}),
          node("x", "torch.einsum", "i,j,ij->", {"ref": "f"}, {"ref": "f"},
               {"ref": "s"})], "fails at torch.einsum"),
        ([square("s"),
          node("x", "torch.einsum", "ij,kl->ijkl", {"ref": "s"}, {"ref": "s"})], "up to 16777216"),
        ([method("x", "new_zeros", LOGPROBS, {"tuple": [10**5, 10**6]})], "up to 16777216"),
        ([node("x", "torch.arange", 0, 1, 1e-12)], "up to 16777216 values"),
        ([node("x", "torch.logspace", 0, 1, 10**12)], "up to 16777216 values"),
        ([square("s"), node("f", "torch.flatten", {"ref": "s"}),
          node("x", "torch.unbind", {"ref": "f"})], "up to 4096 parts"),
        ([square("s"), node("f", "torch.flatten", {"ref": "s"}),
          node("x", "torch.split", {"ref": "f"}, 1)], "up to 4096 parts"),
        ([square("s"), *[node(f"m{i}", "torch.matmul", {"ref": "s"}, {"ref": "s"})
                         for i in range(100)]], "computes too much"),
        ([square("s"), *[node(f"m{i}", "torch.exp", {"ref": "s"}) for i in range(200)]],
         "bytes of tensors"),
    ],
)  # fmt: skip
def test_what_would_grow_large_is_refused_before_it_is_made(nodes: list[Node], word: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=word):
        run(graph(*nodes, node("loss", "torch.sum", LOGPROBS), output()))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1.5 * bounds.MOST_BYTES / 1024


def test_the_backward_pass_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many slices has a gradient of the whole tensor."""
    monkeypatch.setattr(bounds, "MOST_BYTES", 1 << 20)
    nodes = [node(f"p{i}", "operator.getitem", LOGPROBS, i) for i in range(600)]
    added = node("all", "torch.stack", [{"ref": f"p{i}"} for i in range(600)])
    with pytest.raises(ConfigError, match="bytes of tensors"):
        run(graph(*nodes, added, node("loss", "torch.sum", {"ref": "all"}), output()))


def test_masks_and_lists_of_indices_work() -> None:
    positive = node("mask", "torch.gt", ADVANTAGES, 0.0)
    for chosen in (
        [node("some", "operator.getitem", LOGPROBS, {"ref": "mask"})],
        [node("some", "torch.masked_select", LOGPROBS, {"ref": "mask"})],
        [node("where", "torch.where", {"ref": "mask"}),
         node("which", "operator.getitem", {"ref": "where"}, 0),
         node("some", "operator.getitem", LOGPROBS, {"ref": "which"})],
    ):  # fmt: skip
        loss, _, (gradient,) = run(
            graph(positive, *chosen, node("loss", "torch.sum", {"ref": "some"}), output())
        )
        expected = float(torch.linspace(-2, -0.1, 1000)[500:].sum())
        assert loss == pytest.approx(expected, rel=1e-5)
        assert gradient.count_nonzero() == 500


@pytest.mark.parametrize(
    ("nodes", "word"),
    [
        ([output("loss", many="advantages")], "only one element"),
        ([output("advantages")], "scalar"),
        ([node("out", "output", op="output")], "fails at output"),
        ([], "no output"),
    ],
)
def test_what_a_loss_returns_is_checked(nodes: list[Node], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        run(graph(node("loss", "torch.sum", LOGPROBS), *nodes))


def test_metrics_have_a_reduction() -> None:
    loss = node("loss", "torch.sum", LOGPROBS)
    _, metrics, _ = run(graph(loss, output(**{"entropy": "loss", "most:max": "loss"})))
    assert set(metrics) == {"entropy:mean", "most:max"}
    with pytest.raises(ConfigError, match="name:reduction"):
        run(graph(loss, output(**{"a:b:c": "loss"})))


ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 7, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "sum", "x",
    "__class__", [], {}, [1, 2], {"ref": "logprobs"}, {"ref": []}, {"tuple": 3}, {"slice": [1]},
    {"slice": [None, -1, 0]}, {"dict": 1}, {"float": "many"}, {"dtype": "int64"}, {"dtype": {}},
    {"device": "cuda:0"}, {"ellipsis": 1}, {"tuple": [{"ref": "advantages"}]}, {"a": 1, "b": 2},
]  # fmt: skip


def mutated(given: dict[str, Any], chance: random.Random) -> Any:
    """The graph with a few places changed: operations, arguments, keywords, or the whole form."""
    made = copy.deepcopy(given)
    for _ in range(chance.randint(1, 4)):
        nodes = made["graph"]["nodes"]
        at = chance.randrange(2, len(nodes))
        kind = chance.randrange(7)
        if kind == 0:
            nodes[at]["target"] = chance.choice(sorted(FUNCTIONS))
        elif kind == 1:
            nodes[at].update(op="call_method", target=chance.choice(sorted(METHODS)))
        elif kind == 2:
            nodes[at]["args"] = [chance.choice(ODD) for _ in range(chance.randrange(4))]
        elif kind == 3:
            nodes[at]["kwargs"][chance.choice(("dim", "out", "dtype", "n", "size"))] = (
                chance.choice(ODD)
            )
        elif kind == 4:
            nodes.insert(at, node(f"n{at}", chance.choice(sorted(FUNCTIONS)), LOGPROBS, ADVANTAGES))
        elif kind == 5:
            field = chance.choice(("op", "name", "target", "args", "kwargs"))
            nodes[at][field] = chance.choice(ODD)
            return made
        else:
            nodes[at]["args"] = [LOGPROBS, chance.choice(ODD)]
    return made


def test_small_operations_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """To begin one takes time, whatever it works on: as many data as may be sent must end."""
    monkeypatch.setattr(
        "plait.service.engine.graphs.Budget", lambda: bounds.Budget(1000 * bounds.LEAST_WORK)
    )
    names = ["logprobs", *(f"x{number}" for number in range(100))]
    chain = [node(name, "torch.neg", {"ref": before}) for before, name in pairwise(names)]
    loss = graph(*chain, node("loss", "torch.sum", {"ref": names[-1]}), output())
    run(loss, length=1)
    with pytest.raises(ConfigError, match="too much for one call"):
        run(loss, length=1, data=20)


def fuzzed(attempt: Callable[[random.Random], object], times: int) -> int:
    """How many of the attempts succeed; none may raise anything but an error of Plait's."""
    good = 0
    for seed in range(times):
        try:
            attempt(random.Random(seed))
            good += 1
        except PlaitError as error:
            assert "/site-packages/" not in str(error)
            assert ".cpp" not in str(error)
    return good


def test_changed_graphs_are_computed_or_refused() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good = fuzzed(lambda chance: run(mutated(PPO, chance), length=64), 3000)
    assert 0 < good < 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000


def test_any_form_of_a_graph_is_read_or_refused() -> None:
    def attempt(chance: random.Random) -> None:
        text = json.dumps(PPO)
        at = chance.randrange(len(text))
        piece = chance.choice(("", "1", "[]", "{}", "null", '"x"', text[at : at + 30]))
        try:
            given = json.loads(text[:at] + piece + text[at + chance.randrange(12) :])
        except ValueError:
            return
        Graph.of(given)

    assert 0 < fuzzed(attempt, 3000) < 3000
    for form in (None, 3, [], {}, {"inputs": 3}, {**PPO, "graph": None}):
        assert not fuzzed(lambda _, form=form: Graph.of(form), 1)  # type: ignore[misc]
