"""The section on training: loss, and what was measured meanwhile."""

from __future__ import annotations

from typing import Any

from chinese_llama.evaluate.report.blocks import Block, Cell, Evidence, Plot, Section, Table
from chinese_llama.evaluate.report.curves import Line, Points, curves, smooth, thin
from chinese_llama.evaluate.report.values import ARROW, count, fixed, mapping, number, one_line, records
from chinese_llama.evaluate.report.view import View, text_label

LISTED = 25  # entries of a log in a table
Log = list[dict[str, Any]]  # entries that have a step
Logs = dict[str, Log]  # by the label of a stage


def training(view: View) -> Section | None:
    logs = _logs(view)
    across = "characters" if logs and all(_counted(log) for log in logs.values()) else "step"
    losses = {label: _points(log, across, "loss") for label, log in logs.items()}
    plots = [_loss_plot(label, points, across) for label, points in losses.items() if points]
    controls = {stage.label for stage in view.controls}
    way = {label: log for label, log in logs.items() if label not in controls}
    apart = [{label: log} for label, log in logs.items() if label in controls]
    measured = [
        plot
        for chain in (way, *apart)
        for text in _texts(chain)
        if (plot := _bits_plot(view, chain, text, across))
    ]
    calmed = any('class="faint"' in plot.drawing for plot in plots)
    tables = [_table(label, log, across) for label, log in logs.items()]
    blocks: list[Block] = []
    if plots:
        blocks.append(
            "The loss is what the training lowers, in nats per token, so it does not compare between vocabularies."
            + (" Faint: what was logged; the line: its mean over a twentieth of the log." if calmed else "")
        )
        blocks.append(Evidence(plots, [] if measured else tables))
    if measured:
        blocks.append(
            "Measured during the training, on a part of the texts; the stages stand one after the other, a control apart."
        )
        blocks.append(Evidence(measured, tables))
    return Section("Training", blocks) if blocks else None


def _logs(view: View) -> Logs:
    """Logs by the label of their stage (two of one label stay two)."""
    found: Logs = {}
    for name, log in mapping(view.told.get("curves")).items():
        entries = [entry for entry in records(log) if number(entry.get("step")) is not None]
        label = view.stage(name).label or "training"
        while label in found:
            label += " "
        if entries:
            found[label] = sorted(entries, key=lambda entry: float(entry["step"]))
    return found


def _counted(log: Log) -> bool:
    """Whether every entry tells how many characters were read, ever more of them."""
    read = [number(entry.get("characters")) for entry in log]
    known = [value for value in read if value is not None]
    return len(known) == len(read) and known == sorted(known)


def _points(log: list[dict[str, Any]], across: str, key: str) -> Points:
    found = [(number(entry.get(across)), number(entry.get(key))) for entry in log]
    return [(x, y) for x, y in found if x is not None and y is not None]


def _across(across: str) -> str:
    return "characters read" if across == "characters" else across


def _loss_plot(label: str, points: Points, across: str) -> Plot:
    calm = smooth(points)
    first, last = calm[0][1], calm[-1][1]
    way = "falls" if last < first else "rises" if last > first else "stays"
    places = f"from {fixed(first)} to {fixed(last)}" if way != "stays" else f"at {fixed(last)}"
    title = f"{label}: the loss {way} {places}" if len(points) > 1 else f"{label}: a loss of {fixed(last)}"
    described = f"Training loss of {label}, {len(points):,} logged values, against {_across(across)}."
    return curves(title, described, [Line(label, points)], _across(across), "nats per token")


def _texts(logs: Logs) -> list[str]:
    return list(dict.fromkeys(t for log in logs.values() for e in log for t in mapping(e.get("eval"))))


def _bits_plot(view: View, logs: Logs, text: str, across: str) -> Plot | None:
    """What was measured of a text, stage after stage on one axis."""
    unit = "character" if view.by_character(text) else "byte"
    lines, begin = [], 0.0
    for label, log in logs.items():
        flat = [
            {**entry, **mapping(mapping(entry.get("eval")).get(text))} for entry in log if entry.get("eval")
        ]
        points = _points(flat, across, f"bits_per_{unit}")
        if points:
            lines.append(Line(label, [(begin + x, y) for x, y in points]))
        begin += max(number(entry.get(across)) or 0.0 for entry in log)
    if not lines:
        return None
    first, last = lines[0].points[0][1], lines[-1].points[-1][1]
    places = 3 if max(first, last) < 5 else 2
    who = f"{lines[0].label}, " if lines[0].label in {stage.label for stage in view.controls} else ""
    title = f"{who}{text_label(text)}: {fixed(first, places)} {ARROW} {fixed(last, places)} bits per {unit}"
    described = f"Bits per {unit} of {text_label(text)} during {', '.join(one.label for one in lines)}."
    return curves(title, described, lines, _across(across), f"bits per {unit}")


def _table(label: str, log: Log, across: str) -> Table:
    """The log, thinned to LISTED entries and those that measured."""
    places = thin([(index, 0.0) for index in range(len(log))], LISTED)
    kept = [log[int(index)] for index, _ in places]
    kept += [e for e in log if e.get("eval") and e not in kept]
    kept.sort(key=lambda entry: float(entry["step"]))
    texts = _texts({"": kept})
    head = ["step", *(["characters read"] if across == "characters" else []), "loss", "learning rate"]
    head += [f"{one_line(text)}, bits per byte" for text in texts]
    rows: list[list[Cell | str]] = []
    for entry in kept:
        measured = [mapping(mapping(entry.get("eval")).get(text)).get("bits_per_byte") for text in texts]
        row: list[Cell | str] = [count(entry["step"])]
        row += [count(entry.get("characters"))] if across == "characters" else []
        rate = number(entry.get("learning_rate"))
        row += [fixed(number(entry.get("loss")), 3), f"{rate:.3g}" if rate is not None else ""]
        rows.append([*row, *(fixed(number(one), 3) for one in measured)])
    folded = f"{label}: {len(kept)} of {len(log):,} entries of the log"
    return Table(head, rows, words=0, folded=folded)
