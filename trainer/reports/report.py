"""The page about a training run, from the files that the run left in its folder."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.errors import ConfigError
from plait.trainer.reports.charts import Line, LineChart, Point, line_chart, smoothed
from plait.trainer.reports.pages import DASH, number, percent, write_page

Values = Mapping[str, Any]

_PHASES = ("plan", "load", "features", "before", "train", "after")


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from the `metrics.json`, `captions.json` and `losses.csv` beside it.

    Captions and losses may be absent; what is not known is shown as a dash, with the run's notes.

    Raises:
        ConfigError: the folder is not that of a finished run.
    """
    metrics = _read_json(run_dir / "metrics.json", "metrics")
    captions_file = run_dir / "captions.json"
    captions = _read_json(captions_file, "captions") if captions_file.is_file() else []
    losses = _read_losses(run_dir / "losses.csv")
    return write_page("report.html", run_dir / "report.html", _view(metrics, captions, losses))


def _view(
    metrics: Values, captions: list[Values], losses: dict[str, list[Point]]
) -> dict[str, Any]:
    test, before = metrics.get("test") or {}, metrics.get("before") or {}
    seconds = metrics.get("seconds") or {}
    memory = metrics.get("memory_mb") or {}
    return {
        "name": metrics.get("name", "run"),
        "pipeline": _pipeline(metrics.get("config") or {}),
        "headlines": _headlines(before, test, _medium(metrics)),
        "medium": _medium(metrics),
        "chart": _loss_chart(losses, metrics.get("best_step")),
        "rows": _rows(before, test, _medium(metrics)),
        "cards": [_card(caption) for caption in captions],
        "judged": _judged(captions),
        "seconds": _bars({k: v for k, v in seconds.items() if k != "total"}),
        "total_seconds": seconds.get("total"),
        "memory": _bars(memory),
        "peak_memory_mb": metrics.get("peak_memory_mb"),
        "parameters": _parameters(metrics.get("parameters") or {}),
        "data": _data(metrics.get("data") or {}),
        "facts": _facts(metrics),
        "config": flatten(metrics.get("config") or {}),
        "versions": metrics.get("versions") or {},
        "notes": metrics.get("notes") or [],
        "steps": metrics.get("steps"),
        "best_step": metrics.get("best_step"),
    }


def _read_json(file: Path, what: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"a run's folder must hold {file.name} with its {what}, and {file.parent} does not "
            f"({error}); name the folder of a finished run"
        ) from error


def _read_losses(file: Path) -> dict[str, list[Point]]:
    """The points (step, nll) of training and validation; cells may be empty."""
    points: dict[str, list[Point]] = {"train_nll": [], "validation_nll": []}
    if not file.is_file():
        return points
    with file.open(newline="", encoding="utf-8") as content:
        for row in csv.DictReader(content):
            for column, held in points.items():
                if row.get(column) and math.isfinite(float(row[column])):
                    held.append((float(row["step"]), float(row[column])))
    return points


