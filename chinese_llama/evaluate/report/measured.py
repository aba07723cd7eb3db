"""The sections on bits by stage and on forgetting."""

from __future__ import annotations

from collections.abc import Callable

from chinese_llama.evaluate.compare import FEW
from chinese_llama.evaluate.report.blocks import Block, Cell, Evidence, Plot, Section, Table, Terms
from chinese_llama.evaluate.report.dots import Axis, Mark, Row, dots, span
from chinese_llama.evaluate.report.values import (
    ARROW,
    Measure,
    change,
    changes,
    count,
    decimals,
    ends,
    fixed,
    number,
)
from chinese_llama.evaluate.report.view import Change, Comparison, Stage, View, text_label

BITS = (
    (
        "Bits per character",
        "how many bits the model needs on average to spell out the next character of text that it has not seen. It "
        "does not depend on how a tokenizer cuts the text, so models with different vocabularies compare directly. "
        "Lower is better.",
    ),
    ("Bits per byte", "the same, for each byte of UTF-8: Chinese has three a character, English one."),
    (
        "Interval",
        "in brackets: where 95 % of the figures lie when the documents are drawn again at random (bootstrap): how much "
        "of the figure is the choice of documents.",
    ),
    (
        "Unmerged and merged",
        "a stage of training leaves an adapter beside its model (unmerged); merging adds the adapters to the weights, "
        "so that a plain model remains (merged). Equal figures show that nothing was lost in merging.",
    ),
)
CONTROL = (
    "Control",
    "the base trained on the same text without the new vocabulary. The distance to it is what the new vocabulary "
    "itself contributes.",
)
VERDICT = (
    "Verdict",
    "better or worse where the whole interval of the change lies on one side of zero, else “no difference shown”. "
    "Both models read the same documents, so documents are compared one by one.",
)
LIMIT = ("Limit", "how much worse a text was allowed to get; chosen before the training.")


def stage_cell(stage: Stage) -> Cell:
    return Cell(stage.label, kind=stage.kind)


def by_stage(view: View, of: Callable[[Stage], Measure | None], shown: Callable[[Measure], str]) -> list[Row]:
    """A row for each stage that has the figure; controls come last, below a rule."""
    rows: list[Row] = []
    for stage in sorted(view.stages, key=lambda stage: stage.kind == "control"):
        found = of(stage)
        if found is None:
            continue
        told = f"{stage.label}: {shown(found)} {ends(found, 3)}".strip()
        apart = stage.kind == "control" and bool(rows) and not any(row.apart for row in rows)
        rows.append(Row(stage.label, [Mark(found, stage.kind, told)], shown(found), apart=apart))
    return rows


def bits_plot(view: View, text: str, unit: str) -> Plot | None:
    """Bits per `unit` of a text by stage."""
    found = {stage.name: stage.bits(text, unit) for stage in view.stages}
    places = decimals(found.values())
    rows = by_stage(view, lambda stage: found[stage.name], lambda one: fixed(one.value, places))
    if not rows:
        return None
    name = text_label(text)
    title = f"{name}: bits per {unit} by stage"
    first, last = (found.get(stage.name) if stage else None for stage in (view.base, view.final))
    if first and last and view.base and view.final:
        told = f"{fixed(first.value, places)} {ARROW} {fixed(last.value, places)} bits per {unit}"
        title = f"{name}: {told} from {view.base.label} to {view.final.label}"
    low = span(rows, Axis(""))[0]
    label = f"bits per {unit}" + ("" if low == 0 else ", axis does not start at 0")
    described = (
        f"Bits per {unit} of {name} for each stage, with 95 % intervals where computed. Lower is better."
    )
    return dots(title, described, rows, Axis(label))


def bits(view: View) -> Section | None:
    if not view.texts:
        return None
    blocks: list[Block] = []
    for text in [text for text in view.texts if view.by_character(text)]:
        plot = bits_plot(view, text, "character")
        if plot:
            blocks.append(Evidence([plot], [_figures(view, text, short=True)]))
    plots = [plot for text in view.texts if (plot := bits_plot(view, text, "byte"))]
    if plots:
        blocks.append(Evidence(plots, [_bytes(view)]))
    blocks += [_figures(view, text) for text in view.texts]
    blocks.append(Terms([*BITS, CONTROL] if view.controls else BITS))
    return Section("Bits by stage", blocks)


def _bits_cells(view: View, text: str, unit: str) -> dict[str, Cell]:
    found = {stage.name: stage.bits(text, unit) for stage in view.stages}
    places = decimals(found.values())
    return {
        name: Cell(fixed(one.value if one else None, places), ends(one, places))
        for name, one in found.items()
    }


def _figures(view: View, text: str, short: bool = False) -> Table:
    """All figures of a text by stage; `short` for the table beside a plot."""
    units = ["character"] if short else ["character", "byte"]
    cells = [_bits_cells(view, text, unit) for unit in units]
    head = ["stage", *(f"bits per {unit}" for unit in units), "tokens per character"]
    rows: list[list[Cell | str]] = []
    for stage in view.measured(text):
        row: list[Cell | str] = [stage_cell(stage), *(column[stage.name] for column in cells)]
        row.append(fixed(stage.tokens_per_character(text)))
        rows.append(row if short else [*row, fixed(number(stage.figures(text).get("perplexity")))])
    if short:
        return Table(head, rows, note=_extent(view, text))
    head.append("perplexity per token")
    folded = f"{text_label(text)}: all figures by stage"
    return Table(head, rows, note=_extent(view, text), folded=folded)


