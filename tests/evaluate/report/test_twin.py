"""The Markdown twin: tables keep their shape, words of others stay words."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.evaluate.report import page, twin
from chinese_llama.evaluate.report.values import clean
from tests.evaluate.report.adaptations import damaged, odd, whole
from tests.evaluate.report.parsing import Page, markdown_tables

CODE = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)")


def rendered(text: str) -> Page:
    reader = pytest.importorskip("markdown_it", reason="no Markdown reader").MarkdownIt(
        "gfm-like", {"linkify": False}
    )
    return Page(reader.render(text))


def check(text: str) -> None:
    text.encode("utf-8")
    for table in markdown_tables(text):
        assert len({len(row) for row in table}) == 1, table[0]
    assert "<script" not in CODE.sub("", text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)


def test_a_whole_report_is_sound() -> None:
    text = twin.markdown(whole())
    check(text)
    assert text.startswith("# From base-proxy to Chinese\n")
    assert "| merged | 8.10 [7.98, 8.25] | 0.66 |" in text
    assert f"`{whole()['artifacts'][0]['sha256']}`" in text
    assert "| merged | yes | 中国的首都是北京，故宫和长城都在那里。 |" in text
    assert "pt_lora (6)" in text


def test_it_has_the_tables_of_the_page() -> None:
    """The same rows but for full hashes, and the first screen and samples, which are tables here only."""
    ours = [table for table in rendered(twin.markdown(whole())).tables if "answer" not in table[0]][2:]
    theirs = Page(page.html(whole())).tables
    short = {one["sha256"]: one["sha256"][:12] + "…" for one in whole()["artifacts"]}
    assert [[[short.get(cell, cell) for cell in row] for row in table] for table in ours] == theirs


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_any_part_may_be_missing_or_broken(seed: int) -> None:
    check(twin.markdown(damaged(odd() if seed % 2 else whole(), random.Random(seed))))


@given(st.text(st.one_of(st.sampled_from("|`*_~#<>&[]()!\\-+=:$1.) \n\t中，"), st.characters()), max_size=60))
def test_a_cell_reads_as_it_was_written(text: str) -> None:
    """Through a real reader: one row, one cell, the same words, no tag of its own."""
    text = clean(text).strip()
    table = "| a | b |\n| --- | --- |\n| " + twin.escape(text) + " | x |\n"
    page = rendered(table)
    ((_, row),) = page.tables
    assert " ".join(row[0].split()) == " ".join(text.replace("\n", "").split()) or "\n" in text
    assert row[0].replace(" ", "") == re.sub(r"[\n\t ]", "", text)
    assert {tag for tag, _ in page.tags} <= {"table", "thead", "tbody", "tr", "th", "td", "br"}


@given(st.text(st.one_of(st.sampled_from("|`*_~#<>&[]()!\\-+=:$1.) \n中"), st.characters()), max_size=60))
def test_a_paragraph_stays_one(text: str) -> None:
    text = clean(text).strip()
    page = rendered(twin.escape(text) + "\n")
    assert {tag for tag, _ in page.tags} <= {"p", "br"}
    assert re.sub(r"\s", "", "".join(page.texts)) == re.sub(r"\s", "", text)


@given(
    st.text(st.one_of(st.sampled_from("|`\\ ab"), st.characters(categories=["L"])), min_size=1, max_size=30)
)
def test_code_in_a_cell_reads_as_it_was_written(text: str) -> None:
    text = " ".join(text.split())
    if not text:
        return
    ((_, row),) = rendered(f"| a | b |\n| --- | --- |\n| {twin._code(text)} | x |\n").tables
    assert row == [text, "x"]
