"""Line plots: what was logged while a stage trained."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from chinese_llama.evaluate.report import svg
from chinese_llama.evaluate.report.blocks import Plot
from chinese_llama.evaluate.report.values import brief, fixed

HEIGHT, TOP, HEAD, BOTTOM = 222.0, 20.0, 16.0, 38.0  # of the whole; above, of names, and below what is drawn
MANY = 30  # points: more are drawn faint, with a smooth line over them
DRAWN = 400  # points of a line at most

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """Points in the order of x; `label` stands above where it begins."""

    label: str
    points: Points


def smooth(points: Points) -> Points:
    """The mean of y over a window of a twentieth of the points around each, which is shorter at the ends."""
    half = max(1, len(points) // 40)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)  # symmetric, so that a slope stays one
        low, high = index - reach, index + reach + 1
        found.append((x, (sums[high] - sums[low]) / (high - low)))
    return found


def thin(points: Points, most: int = DRAWN) -> Points:
    """At most `most` of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def curves(title: str, description: str, lines: Sequence[Line], across: str, up: str) -> Plot:
    """One panel: lines one after another on one axis (`across`), with a rule where the next begins."""
    xs = [x for one in lines for x, _ in one.points]
    ys = [y for one in lines for _, y in one.points]
    low, high = svg.domain(ys, near=0.2)
    labels = [svg.tick_label(tick, "") for tick in svg.ticks(low, high, 6)]
    y = svg.Scale(low, high, HEIGHT - BOTTOM, TOP + (HEAD if len(lines) > 1 else 0))
    left = max(map(svg.width, labels), default=0) + 6
    begin = 0.0 if 0 <= min(xs) < 0.1 * max(xs) else min(xs)
    last = lines[-1].points[-1]
    end = fixed(last[1], 3 if abs(last[1]) < 5 else 2)
    x = svg.Scale(
        begin, max(xs) if max(xs) > begin else begin + 1, left, svg.WIDTH - 1.1 * svg.width(end) - 8
    )
    drawn = _axes(x, y, across, up)
    for index, one in enumerate(lines):
        stop = x(lines[index + 1].points[0][0]) if index + 1 < len(lines) else svg.WIDTH
        drawn += _head(one, x, stop, index > 0) if len(lines) > 1 else []
        drawn.append(_line(one, x, y))
    drawn.append(svg.words(x(last[0]) + 7, y(last[1]) + 4, end, "figure"))
    return Plot(title, description, "".join(drawn), HEIGHT)


def _axes(x: svg.Scale, y: svg.Scale, across: str, up: str) -> list[str]:
    drawn = []
    for tick in svg.ticks(y.low, y.high, 6):
        drawn.append(svg.line(x.start, y(tick), x.end, y(tick), "grid"))
        drawn.append(svg.words(x.start - 6, y(tick) + 4, brief(tick), "soft", "end"))
    for tick in svg.ticks(x.low, x.high):
        drawn.append(svg.line(x(tick), y.start, x(tick), y.start + 4, "tick"))
        drawn.append(svg.words(x(tick), y.start + 16, brief(tick), "soft", "middle"))
    drawn.append(svg.line(x.start, y.start, x.end, y.start, "tick"))
    drawn.append(svg.words((x.start + x.end) / 2, HEIGHT - 6, across, "soft", "middle"))
    return [*drawn, svg.words(0, 10, up, "soft")]


def _head(one: Line, x: svg.Scale, stop: float, ruled: bool) -> list[str]:
    """The rule where a stage begins, and its name above where there is room."""
    start = x(one.points[0][0])
    drawn = [svg.line(start, TOP + 6, start, HEIGHT - BOTTOM, "rule")] if ruled else []
    room = stop - start - 8
    if room >= 3 * svg.LETTER:
        drawn.append(svg.words(start + 4, TOP + 10, svg.fit(one.label, room), "soft", whole=one.label))
    return drawn


def _line(one: Line, x: svg.Scale, y: svg.Scale) -> str:
    raw = [(x(a), y(b)) for a, b in thin(one.points)]
    told = f"{one.label}: {brief(one.points[0][1])} to {brief(one.points[-1][1])}"
    if len(one.points) > MANY:
        calm = [(x(a), y(b)) for a, b in thin(smooth(one.points))]
        drawn = svg.path(raw, "faint") + svg.path(calm, "curve")
    else:
        drawn = svg.path(raw, "curve") + "".join(
            f'<circle cx="{svg.attribute(a)}" cy="{svg.attribute(b)}" r="2.4" class="dot"/>' for a, b in raw
        )
    return f"<g><title>{html.escape(told)}</title>{drawn}</g>"
