"""The section on multiple-choice exams and WikiText."""

from __future__ import annotations

from typing import Any

from chinese_llama.evaluate.report.blocks import Block, Cell, Evidence, Plot, Section, Table, Terms
from chinese_llama.evaluate.report.dots import Axis, Mark, Row, dots
from chinese_llama.evaluate.report.measured import stage_cell
from chinese_llama.evaluate.report.values import (
    Measure,
    count,
    fixed,
    items,
    mapping,
    number,
    one_line,
    share,
    share_ends,
    shares,
)
from chinese_llama.evaluate.report.view import Stage, View
from chinese_llama.evaluate.wins import wilson

NAMES = {"ceval": "C-Eval", "cmmlu": "CMMLU"}
CHANCE = 0.25  # four options
NAMED = 5  # subjects that are not there, before they are counted
ACCURACY = (
    "Accuracy",
    "the share of questions answered right; guessing gives 25 %. Whiskers and brackets are 95 % intervals (1.96 "
    "standard errors).",
)
Taken = list[tuple[Stage, dict[str, Any]]]


def exams(view: View) -> Section | None:
    """Exams by category and subject, and perplexity on WikiText."""
    names = list(dict.fromkeys(name for stage in view.stages for name in stage.exams()))
    blocks: list[Block] = [block for name in names for block in _exam(view, name)]
    blocks += [Terms([ACCURACY])] if names else []
    blocks += _wikitext(view)
    return Section("Multiple choice" if names else "WikiText", blocks) if blocks else None


def title(name: str) -> str:
    return NAMES.get(name, one_line(name))


def accuracy(told: Any) -> Measure | None:
    """Accuracy with its 95 % interval: Wilson's where it is that of so many `questions` of one subject (they may all be
    right), else 1.96 standard errors on either side, within 0 to 1."""
    figures = mapping(told)
    found, error = number(figures.get("accuracy")), number(figures.get("stderr"))
    asked = round(number(figures.get("questions")) or 0)
    if found is not None and 0 <= found <= 1 and asked > 0 and "category" in figures:
        return Measure(found, *wilson(round(found * asked), asked))
    if found is None or error is None or error < 0:
        return None if found is None else Measure(found)
    return Measure(found, max(0.0, found - 1.96 * error), min(1.0, found + 1.96 * error))


def _exam(view: View, name: str) -> list[Block]:
    taken = [(stage, stage.exams()[name]) for stage in view.stages if name in stage.exams()]
    plot = _plot(name, taken)
    blocks: list[Block] = [Evidence([plot] if plot else [], [_categories(name, taken)])]
    subjects = _keys(taken, "subjects")
    return [*blocks, _subjects(name, taken, subjects)] if subjects else blocks


def _keys(taken: Taken, part: str) -> list[str]:
    return list(dict.fromkeys(key for _, exam in taken for key in mapping(exam.get(part))))


def _of(exam: dict[str, Any], part: str, key: str) -> Measure | None:
    return accuracy(mapping(exam.get(part)).get(key))


def _plot(name: str, taken: Taken) -> Plot | None:
    """The base, the final stage and controls by category; all stages are in the table."""
    shown = [(stage, exam) for stage, exam in taken if stage.kind != "stage"] or taken[-1:]
    last, best = next(((s, e) for s, e in shown if s.kind == "final"), shown[-1])
    rows = []
    for group in _keys(shown, "categories"):
        marks = [
            Mark(found, stage.kind, f"{stage.label}, {one_line(group)}: {shares(found)}")
            for stage, exam in shown
            if (found := _of(exam, "categories", group))
        ]
        end = _of(best, "categories", group)
        if marks:
            rows.append(Row(one_line(group), marks, share(end.value) if end else ""))
    if not rows:
        return None
    average = accuracy(best.get("average"))
    said = f": {last.label} answers {share(average.value)} right" if average else " by category"
    first = next((accuracy(exam.get("average")) for stage, exam in shown if stage.kind == "base"), None)
    if average and first and last.kind != "base":
        base = next(stage for stage, _ in shown if stage.kind == "base")
        said += f", {base.label} {share(first.value)}"
    described = "Accuracy by category, with 95 % intervals; the line at 25 % is what guessing gives."
    axis = Axis("share answered right", "%", zero=True, at=[(CHANCE, "chance")])
    return dots(
        f"{title(name)}{said}",
        described,
        rows,
        axis,
        legend=[(stage.kind, stage.label) for stage, _ in shown],
    )


def _cells(taken: Taken, part: str, key: str) -> list[Cell]:
    found = [_of(exam, part, key) for _, exam in taken]
    return [_cell(one) for one in found]


def _cell(one: Measure | None) -> Cell:
    return Cell(share(one.value, 1), share_ends(one, 1)) if one else Cell("")


def _categories(name: str, taken: Taken) -> Table:
    head = [title(name), *(stage.label for stage, _ in taken), "questions"]
    rows: list[list[Cell | str]] = []
    for group in _keys(taken, "categories"):
        asked = next((mapping(mapping(exam.get("categories")).get(group)) for _, exam in taken), {})
        rows.append([one_line(group), *_cells(taken, "categories", group), count(asked.get("questions"))])
    average = [_cell(accuracy(exam.get("average"))) for _, exam in taken]
    exam = taken[-1][1]
    rows.append([Cell("average", kind="final"), *average, count(exam.get("questions"))])
    shots = count(exam.get("shots"))
    said = [f"{shots} {'example' if shots == '1' else 'examples'} before each question"] if shots else []
    said += [one_line(exam[key]) for key in ("place", "source") if one_line(exam.get(key))]
    missing = [one_line(subject) for subject in items(exam.get("missing"))]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        said.append(f"not there, and not counted: {', '.join(missing[:NAMED])}{more}")
    return Table(head, rows, note=f"{'; '.join(said)}." if said else "")


def _subjects(name: str, taken: Taken, subjects: list[str]) -> Table:
    head = ["subject", "category", *(stage.label for stage, _ in taken), "questions"]
    rows: list[list[Cell | str]] = []
    for subject in subjects:
        told: dict[str, Any] = {}
        for _, exam in taken:
            told |= mapping(mapping(exam.get("subjects")).get(subject))
        cells = _cells(taken, "subjects", subject)
        rows.append([one_line(subject), one_line(told.get("category")), *cells, count(told.get("questions"))])
    return Table(head, rows, words=2, folded=f"{title(name)}: all {len(subjects)} subjects")


def _wikitext(view: View) -> list[Block]:
    keys = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    rows: list[list[Cell | str]] = []
    for stage in view.stages:
        figures = mapping(stage.told.get("wikitext"))
        cells = [fixed(number(figures.get(key)), 3 if key != keys[0] else 2) for key in keys]
        if any(cells):
            rows.append([stage_cell(stage), *cells])
    if not rows:
        return []
    return [Table(["WikiText", "perplexity per word", "per byte", "bits per byte"], rows)]