def _extent(view: View, text: str) -> str:
    """How much text was measured, and in what windows."""
    figures = next((stage.figures(text) for stage in view.measured(text)), {})
    said = [f"{count(figures[key])} {key}" for key in ("documents", "characters") if count(figures.get(key))]
    if count(figures.get("window")):
        said.append(f"windows of {count(figures['window'])} tokens")
    few = 0 < (number(figures.get("documents")) or 0) < FEW
    hint = f" With fewer than {FEW} documents, intervals are narrower than they should be." if few else ""
    return f"Measured on {', '.join(said)}.{hint}" if said else ""


def _bytes(view: View) -> Table:
    """Bits per byte: a row for each stage, a column for each text."""
    columns = [_bits_cells(view, text, "byte") for text in view.texts]
    rows = [
        [stage_cell(stage), *(column[stage.name] for column in columns)]
        for stage in view.stages
        if any(stage.figures(text) for text in view.texts)
    ]
    return Table(["bits per byte", *map(text_label, view.texts)], rows)


def forgetting(view: View) -> Section | None:
    """Relative change of each text against a baseline; those that the work was for are left out of the plots,
    where they would dwarf the others, and are in the tables."""
    if not view.comparisons:
        return None
    kept = {id(one): _change_rows(view, one) for one in view.comparisons}
    every = [row for rows in kept.values() for row in rows]
    plots = []
    if every:
        range_ = span(every, Axis("", at=[(0.0, "")]))
        for one in sorted(view.comparisons, key=lambda one: one.stage.kind != "final"):
            if kept[id(one)]:
                plots.append(_change_plot(one, kept[id(one)], range_))
    terms = [VERDICT, *([LIMIT] if any(row.limit is not None for row in every) else [])]
    left_out = [text_label(text) for text in _gains(view)] if plots else []
    note = (
        f"In the table only: {', '.join(left_out)}, where the gain would dwarf the rest." if left_out else ""
    )
    return Section("Forgetting", [Evidence(plots, [_change_table(view, note)]), Terms(terms)])


def _gains(view: View) -> list[str]:
    """The text that the work was for, and those like it that got better everywhere."""
    found: dict[str, set[str]] = {}
    for one in view.comparisons:
        for text, told in one.texts.items():
            found.setdefault(text, set()).add(told.verdict)
    return [
        text
        for text, verdicts in found.items()
        if text == view.chinese or (view.by_character(text) and verdicts == {"better"})
    ]


def _change_rows(view: View, compared: Comparison) -> list[Row]:
    others = [text for text in compared.texts if text not in _gains(view)]
    rows = []
    for text in others or compared.texts:
        one = compared.texts[text]
        if one.difference is None:
            continue
        said, between = changes(one.difference)
        kind = "final" if compared.stage.kind == "final" else compared.stage.kind
        told = Mark(one.difference, kind, f"{text_label(text)}: {said} {between} {one.verdict}".strip())
        rows.append(Row(text_label(text), [told], said, one.limit, beyond=one.broken))
    return rows


def _change_plot(compared: Comparison, rows: list[Row], range_: tuple[float, float]) -> Plot:
    broken = [text_label(text) for text, one in compared.texts.items() if one.broken]
    limited = any(row.limit is not None for row in rows)
    end = (
        f"{', '.join(broken)} beyond the limit"
        if broken
        else "no text beyond its limit"
        if all(row.limit is not None for row in rows)
        else ""
    )
    if not end:
        worst = max(rows, key=lambda row: row.marks[0].measure.value)
        end = f"{worst.label} {worst.shown}"
    title = f"{compared.stage.label} against {compared.baseline.label}: {end}"
    axis = Axis("change of bits; right of zero is worse", "%", range=range_, at=[(0.0, "")])
    described = (
        "Relative change of the bits of each text against the baseline, with 95 % intervals and the limit that "
        "was set."
    )
    return dots(title, described, rows, axis, legend=[("limit", "limit")] if limited else ())


def _change_table(view: View, note: str) -> Table:
    """A row for each comparison, a column for each text, the limits below."""
    texts = list(dict.fromkeys(text for one in view.comparisons for text in one.texts))
    rows: list[list[Cell | str]] = []
    for compared in view.comparisons:
        pair = Cell(f"{compared.stage.label} against {compared.baseline.label}", kind=compared.stage.kind)
        rows.append([pair, *(_change_cell(compared.texts.get(text)) for text in texts)])
    limits: dict[str, set[float]] = {text: set() for text in texts}
    for one in view.comparisons:
        for text, told in one.texts.items():
            limits[text] |= {told.limit} if told.limit is not None else set()
    if any(limits.values()):
        rows.append(["limit", *(" or ".join(map(change, sorted(limits[text]))) for text in texts)])
    return Table(["change of bits", *map(text_label, texts)], rows, note=note)


def _change_cell(one: Change | None) -> Cell:
    """The change, its interval and its verdict."""
    if one is None:
        return Cell("")
    figure, between = changes(one.difference)
    verdict = ", ".join(filter(None, [one.verdict, "limit exceeded" if one.broken else ""]))
    return Cell(figure, f"{between} {verdict}".strip(), kind=one.kind)
