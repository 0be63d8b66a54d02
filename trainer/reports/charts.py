"""Charts as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 14, 46

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart: its points (x, y), and the class that colours it in the style sheet."""

    points: Sequence[Point]
    style: str
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis, in the chart's own units."""

    at: float
    label: str


@dataclass(slots=True)
class LineChart:
    """What the template draws: everything is in the SVG's units already."""

    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    paths: list[tuple[str, str]] = field(default_factory=list)
    """(path data, style) of each line."""

    dots: list[tuple[float, float, str, str]] = field(default_factory=list)
    """(x, y, style, title) of each point that is marked."""

    mark: Tick | None = None
    """A vertical line with a label."""

    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM
    width: int = WIDTH
    height: int = HEIGHT


def line_chart(lines: Sequence[Line], mark: tuple[float, str] | None = None) -> LineChart | None:
    """Scale lines to one pair of axes; None when no line has a point.

    Args:
        mark: An x and its label, drawn as a vertical line.
    """
    points = [p for line in lines for p in line.points if math.isfinite(p[1])]
    if not points:
        return None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_values = nice_ticks(min(0.0, *xs), max(xs), 8)
    y_values = nice_ticks(min(ys), max(ys), 6)
    x_low, x_high = min(0.0, *xs), max(max(xs), 1.0)
    y_low, y_high = min(y_values[0], *ys), max(y_values[-1], *ys)
    chart = LineChart()

    def place(point: Point) -> Point:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (chart.right - chart.left)
        y = chart.bottom - (point[1] - y_low) / ((y_high - y_low) or 1) * (chart.bottom - chart.top)
        return round(x, 1), round(y, 1)

    whole = all(float(x).is_integer() for x in x_values)
    chart.x_ticks = [
        Tick(place((x, y_low))[0], f"{x:.0f}" if whole else f"{x:g}")
        for x in x_values
        if x_low <= x <= x_high
    ]
    chart.y_ticks = [Tick(place((x_low, y))[1], f"{y:g}") for y in y_values]
    for line in lines:
        finite = [p for p in line.points if math.isfinite(p[1])]
        chart.paths.append((_path([place(p) for p in finite]), line.style))
        if line.dots:
            said = [f"step {x:g}: {y:.3f}" for x, y in finite]
            chart.dots += [(*place(p), line.style, t) for p, t in zip(finite, said, strict=True)]
    if mark is not None and x_low <= mark[0] <= x_high:
        chart.mark = Tick(place((mark[0], y_low))[0], mark[1])
    return chart


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` round numbers, the first at or below `low`, the last at or above `high`."""
    if high <= low:
        high = low + 1
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def smoothed(points: Sequence[Point], reach: int) -> list[Point]:
    """Means of the points up to `reach` before and after each."""
    result = []
    for place, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, place - reach) : place + reach + 1]]
        result.append((x, sum(window) / len(window)))
    return result


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{'M' if i == 0 else 'L'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
