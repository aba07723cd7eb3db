"""Plots: marks stand where their figures are, nothing leaves the drawing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as xml
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from chinese_llama.evaluate.report import svg
from chinese_llama.evaluate.report.blocks import Plot
from chinese_llama.evaluate.report.curves import Line, curves, smooth, thin
from chinese_llama.evaluate.report.dots import Axis, Mark, Row, dots
from chinese_llama.evaluate.report.values import Measure

SIZES = st.floats(-1e290, 1e290, allow_nan=False)


def row(label: str, value: float, low: float | None = None, high: float | None = None, **more: object) -> Row:
    return Row(label, [Mark(Measure(value, low, high), "stage", f"{label} {value}")], str(value), **more)  # type: ignore[arg-type]


def drawn(plot: Plot) -> xml.Element:
    return xml.fromstring(f"<svg>{plot.drawing}</svg>")


def places(plot: Plot, tag: str, name: str, kind: str) -> list[float]:
    return [float(e.attrib[name]) for e in drawn(plot).iter(tag) if kind in e.attrib.get("class", "").split()]


def test_marks_and_whiskers_are_in_proportion() -> None:
    plot = dots("t", "d", [row("a", 2.0, 1.0, 3.0), row("b", 4.0), row("c", 8.0)], Axis("x", zero=True))
    a, b, c = places(plot, "circle", "cx", "mark")
    assert abs((c - b) - 2 * (b - a)) < 0.2
    (low, *_) = places(plot, "line", "x1", "whisker")
    (high, *_) = places(plot, "line", "x2", "whisker")
    assert abs((a - low) - (high - a)) < 0.2 and high > a


def test_limit_chance_and_control_are_drawn() -> None:
    rows = [row("en", 0.05, limit=0.02, beyond=True), row("c", 0.01, apart=True)]
    plot = dots("t", "d", rows, Axis("change", "%", at=[(0.0, ""), (0.03, "here")]))
    (limit,), (mark, _) = places(plot, "line", "x1", "limit"), places(plot, "circle", "cx", "mark")
    assert limit < mark
    assert 'class="figure bad"' in plot.drawing and "here" in plot.drawing
    assert re.search(r">[\d.]+ %<", plot.drawing)


def test_whiskers_that_cannot_be_seen_are_told() -> None:
    narrow = [row("a", 18.0, 17.9, 18.1), row("b", 2.0, 1.9, 2.1)]
    assert dots("t", "d", narrow, Axis("x")).note == "The intervals are narrower than the marks."
    assert dots("t", "d", [row("a", 2.0, 1.0, 3.0)], Axis("x")).note == ""
    assert dots("t", "d", [row("a", 2.0)], Axis("x")).note == ""


def test_marks_of_a_row_are_below_each_other_unless_joined() -> None:
    marks = [Mark(Measure(1.0), "base", ""), Mark(Measure(2.0), "final", "")]
    apart = dots("t", "d", [Row("a", marks, "2")], Axis("x"))
    joined = dots("t", "d", [Row("a", marks, "2")], Axis("x", joined=True))
    first, second = places(apart, "circle", "cy", "mark")
    assert second - first >= 9
    assert len(set(places(joined, "circle", "cy", "mark"))) == 1
    assert len(places(joined, "line", "x1", "stem")) == 1


@given(st.lists(st.tuples(st.text(max_size=40), SIZES), min_size=1, max_size=6))
def test_any_figures_can_be_drawn(given_rows: list[tuple[str, float]]) -> None:
    rows = [row(re.sub("[^\t -\ud7ff]", "?", label), value, value, value) for label, value in given_rows]
    plot = dots("t", "d", [Row(r.label, r.marks, "1.00") for r in rows], Axis("x"))
    for x in places(plot, "circle", "cx", "mark"):
        assert 0 <= x <= svg.WIDTH
    assert "nan" not in plot.drawing and "inf" not in plot.drawing


@given(st.lists(st.tuples(st.integers(0, 10**9), SIZES), min_size=1, max_size=80, unique_by=lambda p: p[0]))
def test_any_log_can_be_drawn(points: list[tuple[int, float]]) -> None:
    line = Line("plus", [(float(x), y) for x, y in sorted(points)])
    plot = curves("t", "d", [line, Line("alpaca", [(x + 10**9, y) for x, y in line.points])], "step", "nats")
    for text in re.findall(r' d="M([^"]*)"', plot.drawing):
        for x in re.findall(r"(?:^|L)(\S+) ", text):
            assert 0 <= float(x) <= svg.WIDTH
    drawn(plot)
    assert "nan" not in plot.drawing and "inf" not in plot.drawing.replace("infinite", "")


@given(SIZES, SIZES)
def test_ticks_are_few_ordered_and_inside(one: float, other: float) -> None:
    low, high = svg.domain([one, other])
    found = svg.ticks(low, high)
    assert len(found) <= 6 and found == sorted(found)
    assert all(low - abs(low) * 1e-6 - 1e-9 <= tick <= high + abs(high) * 1e-6 + 1e-9 for tick in found)


def test_ticks_are_round() -> None:
    assert svg.ticks(0, 19) == [0, 5, 10, 15]
    assert svg.ticks(2.12, 2.19) == [2.12, 2.14, 2.16, 2.18]
    assert svg.domain([17.0, 8.0]) == (0.0, 17.0 * 1.06)
    low, high = svg.domain([2.1, 2.2])
    assert 2.0 < low < 2.1 and 2.2 < high < 2.3


def test_smooth_keeps_a_slope_and_calms_noise() -> None:
    slope = [(float(x), 3.0 * x) for x in range(200)]
    assert smooth(slope) == slope
    noisy = [(float(x), (-1.0) ** x) for x in range(200)]
    assert max(abs(y) for _, y in smooth(noisy)[5:-5]) < 0.2
    assert smooth([(0.0, 1.0)]) == [(0.0, 1.0)]


def test_thin_keeps_both_ends() -> None:
    points = [(float(x), 0.0) for x in range(1000)]
    assert len(thin(points, 50)) == 50
    assert thin(points, 50)[0] == points[0] and thin(points, 50)[-1] == points[-1]
    assert thin(points[:3], 50) == points[:3]


def test_a_long_log_is_faint_below_a_smooth_line() -> None:
    points = [(float(x), 5.0 + (-1) ** x) for x in range(200)]
    assert 'class="faint"' in curves("t", "d", [Line("a", points)], "step", "y").drawing
    few = curves("t", "d", [Line("a", points[:10])], "step", "y").drawing
    assert 'class="faint"' not in few and few.count('class="dot"') == 10


def test_long_labels_are_wrapped_and_then_cut() -> None:
    assert svg.wrap("merged", 128) == ["merged"]
    assert svg.wrap("plus (continued pretraining)", 128) == ["plus (continued", "pretraining)"]
    assert svg.wrap("x" * 80, 128)[0].endswith("…")
    assert svg.width(svg.fit("中文" * 30, 100)) <= 100
    assert "<title>" in svg.words(0, 0, "a…", whole="abc") and 'lang="zh-Hans"' in svg.words(0, 0, "中")


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_the_figures_of_an_axis_stand_apart(one: float, other: float) -> None:
    figures = {"a corpus with a name": one, "b": other, "c": 0.0}
    rows = [Row(name, [Mark(Measure(value), "stage", "")], "+12.3 %") for name, value in figures.items()]
    plot = dots("t", "d", rows, Axis("change", "%", at=[(0.0, "")]))
    told = [e for e in drawn(plot).iter("text") if (e.text or "").endswith(" %") and e.get("class") == "soft"]
    spans = [(float(e.attrib["x"]), svg.width(e.text or "") / 2) for e in told]
    for (left, half), (right, other_half) in pairwise(spans):
        assert right - other_half - left - half > 3
