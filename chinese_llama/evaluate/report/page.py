"""The report as one HTML page: no network, no script, plots inside, for light and dark, phone and paper."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from html import escape
from string import Template
from typing import Any

from chinese_llama.evaluate.report import svg
from chinese_llama.evaluate.report.blocks import (
    Answer,
    Block,
    Card,
    Cell,
    Evidence,
    Plot,
    Sample,
    Section,
    Summary,
    Table,
    Terms,
)
from chinese_llama.evaluate.report.outline import heading, sections
from chinese_llama.evaluate.report.summary import summary
from chinese_llama.evaluate.report.values import ARROW, language
from chinese_llama.evaluate.report.view import view
from chinese_llama.resources import PACKAGE

TEMPLATE = PACKAGE / "evaluate" / "report" / "page.html"
SPREAD = 8  # columns of a table that stands beside its plot, at most
DENSE = 4  # in a table with more columns, intervals stand below their figures,
LONG = 18  # as do those of more characters anywhere
BREAKABLE = re.compile(r"\d %|\[[+−\d.,%]+, [+−\d.,%]+\]")


def html(told: dict[str, Any]) -> str:
    """The report of `told` (chinese_llama.evaluate.report.view has the schema) as a page."""
    seen = view(told)
    title, when = heading(seen)
    parts = sections(seen)
    numbers = itertools.count(1)
    body = [_head(title, when, summary(seen)), _contents(parts)]
    for index, section in enumerate(parts, 1):
        blocks = "".join(_block(block, numbers) for block in section.blocks)
        body.append(f'<section id="s{index}"><h2>{escape(section.title)}</h2>{blocks}</section>')
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(body))


def _tongue(text: str) -> str:
    found = language(text)
    return f' lang="{found}"' if found else ""


def _p(text: str, kind: str = "") -> str:
    names = f' class="{kind}"' if kind else ""
    return f"<p{names}{_tongue(text)}>{_bound(text)}</p>" if text else ""


def _bound(text: str) -> str:
    """Escaped, without breaks inside a percentage and an interval."""
    return escape(BREAKABLE.sub(lambda found: found[0].replace(" ", "\u00a0"), text))


def _head(title: str, when: str, first: Summary) -> str:
    verdict = "".join(
        _p(said, f"verdict {'more' if index else ''} {kind}".strip())
        for index, (kind, said) in enumerate(first.verdict)
    )
    groups = "".join(
        f'<div class="group"><h2>{name}</h2><div class="cards">{"".join(map(_card, cards))}</div></div>'
        for name, cards in first.groups
    )
    named = f"<h1{_tongue(title)}>{escape(title)}</h1>" + _p(when, "when")
    return f"<header>{named}{verdict}{groups}</header>"


def _card(card: Card) -> str:
    before = f'<span class="from">{escape(card.before)} {ARROW}</span> ' if card.before else ""
    figure = f'<p class="big">{before}<strong>{escape(card.after)}</strong></p>'
    said = _p(card.unit, "unit") + _p(card.line, "line")
    return (
        f'<div class="card {card.kind}"><h3{_tongue(card.what)}>{escape(card.what)}</h3>{figure}{said}</div>'
    )


def _contents(parts: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#s{i}">{escape(part.title)}</a></li>' for i, part in enumerate(parts, 1))
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(parts) > 2 else ""


def _block(block: Block, numbers: Iterator[int]) -> str:
    if isinstance(block, str):
        return _p(block)
    if isinstance(block, Terms):
        said = "".join(f"<div><dt>{escape(t)}</dt><dd>{escape(what)}</dd></div>" for t, what in block.said)
        return f'<dl class="terms">{said}</dl>'
    if isinstance(block, Evidence):
        plots = "".join(_plot(plot, next(numbers)) for plot in block.plots)
        plots = f'<div class="plots">{plots}</div>' if plots else ""
        tables = "".join(map(_table, block.tables))
        beside = len(block.plots) == 1 and block.tables and len(block.tables[0].head) <= SPREAD
        return f'<div class="{"pair" if beside else "evidence"}">{plots}<div>{tables}</div></div>'
    return _sample(block) if isinstance(block, Sample) else _table(block)


def _plot(plot: Plot, number: int) -> str:
    legend = "".join(f"<li>{_key(kind)} {escape(label)}</li>" for kind, label in plot.legend)
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    note = _p(plot.note, "note")
    return (
        f"<figure><figcaption{_tongue(plot.title)}>{escape(plot.title)}</figcaption>{legend}{note}"
        f'<svg class="plot" viewBox="0 0 {svg.WIDTH:g} {svg.attribute(plot.height)}" role="img" '
        f'aria-labelledby="p{number}t p{number}d"><title id="p{number}t">{escape(plot.title)}</title>'
        f'<desc id="p{number}d">{escape(plot.description)}</desc>{plot.drawing}</svg></figure>'
    )


def _key(kind: str) -> str:
    drawn = svg.line(6, 1, 6, 11, "limit") if kind == "limit" else svg.mark(6, 6, kind)
    return f'<svg class="key" viewBox="0 0 12 12" aria-hidden="true">{drawn}</svg>'


def _table(table: Table) -> str:
    wordy = table.words == len(table.head)
    sides = ["word" if index < table.words else "number" for index in range(len(table.head))]
    head = "".join(
        f'<th scope="col" class="{side}"{_tongue(name)}>{escape(name)}</th>'
        for side, name in zip(sides, table.head, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(map(_cell, row, sides, table.head, range(len(row)))) + "</tr>" for row in table.rows
    )
    beside = [len(cell.small) for row in table.rows for cell in row if isinstance(cell, Cell)]
    dense = max(beside, default=0) > (0 if len(table.head) > DENSE else LONG)
    kind = ' class="stack"' if wordy else ' class="dense"' if dense else ""
    drawn = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    about = escape(table.folded or f"Table: {', '.join(filter(None, table.head))}")
    drawn = f'<div class="wide" tabindex="0" role="region" aria-label="{about}">{drawn}</div>{_p(table.note, "note")}'
    return f"<details><summary>{escape(table.folded)}</summary>{drawn}</details>" if table.folded else drawn


def _cell(cell: Cell | str, side: str, head: str, index: int) -> str:
    cell = Cell(cell) if isinstance(cell, str) else cell
    text = f"<bdi{_tongue(cell.text)}>{escape(cell.text)}</bdi>"
    if cell.code and cell.text:
        full = f' title="{escape(cell.full)}"' if cell.full else ""
        text = f"<code{full}{_tongue(cell.text)}>{escape(cell.text)}</code>"
    text += f" <small>{escape(cell.small)}</small>" if cell.small else ""
    kinds = f"{side} {cell.kind}".strip()
    if index == 0 and side == "word":
        return f'<th scope="row" class="{kinds}">{text}</th>'
    return f'<td class="{kinds}" data-head="{escape(head)}">{text}</td>'


def _sample(sample: Sample) -> str:
    prompt = f'<h3 dir="auto"{_tongue(sample.prompt)}>{escape(sample.prompt) or "(empty)"}</h3>'
    said = "".join(_answer(answer, sample.keyword) for answer in sample.answers)
    return f'<article class="sample">{prompt}<div class="answers">{said}</div></article>'


def _answer(answer: Answer, keyword: str) -> str:
    found = ""
    if answer.found is not None:
        kind, word = ("yes", "holds") if answer.found else ("no", "without")
        found = f'<span class="{kind}">{word} <bdi{_tongue(keyword)}>{escape(keyword)}</bdi></span>'
    said = escape(answer.text) if answer.text.strip() else '<span class="none">(nothing)</span>'
    if answer.found:
        marked = f"<mark>{escape(keyword)}</mark>"
        said = marked.join(map(escape, answer.text.split(keyword)))
    about = escape(f"Answer of {answer.label}")
    return (
        f'<div class="answer {answer.kind}"><p class="who"><b{_tongue(answer.label)}>{escape(answer.label)}</b> {found}</p>'
        f'<div class="said" dir="auto" tabindex="0" role="region" aria-label="{about}"{_tongue(answer.text)}>{said}</div></div>'
    )