def _loss_chart(losses: dict[str, list[Point]], best_step: int | None) -> LineChart | None:
    train = losses["train_nll"]
    lines = [
        Line(train, "raw"),
        Line(smoothed(train, max(1, len(train) // 25)), "train"),
        Line(losses["validation_nll"], "validation", dots=True),
    ]
    mark = None if best_step is None else (float(best_step), f"best: step {best_step}")
    return line_chart([line for line in lines if line.points], mark)


def _pipeline(config: Values) -> list[str]:
    """The model's parts in the order in which a medium goes through them."""
    model = config.get("model") or config
    encoders = model.get("encoders") or {}
    held = list(encoders.values()) if isinstance(encoders, Mapping) else []
    parts = [" + ".join(str(encoder.get("name", "")) for encoder in held)]
    if len(held) == 1:
        parts.append(f"{held[0].get('projector', '')} projector")
    elif held:
        parts.append("a projector each")
    language = str(model.get("language") or "").rstrip("/").split("/")[-1].removeprefix("pip:")
    return [part for part in [*parts, language] if part and part != " projector"]


def gap(scores: Values) -> float | None:
    """How much worse the rows that hold media are with another's; of all rows where unknown."""
    exchanged = scores.get("shuffled_gap")
    if exchanged:
        return float(exchanged["difference"])
    matched, shuffled = scores.get("nll_matched"), scores.get("nll_shuffled")
    return None if matched is None or shuffled is None else shuffled - matched


def _headlines(before: Values, test: Values, medium: str) -> list[Values]:
    matched = before.get("nll_matched"), test.get("nll_matched")
    first = _first_headline(before, test)
    return [
        *([] if first["after"] == DASH else [first]),
        {
            "title": f"Loss with the right {medium}",
            "before": number(matched[0], 2),
            "after": number(matched[1], 2),
            "about": "nats per token of the answer; lower is better",
        },
        {
            "title": f"What the {medium} is worth",
            "before": number(gap(before), 2),
            "after": number(gap(test), 2),
            "about": f"nats per token lost with another's {medium}; higher is better"
            + _interval(test.get("shuffled_gap")),
        },
    ]


def _first_headline(before: Values, test: Values) -> Values:
    """The measure that says most to a reader: words for transcripts, else classes."""
    words = before.get("word_error_rate"), test.get("word_error_rate")
    if words[1] is not None:
        return {
            "title": "Word error rate",
            "before": percent(words[0]),
            "after": percent(words[1]),
            "about": "words wrong, missing or too many in the transcripts; lower is better",
        }
    accuracy = before.get("class_accuracy"), test.get("class_accuracy")
    return {
        "title": "Class accuracy",
        "before": percent(accuracy[0]),
        "after": percent(accuracy[1]),
        "about": "share of test rows whose class the model finds most likely",
    }


def _interval(found: Values | None) -> str:
    """The 95 % interval of a gap, in words."""
    if not found:
        return ""
    return f" (95 % interval {found['low']:.2f} to {found['high']:.2f}, {found['count']} rows)"


def _medium(metrics: Values) -> str:
    """What the run's model reads besides text, in a word."""
    encoders = ((metrics.get("config") or {}).get("model") or {}).get("encoders") or {}
    words = {"image": "picture", "audio": "sound", "video": "film"}
    return words.get(next(iter(encoders)), "media") if len(encoders) == 1 else "media"


def _rows(before: Values, test: Values, medium: str) -> list[Values]:
    """The table of test metrics: the known ones by name, any further number after them."""
    rows = [
        _row(f"nll per token, right {medium}", before, test, "nll_matched", number, lower=True),
        _row(f"nll per token, wrong {medium}", before, test, "nll_shuffled", number),
        {
            "title": f"lost with another's {medium}",
            "before": number(gap(before)),
            "after": number(gap(test)),
            "better": _better(gap(before), gap(test), lower=False),
        },
        _row("class accuracy", before, test, "class_accuracy", percent, lower=False),
        _row("word error rate", before, test, "word_error_rate", percent, lower=True),
    ]
    rows = [row for row in rows if {row["before"], row["after"]} != {DASH} or row is rows[0]]
    rows += [
        _gap_row(f"lost without {name}", (before.get("without") or {}).get(name), found)
        for name, found in (test.get("without") or {}).items()
    ]
    if test.get("single_frame"):
        rows.append(
            _gap_row("lost with one frame", before.get("single_frame"), test["single_frame"])
        )
    known = {"nll_matched", "nll_shuffled", "class_accuracy", "word_error_rate"}
    known |= {"count", "tokens"}
    others = [k for k, v in test.items() if k not in known and isinstance(v, int | float)]
    return rows + [_row(key.replace("_", " "), before, test, key, number) for key in others]


def _gap_row(title: str, before: Values | None, after: Values) -> Values:
    """By how many nats a token changed rows are worse, with the interval."""
    old = before["difference"] if before else None
    return {
        "title": title,
        "before": number(old),
        "after": f"{after['difference']:.3f} ({after['low']:.2f} to {after['high']:.2f})",
        "better": None if after["low"] <= 0 <= after["high"] else after["low"] > 0,
    }


def _row(
    title: str, before: Values, test: Values, key: str, write: Any, lower: bool | None = None
) -> Values:
    old, new = before.get(key), test.get(key)
    better = None if lower is None else _better(old, new, lower=lower)
    return {"title": title, "before": write(old), "after": write(new), "better": better}


def _better(old: float | None, new: float | None, *, lower: bool) -> bool | None:
    if old is None or new is None or old == new:
        return None
    return (new < old) == lower


def class_of(text: str) -> str:
    """What a caption says before its colon."""
    return text.partition(":")[0].strip().lower()


def _is_right(caption: Values, key: str) -> bool | None:
    """Whether a caption names the right class; None where pictures have no labels."""
    label = caption.get("label")
    return class_of(caption.get(key) or "") == str(label).strip().lower() if label else None


def _card(caption: Values) -> Values:
    return {
        **{key: caption.get(key) or "" for key in ("id", "prompt", "reference")},
        "media": caption.get("media") or [],
        "before": (caption.get("before") or "").strip() or "(nothing)",
        "after": (caption.get("after") or "").strip() or "(nothing)",
        "before_right": _is_right(caption, "before"),
        "after_right": _is_right(caption, "after"),
        "exact": (caption.get("after") or "").strip() == (caption.get("reference") or "").strip(),
    }


def _judged(captions: list[Values]) -> Values | None:
    marks = [_is_right(caption, "after") for caption in captions]
    known = [mark for mark in marks if mark is not None]
    return {"right": sum(known), "of": len(known)} if known else None


def _bars(values: Values) -> list[Values]:
    """Phases in the order in which they run, with each bar's share of the longest."""
    order = {name: place for place, name in enumerate(_PHASES)}
    names = sorted(values, key=lambda name: order.get(name, len(order)))
    most = max((values[name] for name in names if values[name]), default=1.0)
    return [
        {"name": name, "value": values[name], "share": round(100 * (values[name] or 0) / most, 2)}
        for name in names
    ]


def _parameters(parameters: Values) -> list[Values]:
    rows = [{"part": part, **counts} for part, counts in parameters.items()]
    total = {kind: sum(row.get(kind) or 0 for row in rows) for kind in ("trainable", "frozen")}
    return [*rows, {"part": "in all", **total}] if rows else []


def _data(data: Values) -> Values:
    """Counts of rows: lists by their length, the rows drawn of each dataset by its name."""
    found = {
        name: len(value) if isinstance(value, list) else value
        for name, value in data.items()
        if not isinstance(value, Mapping)
    }
    drawn = data.get("rows") or {}
    return found | {f"drawn of {name}": count for name, count in drawn.items()}


def _facts(metrics: Values) -> dict[str, Any]:
    test = metrics.get("test") or {}
    facts = {
        "test rows": test.get("count"),
        "test tokens": test.get("tokens"),
        "seed": metrics.get("seed"),
        "threads": metrics.get("threads"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def flatten(values: Values, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names: `model.lora.rank` -> `16`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
