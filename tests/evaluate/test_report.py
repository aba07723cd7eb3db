"""The report: figures where they belong, one page that loads nothing, nothing unescaped."""

from __future__ import annotations

import re
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from typing import Any

import pytest

from chinese_llama.evaluate import report

ANSWER = "<script>alert('x')</script> & \"北京\" | 第一行\n第二行"


def figures(zh: float, en: float, per_token: float) -> dict[str, Any]:
    return {
        "zh": {"bits_per_character": zh, "bits_per_byte": zh / 3, "characters_per_token": per_token},
        "en": {"bits_per_character": en, "bits_per_byte": en, "characters_per_token": 3.0},
    }


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    losses = [{"step": step, "loss": 5 - step / 10} for step in range(1, 20)]
    return {
        "title": "pico & co",
        "stages": {
            "base": figures(12.345, 2.111, 0.5),
            "plus": figures(7.654, 2.222, 1.25),
            "alpaca": figures(6.543, 2.333, 1.25),
            "merged": figures(6.541, 2.334, 1.25),
        },
        "losses": {"base": losses, "plus": losses, "alpaca": losses},
        "samples": [
            {"model": "base", "question": "1 < 2?", "answer": ANSWER},
            {"model": "merged", "question": "中国的首都是哪里？", "answer": "北京。"},
        ],
        "answers": {"questions": 8, "right": 6},
    }


@pytest.fixture(scope="module")
def page(told: dict[str, Any]) -> str:
    return report.html(told)


class Page(HTMLParser):
    """The tags with their attributes, the texts, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.texts.append(text)


def test_the_rows_are_tokens_and_bits(told: dict[str, Any]) -> None:
    assert report.rows(told) == [
        ("base", ["2.00", "12.35", "2.11"]),
        ("after plus", ["0.80", "7.65", "2.22"]),
        ("after alpaca", ["0.80", "6.54", "2.33"]),
        ("merged", ["0.80", "6.54", "2.33"]),
    ]


def test_every_form_holds_every_figure(told: dict[str, Any], page: str) -> None:
    for form in (report.text(told), report.markdown(told), page):
        for stage, cells in report.rows(told):
            assert stage in form
            assert all(cell in form for cell in cells)
        assert "6 of 8 (75 %)" in form
        assert "中国的首都是哪里？" in form
        assert all(column in form for column in report.COLUMNS)


def test_markdown_tables_keep_their_shape(told: dict[str, Any]) -> None:
    """Line breaks and bars of an answer would break the table."""
    text = report.markdown(told)
    assert text.startswith("# pico & co\n")
    assert "| after plus | 0.80 | 7.65 | 2.22 |" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert [len(table.splitlines()) for table in tables] == [6, 4]
    for table, columns in zip(tables, (4, 3), strict=True):
        for line in table.splitlines():
            assert len(re.findall(r"(?<!\\)\|", line)) == columns + 1, line


def test_the_terminal_shows_an_answer_on_one_line(told: dict[str, Any]) -> None:
    lines = report.text(told).splitlines()
    assert "    " + " ".join(ANSWER.split()) in lines
    assert "[merged] 中国的首都是哪里？" in lines


def test_the_page_is_well_formed_and_escapes_what_models_say(told: dict[str, Any], page: str) -> None:
    parsed = Page(page)
    assert not parsed.open
    assert "script" not in [tag for tag, _ in parsed.tags]
    assert ANSWER in parsed.texts
    assert "1 < 2?" in parsed.texts
    assert parsed.texts.count("pico & co") == 2
    assert "&lt;script&gt;" in page


def test_the_page_loads_nothing(page: str) -> None:
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "img", "iframe", "script", "object", "embed"), tag
        for name in ("src", "srcset", "data", "href", "xlink:href", "action", "poster"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in page
    assert not re.search(r"url\(\s*['\"]?(?!#)", page)
    assert not re.search(r"<!DOCTYPE svg", page)


def test_the_plots_are_four_drawings_that_parse(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        xml.fromstring(drawing)
    assert "training loss" in drawings[0]
    assert all(name in drawings[0] for name in ("base", "plus", "alpaca"))
    assert "tokens per Chinese character" in drawings[1]
    assert "bits per Chinese character" in drawings[2]
    assert "12.35" in drawings[2] or "12.34" in drawings[2]
    assert "bits per English byte" in drawings[3]


def test_the_same_figures_give_the_same_page(told: dict[str, Any], page: str) -> None:
    assert report.html(told) == page
