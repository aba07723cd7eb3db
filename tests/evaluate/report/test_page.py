"""The page: well-formed whatever is told, nothing unescaped, nothing loaded, every figure in it."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as xml
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.evaluate.report import page
from chinese_llama.evaluate.report.values import clean
from tests.evaluate.report.adaptations import ODD, damaged, odd, whole
from tests.evaluate.report.parsing import Page

ALLOWED = re.compile(r"^#s\d+$")


@pytest.fixture(scope="module")
def text() -> str:
    return page.html(whole())


@pytest.fixture(scope="module")
def parsed(text: str) -> Page:
    return Page(text)


def check(text: str) -> Page:
    """What holds for every page: balanced, even tables, nothing that loads or runs, plots that parse."""
    text.encode("utf-8")
    parsed = Page(text)
    for table in parsed.tables:
        assert len({len(row) for row in table}) == 1
    for tag, attributes in parsed.tags:
        assert tag not in (
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "use",
            "image",
        )
        assert not any(name.startswith("on") or name in ("src", "srcset", "style") for name in attributes)
        if "href" in attributes:
            assert ALLOWED.match(attributes["href"] or ""), attributes
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style and "http" not in style
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        xml.fromstring(drawing)
        assert not re.search(r' (?:[cxyr]|[cxy][12xy]|d|points)="[^"]*[ni]', drawing)  # nan, inf
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return parsed


def test_a_whole_page_is_sound_and_small(text: str) -> None:
    check(text)
    assert len(text.encode()) < 300_000
    assert page.html(whole()) == text


def test_odd_words_are_shown_and_do_nothing() -> None:
    parsed = check(page.html(odd()))
    assert any(clean(ODD).split("\n")[0] in said for said in parsed.texts)
    assert "\x1b" not in "".join(parsed.texts)
    (marked, *_) = [i for i, (tag, _) in enumerate(parsed.tags) if tag == "mark"]
    assert marked


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_any_part_may_be_missing_or_broken(seed: int) -> None:
    check(page.html(damaged(odd() if seed % 2 else whole(), random.Random(seed))))


@pytest.mark.parametrize("part", sorted(whole()))
def test_a_missing_part_is_left_out(part: str) -> None:
    told = whole()
    for value in (None, [], {}):
        told[part] = value
        check(page.html(told))
    del told[part]
    check(page.html(told))


def test_nothing_told_is_a_page_that_says_so() -> None:
    parsed = check(page.html({}))
    assert "Nothing was measured." in parsed.texts


def test_the_first_screen_answers(parsed: Page) -> None:
    said = " ".join(parsed.texts).replace("\u00a0", " ")
    for words in (
        "Chinese (zh) got better: it takes 54.5 % fewer bits.",
        "code exceeded the limit of 5 %: it takes 8.4 % more bits [+7.1, +9.7].",
        "English (en) got worse, within the limit of 2 %: it takes 1.4 % more bits [+1.0, +1.9].",
        "The control without the new vocabulary came to 14.10 bits per character, merged to 8.10.",
        "17.80 → 8.10",
        "1.92 → 0.66",
        "31.2 → 90.3",
        "2.9 times the speed",
        "32,000 → 49,920",
        "2 h 14 min",
        "of 120 answered right, 83 % [76, 89]",
    ):
        assert words in re.sub(" +", " ", said), words


def test_tables_hold_the_figures(parsed: Page) -> None:
    by_head = {tuple(table[0]): table[1:] for table in parsed.tables}
    bits = by_head[("stage", "bits per character", "tokens per character")]
    assert ["merged", "8.10 [7.98, 8.25]", "0.66"] in bits
    per_byte = by_head[("bits per byte", "Chinese (zh)", "English (en)", "code")]
    assert per_byte[0] == ["base", "5.933 [5.844, 6.040]", "2.150 [2.118, 2.189]", "2.610 [2.571, 2.657]"]
    change = by_head[("change of bits", "Chinese (zh)", "English (en)", "code")]
    assert change[2][1:3] == ["−54.5 % [−55.2, −53.8] better", "+1.4 % [+1.0, +1.9] worse"]
    assert change[2][3] == "+8.4 % [+7.1, +9.7] worse, limit exceeded"
    assert change[3] == ["limit", "", "+2.0 %", "+5.0 %"]
    subjects = next(table for head, table in by_head.items() if head[0] == "subject")
    assert len(subjects) == 52
    scripts = by_head[("script", "base", "extended", "characters")]
    assert scripts[0] == ["Chinese", "1.94", "0.62", "180,211"]


def test_hashes_are_short_and_whole_in_a_title(parsed: Page) -> None:
    whole_hash = whole()["artifacts"][0]["sha256"]
    assert whole_hash in [attributes.get("title") for attributes in parsed.named("code")]
    assert whole_hash[:12] + "…" in parsed.texts


def test_every_plot_is_named_and_described(text: str, parsed: Page) -> None:
    drawings = [one for one in parsed.named("svg") if one.get("class") == "plot"]
    assert len(drawings) >= 12
    ids = {attributes.get("id") for _, attributes in parsed.tags}
    for one in drawings:
        assert one["role"] == "img" and set((one["aria-labelledby"] or "").split()) <= ids
    assert len(re.findall(r"<desc id", text)) == len(drawings)


def test_chinese_is_marked_as_chinese(parsed: Page) -> None:
    tongues = [attributes.get("lang") for tag, attributes in parsed.tags if tag != "html"]
    assert tongues.count("zh-Hans") >= 12
    assert parsed.named("html") == [{"lang": "en"}]


def test_the_keyword_is_marked_where_it_was_found(text: str, parsed: Page) -> None:
    assert "<mark>北京</mark>" in text
    assert len(parsed.named("mark")) == 5  # 乳牙 twice
    assert text.count('class="yes"') == 4 and text.count('class="no"') == 6


@pytest.mark.parametrize("name", ["PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC"])
def test_all_text_has_chinese_fonts(text: str, name: str) -> None:
    style = text[: text.index("</style>")]
    assert style.count(f'"{name}"') == 2  # of text, of code
    assert "svg text { font: 12px/1 var(--face)" in style


def test_very_long_answers_are_cut_evenly() -> None:
    told: dict[str, Any] = {
        "samples": [{"prompt": "p" * 9_999, "answers": {str(i): "字" * 9_000 for i in range(8)}}] * 40
    }
    text = page.html(told)
    check(text)
    assert len(text.encode()) < 1_000_000
    assert "more characters)" in text
