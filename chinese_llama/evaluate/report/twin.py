"""The report as Markdown (GitHub-flavoured): the facts of the page as tables."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from typing import Any

from chinese_llama.evaluate.report.blocks import Block, Card, Cell, Evidence, Sample, Table, Terms
from chinese_llama.evaluate.report.outline import heading, sections
from chinese_llama.evaluate.report.summary import summary
from chinese_llama.evaluate.report.values import ARROW
from chinese_llama.evaluate.report.view import view

# What Markdown would read as more than the character; “[1, 2]” and “pt_lora” stay readable.
SPECIAL = re.compile(r"[\\`*|~$]|(?<=\])[(:]|\^(?<=\[\^)|(?<![^\W_])_|_(?![^\W_])")
STARTS = re.compile(r"^(#|[-+=](?=[-+=\s]|$)|\d{1,9}[.)](?=\s|$))")  # of a heading, a list, a rule


def markdown(told: dict[str, Any]) -> str:
    """The report of `told` (chinese_llama.evaluate.report.view has the schema) as Markdown."""
    seen = view(told)
    title, when = heading(seen)
    first = summary(seen)
    blocks = [f"# {escape(title)}", escape(when), *(escape(said) for _, said in first.verdict)]
    for name, cards in first.groups:
        blocks += [f"**{name}**", _table(_cards(cards))]
    for section in sections(seen):
        blocks.append(f"## {escape(section.title)}")
        blocks += [text for block in section.blocks for text in _block(block)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def escape(text: str) -> str:
    """Words of others as one line that Markdown shows as they are; line ends become <br>."""
    safe = SPECIAL.sub(r"\\\g<0>", html.escape(text.strip(), quote=False))
    safe = STARTS.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", safe)
    return safe.replace("\n", "<br>").replace("\t", " ")


def _cards(cards: Sequence[Card]) -> Table:
    rows: list[list[Cell | str]] = []
    for card in cards:
        figures = f"{card.before} {ARROW} {card.after}" if card.before else card.after
        rows.append([card.what, figures, card.unit, card.line])
    return Table(["", "", "unit", ""], rows, words=4)


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield escape(block)
    elif isinstance(block, Terms):
        yield "\n".join(f"- **{escape(term)}**: {escape(said)}" for term, said in block.said)
    elif isinstance(block, Evidence):
        for plot in block.plots:
            yield f"{escape(plot.title)}."
        for table in block.tables:
            yield from _block(table)
    elif isinstance(block, Sample):
        yield from _sample(block)
    else:
        note = f"\n\n{escape(block.note)}" if block.note else ""
        drawn = _table(block) + note
        yield (
            f"<details><summary>{html.escape(block.folded)}</summary>\n\n{drawn}\n\n</details>"
            if block.folded
            else drawn
        )


def _sample(sample: Sample) -> Iterator[str]:
    yield f"### {escape(' '.join(sample.prompt.split())) or '(empty)'}"
    rows: list[list[Cell | str]] = []
    for answer in sample.answers:
        found = "" if answer.found is None else "yes" if answer.found else "no"
        rows.append([answer.label, *([found] if sample.keyword else []), answer.text])
    head = ["stage", *([f"holds “{sample.keyword}”"] if sample.keyword else []), "answer"]
    yield _table(Table(head, rows, words=3))


def _table(table: Table) -> str:
    marks = ["---" if index < table.words else "---:" for index in range(len(table.head))]
    lines = [[escape(name) for name in table.head], marks, *(map(_cell, row) for row in table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return escape(cell)
    text = cell.full or cell.text
    shown = _code(text) if cell.code and text else escape(text)
    return f"{shown} {escape(cell.small)}" if cell.small else shown


def _code(text: str) -> str:
    """Inline code, whatever the text holds. A bar is escaped in a table even there."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    air = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{air}{text}{air}{ticks}".replace("|", "\\|")
