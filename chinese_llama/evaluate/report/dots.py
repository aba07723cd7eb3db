"""Dot plots: a row for each thing, marks with whiskers along one axis, the figure at the end of the row."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from chinese_llama.evaluate.report import svg
from chinese_llama.evaluate.report.blocks import Plot
from chinese_llama.evaluate.report.values import Measure

ROW, BAND, TOP = 26.0, 10.0, 8.0  # height of a row, of a further mark in it, of what is above the rows
WORDS = (44.0, 128.0)  # least and most width of the labels


@dataclass(frozen=True)
class Mark:
    measure: Measure
    kind: str  # base, stage, final, control
    told: str  # what a pointer that rests on it reads


@dataclass(frozen=True)
class Row:
    """`shown` is the figure at the end of the row, `limit` a value that it should not pass."""

    label: str
    marks: Sequence[Mark]
    shown: str
    limit: float | None = None
    apart: bool = False  # a rule above, as before controls
    beyond: bool = False  # the limit is exceeded


@dataclass(frozen=True)
class Axis:
    label: str
    unit: str = ""  # "%" for shares
    zero: bool = False  # the axis starts at zero
    range: tuple[float, float] | None = None
    at: Sequence[tuple[float, str]] = ()  # lines across all rows, with what they are
    stems: bool = False  # lines from zero to the marks, for amounts
    joined: bool = False  # a line between the marks of a row


def dots(
    title: str, description: str, rows: Sequence[Row], axis: Axis, legend: Sequence[tuple[str, str]] = ()
) -> Plot:
    """A plot of `rows`; marks of a row are below each other, unless they are joined."""
    names = min(WORDS[1], max(WORDS[0], max(svg.width(row.label) for row in rows) + 2))
    figures = max(svg.width(row.shown) for row in rows) + 8
    low, high = axis.range or span(rows, axis)
    scale = svg.Scale(low, high, names + 10, svg.WIDTH - figures - 8)
    heads = [label for _, label in axis.at if label]
    top = TOP + (14 if heads else 0)
    heights = [_height(row, names, axis) for row in rows]
    starts = [top + sum(heights[:i]) + 8 * sum(r.apart for r in rows[: i + 1]) for i in range(len(rows))]
    bottom = starts[-1] + heights[-1]
    drawn = [*_grid(scale, axis, TOP if not heads else top - 2, bottom)]
    for row, start, height in zip(rows, starts, heights, strict=True):
        drawn += _row(row, start, height, names, scale, axis)
    marks = [mark.measure for row in rows for mark in row.marks if mark.measure.half]
    hidden = bool(marks) and all(scale(one.high or 0) - scale(one.low or 0) < 10 for one in marks)
    note = "The intervals are narrower than the marks." if hidden else ""
    return Plot(title, description, "".join(drawn), bottom + 36, legend, note)


def _height(row: Row, names: float, axis: Axis) -> float:
    lines = len(svg.wrap(row.label, names))
    return max(ROW + (0 if axis.joined else BAND * (len(row.marks) - 1)), 10 + 14.0 * lines)


def span(rows: Sequence[Row], axis: Axis) -> tuple[float, float]:
    """What the axis has to show of rows."""
    values = [value for row in rows for mark in row.marks for value in mark.measure.span]
    values += [row.limit for row in rows if row.limit is not None] + [at for at, _ in axis.at]
    return svg.domain(values, axis.zero)


def _grid(scale: svg.Scale, axis: Axis, top: float, bottom: float) -> list[str]:
    """Faint lines at round numbers, these below, and what the axis counts."""
    drawn = []
    for tick in _ticks(scale, axis.unit):
        drawn.append(svg.line(scale(tick), top, scale(tick), bottom, "grid"))
        drawn.append(svg.words(scale(tick), bottom + 14, svg.tick_label(tick, axis.unit), "soft", "middle"))
    for at, label in axis.at:
        drawn.append(svg.line(scale(at), top, scale(at), bottom, "rule" if label else "zero"))
        drawn.append(svg.words(scale(at), top - 4, label, "soft", "middle") if label else "")
    middle = (scale.start + scale.end) / 2
    return [*drawn, svg.words(_held(middle, axis.label), bottom + 30, axis.label, "soft", "middle")]


def _ticks(scale: svg.Scale, unit: str) -> list[float]:
    """Round numbers, as many as have room for their labels beside each other."""
    for most in (5, 4, 3, 2):
        found = svg.ticks(scale.low, scale.high, most)
        widest = max((svg.width(svg.tick_label(tick, unit)) for tick in found), default=0.0)
        if len(found) < 2 or scale(found[1]) - scale(found[0]) >= widest + 8:
            break
    return found


def _held(middle: float, label: str) -> float:
    """Where a centred label has to be to stay inside the drawing."""
    half = svg.width(label) / 2
    return min(max(middle, half), max(svg.WIDTH - half, svg.WIDTH / 2))


def _row(row: Row, start: float, height: float, names: float, scale: svg.Scale, axis: Axis) -> list[str]:
    middle = start + height / 2
    drawn = [svg.line(0, start - 4, svg.WIDTH, start - 4, "grid")] if row.apart else []
    lines = svg.wrap(row.label, names)
    for index, text in enumerate(lines):
        y = middle + 4 + 14 * (index - (len(lines) - 1) / 2)
        drawn.append(svg.words(0, y, text, whole="" if text == row.label else row.label))
    kind = "figure bad" if row.beyond else "figure"
    drawn.append(svg.words(svg.WIDTH, middle + 4, row.shown, kind, "end"))
    first = middle - (0 if axis.joined else BAND * (len(row.marks) - 1) / 2)
    if axis.joined and len(row.marks) > 1:
        spread = [scale(mark.measure.value) for mark in row.marks]
        drawn.append(svg.line(min(spread), middle, max(spread), middle, "stem"))
    for index, one in enumerate(row.marks):
        drawn.append(_mark(one, first + (0 if axis.joined else BAND * index), scale, axis))
    if row.limit is not None:
        x = scale(row.limit)
        drawn.append(svg.line(x, start + 3, x, start + height - 3, "limit"))
    return drawn


def _mark(one: Mark, y: float, scale: svg.Scale, axis: Axis) -> str:
    measure = one.measure
    drawn = [f"<title>{html.escape(one.told)}</title>"]
    if axis.stems:
        drawn.append(svg.line(scale(max(0.0, scale.low)), y, scale(measure.value), y, f"stem {one.kind}"))
    if measure.low is not None and measure.high is not None:
        low, high = scale(measure.low), scale(measure.high)
        drawn.append(svg.line(low, y, high, y, f"whisker {one.kind}"))
        drawn += [svg.line(x, y - 3.5, x, y + 3.5, f"whisker {one.kind}") for x in (low, high)]
    drawn.append(svg.mark(scale(measure.value), y, one.kind))
    return f"<g>{''.join(drawn)}</g>"
