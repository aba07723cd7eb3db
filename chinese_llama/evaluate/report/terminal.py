"""The report for a terminal: the table of stages, right answers, sample answers."""

from __future__ import annotations

from typing import Any

from chinese_llama.evaluate.report.made import rights
from chinese_llama.evaluate.report.summary import summary
from chinese_llama.evaluate.report.values import cut, fixed, mapping, one_line
from chinese_llama.evaluate.report.view import View, view
from chinese_llama.evaluate.table import aligned

WIDE, LABEL, SAID = 98, 32, 400  # columns: of the table, of a stage's name, of an answer, at most


def text(told: dict[str, Any]) -> str:
    """The report of `told` (chinese_llama.evaluate.report.view has the schema) in some lines."""
    seen = view(told)
    figures = _figures(seen)
    rows = [["", *(name for name, _ in figures)]]
    rows += [
        [cut(stage.label, LABEL), *(cells[i] for _, cells in figures)] for i, stage in enumerate(seen.stages)
    ]
    lines = ["", *aligned(rows, WIDE)] if figures else []
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
            found.append((f"tokens/character ({shown})", tokens))
            found.append((f"bits/character ({shown})", cells))
        else:
            found.append((f"bits/byte ({shown})", cells))
    return found


def _right(seen: View) -> str:
    """One sentence, the final stage first."""
    said = [f"{told} ({part}) by {label}" for label, told, part in rights(seen)]
    return f"Questions answered with the right word: {'; '.join(said)}." if said else ""
