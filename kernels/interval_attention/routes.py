"""Which implementation computes an attention, in one place.

`ROUTES` holds them by name, the preferred ones first. "auto" takes the first that can; a name
forces one, or says why it cannot. Routes are looked up at the call, so that Triton is imported
only where a GPU is used.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from plait.kernels.interval_attention import cpu, naive
from plait.kernels.interval_attention.intervals import Intervals, Linked
from plait.kernels.interval_attention.merging import merge


class Call(NamedTuple):
    """One attention: q (H, T, D), k and v (G, S, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    intervals: Intervals
    scale: float
    window: int | None
    softcap: float | None


class Route(NamedTuple):
    """A way to compute a `Call`: why it cannot (None where it can), and the computation."""

    refusal: Callable[[Call], str | None]
    run: Callable[[Call], tuple[Tensor, Tensor]]
    chosen: bool = True
    """Whether "auto" may take it."""


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    route: str | None = None,
) -> tuple[Tensor, Tensor]:
    """q (H, T, D), k and v (G, S, D) -> out (H, T, D) and lse (H, T) in float32.

    Both are differentiable, and the same bits at every repetition.

    Args:
        scale: Factor on the scores; 1/sqrt(D) by default.
        window: Sliding window in keys, the query's own included.
        softcap: Scores s become softcap * tanh(s / softcap), as in Gemma 2.
        route: A name in `ROUTES`, or "auto"; that of the intervals by default.

    Raises:
        ValueError: shapes or types that do not fit, keys that are not there, a window without
            own places, or a forced route that cannot compute this.
    """
    _check(q, k, v, intervals)
    _check_keys(k.shape[1], intervals, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = Call(q, k, v, intervals.to(q.device), scale, window, softcap)
    route = route or intervals.route
    out, lse = ROUTES[choose(call, route)].run(call)
    for linked in call.intervals.links:
        out, lse = _with_link(out, lse, call, linked, route)
    return out, lse


def _with_link(
    out: Tensor, lse: Tensor, call: Call, linked: Linked, route: str
) -> tuple[Tensor, Tensor]:
    """Join what some queries see elsewhere to what they saw already."""
    queries, intervals = linked
    more = interval_attention(
        call.q[:, queries], call.k, call.v, intervals,
        scale=call.scale, softcap=call.softcap, route=route,
    )  # fmt: skip
    joined, sums = merge(out[:, queries], lse[:, queries], *more)
    return out.index_copy(1, queries, joined), lse.index_copy(1, queries, sums)


def choose(call: Call, route: str) -> str:
    """The name of the route that computes `call`.

    Raises:
        ValueError: `route` is no route, or cannot compute this; or none can.
    """
    if route == "auto":
        refusals = {name: r.refusal(call) for name, r in ROUTES.items() if r.chosen}
        for name, refusal in refusals.items():
            if refusal is None:
                return name
        raise ValueError(
            "no attention route can compute this: "
            + "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
            + "; the route 'naive' can, slowly"
        )
    if route not in ROUTES:
        raise ValueError(f"an attention route is one of auto, {', '.join(ROUTES)}; got {route!r}")
    refusal = ROUTES[route].refusal(call)
    if refusal is not None:
        raise ValueError(f"attention cannot take the route {route!r}: {refusal}; use auto")
    return route


def _check(q: Tensor, k: Tensor, v: Tensor, intervals: Intervals) -> None:
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    if not fits or q.shape[0] % k.shape[0] or q.shape[1] != intervals.length:
        raise ValueError(
            "attention needs q (H, T, D), k and v (G, S, D), H a multiple of G, and T intervals; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and "
            f"{intervals.length} intervals"
        )
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            "attention needs q, k and v of one type on one device; got "
            + ", ".join(f"{t.dtype} on {t.device}" for t in (q, k, v))
        )


def _check_keys(keys: int, intervals: Intervals, window: int | None) -> None:
    if intervals.stop is not None and intervals.stop > keys:
        raise ValueError(
            f"intervals must end where the keys do or before; they end at {intervals.stop}, and "
            f"there are {keys} keys"
        )
    if window is None:
        return
    if intervals.links:
        raise ValueError("a window counts keys in one stretch; copy what links would point to")
    if window < 1:
        raise ValueError(f"a window holds the query's own key at least; got {window}")
    if intervals.own is None and keys != intervals.length:
        raise ValueError(
            f"a window over {keys} keys needs to know which key each of the {intervals.length} "
            "queries is: give the intervals their `own`"
        )


def _cpu_refusal(call: Call) -> str | None:
    if call.q.device.type == "cpu":
        return None
    return f"its tensors are on {call.q.device}"


def _triton_refusal(call: Call) -> str | None:
    from plait.kernels.interval_attention import triton

    return triton.refusal(call.q)


def _triton(call: Call) -> tuple[Tensor, Tensor]:
    from plait.kernels.interval_attention import triton

    return triton.interval_attention(*call)


def _flash_refusal(call: Call) -> str | None:
    from plait.kernels.interval_attention import flash

    return flash.refusal(call.q, call.k, call.intervals, call.window, call.softcap)


def _flash(call: Call) -> tuple[Tensor, Tensor]:
    from plait.kernels.interval_attention import flash

    return flash.interval_attention(call.q, call.k, call.v, call.intervals, call.scale, call.window)


def _naive(call: Call) -> tuple[Tensor, Tensor]:
    lo, hi = call.intervals.bounds(call.window)
    out, lse = naive.interval_attention(call.q, call.k, call.v, lo, hi, call.scale, call.softcap)
    return out.to(call.q.dtype), lse.float()


ROUTES = {
    "cpu": Route(_cpu_refusal, lambda call: cpu.interval_attention(*call)),
    "triton": Route(_triton_refusal, _triton),
    "flash": Route(_flash_refusal, _flash, chosen=False),
    "naive": Route(lambda _: None, _naive, chosen=False),
}
