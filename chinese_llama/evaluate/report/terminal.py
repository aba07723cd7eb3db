"""The report for a terminal: the table of stages, right answers, sample answers."""

from __future__ import annotations

from itertools import islice
from typing import Any

from chinese_llama.evaluate.report.made import rights
from chinese_llama.evaluate.report.summary import summary
from chinese_llama.evaluate.report.values import columns, cut, fixed, mapping, one_line
from chinese_llama.evaluate.report.view import View, view

ACROSS = 3  # figures in a row: 98 columns with the stage
LABEL, FIGURE, SAID = 32, 28, 400  # columns of a stage's name at most, of a figure; of an answer at most


def text(told: dict[str, Any]) -> str:
    """The report of `told` (chinese_llama.evaluate.report.view has the schema) in some lines."""
    seen = view(told)
    lines: list[str] = []
    figures = iter(_figures(seen))
    while block := list(islice(figures, ACROSS)):
        lines += ["", *_table(seen, block)]
    lines += ["", *(said for _, said in summary(seen).verdict)]
    if right := _right(seen):
        lines += ["", right]
    for sample in seen.samples():
        lines.append("")
        for name, said in mapping(sample["answers"]).items():
            lines.append(f"[{seen.stage(name).label}] {cut(one_line(sample.get('prompt')), SAID)}")
            lines.append(f"    {cut(one_line(said), SAID)}")
    return "\n".join([*lines, ""])


def _figures(seen: View) -> list[tuple[str, list[str]]]:
    """(heading, a cell for each stage): tokens and bits per character of texts such as Chinese, bits per byte of
    others."""
    found = []
    for name in seen.texts:
        shown = cut(one_line(name), 8)
        bits = [stage.bits(name, "character" if seen.by_character(name) else "byte") for stage in seen.stages]
        cells = [fixed(one.value) if one else "-" for one in bits]
        if seen.by_character(name):
            tokens = [fixed(stage.tokens_per_character(name)) or "-" for stage in seen.stages]
            found.append((f"tokens per character ({shown})", tokens))
            found.append((f"bits per character ({shown})", cells))
        else:
            found.append((f"bits per byte ({shown})", cells))
    return found


def _table(seen: View, block: list[tuple[str, list[str]]]) -> list[str]:
    labels = [cut(stage.label, LABEL) for stage in seen.stages]
    side = max(14, *(columns(label) + 2 for label in labels))
    lines = [" " * side + "".join(_right_aligned(name) for name, _ in block)]
    for index, label in enumerate(labels):
        cells = "".join(_right_aligned(cells[index]) for _, cells in block)
        lines.append(label + " " * (side - columns(label)) + cells)
    return lines


def _right_aligned(cell: str) -> str:
    return " " * (max(FIGURE, columns(cell) + 2) - columns(cell)) + cell


def _right(seen: View) -> str:
    """One sentence, the final stage first."""
    said = [f"{told} ({part}) by {label}" for label, told, part in rights(seen)]
    return f"Questions answered with the right word: {'; '.join(said)}." if said else ""
