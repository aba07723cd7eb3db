"""What a report consists of, before it is written as HTML or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """A field of a table: `small` is a side remark (an interval), `full` what `text` shortens."""

    text: str
    small: str = ""
    full: str = ""
    code: bool = False
    kind: str = ""  # good, bad: a verdict; control, final: the label of such a stage; soft


@dataclass(frozen=True)
class Table:
    """Rows of cells. The first `words` columns are words, the rest numbers; a table with `folded` (its
    summary) is closed at first."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    words: int = 1
    note: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing of `height` units, `plots.WIDTH` wide: SVG without its outer element."""

    title: str  # says what to see
    description: str  # what is drawn, for those who do not see it
    drawing: str
    height: float
    legend: Sequence[tuple[str, str]] = ()  # (kind of mark, label)
    note: str = ""


@dataclass(frozen=True)
class Evidence:
    """Plots and the tables of their numbers."""

    plots: Sequence[Plot]
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Terms:
    """Words that need a sentence each."""

    said: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a stage said; `found` tells whether the keyword is in it, None where there is no keyword."""

    label: str
    kind: str
    text: str
    found: bool | None


@dataclass(frozen=True)
class Sample:
    prompt: str
    keyword: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Card:
    """A few large figures of the first screen: before → after, what it is, one line that explains it."""

    what: str
    before: str
    after: str
    unit: str
    line: str
    kind: str = ""  # good, bad, less: fell, but no interval shows it


@dataclass(frozen=True)
class Summary:
    verdict: Sequence[tuple[str, str]]  # (kind: "" or bad, sentence)
    groups: Sequence[tuple[str, Sequence[Card]]]


Block = str | Table | Evidence | Terms | Sample


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block] = field(default_factory=list)
