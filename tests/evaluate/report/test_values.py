"""Numbers and words: rounded honestly, harmless whatever they hold."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chinese_llama.evaluate.report import values
from chinese_llama.evaluate.report.exams import accuracy
from chinese_llama.evaluate.report.twin import markdown
from chinese_llama.evaluate.report.values import Measure
from chinese_llama.terminal import columns
from tests.evaluate.report.adaptations import whole


@pytest.mark.parametrize(
    ("value", "places", "shown"),
    [
        (8.468, 2, "8.47"),
        (1234.5, 1, "1,234.5"),
        (-0.5, 1, "−0.5"),
        (-0.001, 2, "0.00"),
        (-2.5e300, 2, "−2.5e+300"),
        (None, 2, ""),
    ],
)
def test_numbers_are_fixed(value: float | None, places: int, shown: str) -> None:
    assert values.fixed(value, places) == shown


def test_an_interval_decides_how_many_decimals_mean_something() -> None:
    assert values.decimals([Measure(8.47, 8.31, 8.62)]) == 2
    assert values.decimals([Measure(2.131, 2.119, 2.143)]) == 3
    assert values.decimals([Measure(2.131, 2.1309, 2.1311)]) == 3
    assert values.decimals([Measure(800.0, 700.0, 900.0)]) == 2
    assert values.decimals([Measure(17.8), None]) == 2
    assert values.decimals([Measure(2.131)]) == 3
    assert values.decimals([None]) == 2
    assert values.ends(Measure(8.468, 8.311, 8.6249), 2) == "[8.31, 8.62]"
    assert values.ends(Measure(8.468), 2) == ""


def test_changes_carry_their_sign() -> None:
    assert values.changes(Measure(0.0144, 0.0102, 0.0187)) == ("+1.4 %", "[+1.0, +1.9]")
    assert values.changes(Measure(-0.545, -0.552, -0.538)) == ("−54.5 %", "[−55.2, −53.8]")
    assert values.changes(Measure(0.0003, -0.0002, 0.0008)) == ("+0.03 %", "[−0.02, +0.08]")
    assert values.changes(Measure(0.0001)) == ("0.0 %", "")
    assert values.changes(None) == ("", "")


def test_shares() -> None:
    assert values.shares(Measure(100 / 120, 0.756, 0.889)) == "83 % [76, 89]"
    assert values.shares(Measure(0.5)) == "50 %"
    assert values.shares(None) == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(8063.4, "2 h 14 min"), (312, "5 min 12 s"), (7.6, "8 s"), (3599.9, "1 h 0 min"), (-1, ""), (None, "")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert values.duration(seconds) == shown


@pytest.mark.parametrize(
    "value", [None, math.nan, math.inf, -math.inf, True, "1", [1], 1e305, 10**400, -(10**400)]
)
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert values.number(value) is None
    assert values.measure(value) is None


def test_an_interval_that_is_none_is_left_out() -> None:
    assert values.measure(1, [0.9, 1.1]) == Measure(1.0, 0.9, 1.1)
    for bad in (None, [], [1], [1, None], [math.nan, 2], [2, 1], "12", [1, 2, 3]):
        assert values.measure(1, bad) == Measure(1.0)


def test_clean_shows_what_would_act() -> None:
    assert values.clean("a\x1b[31m\x00\u202eb") == "a[U+001B][31m[U+0000][U+202E]b"
    assert values.clean("1\r\n2\r3\u20284\x855") == "1\n2\n3\n4\n5"
    assert values.clean("\ud800\ufffe\x9b") == "\ufffd" * 3
    assert values.clean("👩‍👩‍👧\t中") == "👩‍👩‍👧\t中"
    assert values.clean(None) == "" and values.clean(3) == "3"


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_clean_text_can_be_written_and_stays(text: str) -> None:
    done = values.clean(text)
    done.encode("utf-8")
    assert values.clean(done) == done
    assert not any((ord(c) < 32 and c not in "\t\n") or ord(c) == 127 for c in done)
    assert "\n" not in values.one_line(text)


@given(st.text(), st.integers(1, 40))
def test_cut_keeps_to_the_columns(text: str, width: int) -> None:
    done = values.cut(text, width)
    assert columns(done) <= width
    assert done == text or done.endswith("…")


def test_languages() -> None:
    assert values.language("中文 and") == "zh-Hans"
    assert values.language("日本の") == "ja"
    assert values.language("한국 中") == "ko"
    assert values.language("plain, “quoted” → ") == ""


def test_axis_numbers_are_short() -> None:
    assert [values.brief(x) for x in (0.5, 12, 1500, 2e7, -3e9)] == ["0.5", "12", "1.5k", "20M", "−3G"]
    assert values.brief(2.5e15) == "2.5e+15"


def test_all_right_in_a_subject_is_not_certainty() -> None:
    """Wilson for a subject, whose questions are few; standard errors for averages over subjects."""
    subject = accuracy({"accuracy": 1.0, "stderr": 0.0, "questions": 12, "category": "STEM"})
    assert subject is not None and subject.low == pytest.approx(0.757, abs=1e-3) and subject.high == 1.0
    average = accuracy({"accuracy": 0.5, "stderr": 0.01, "questions": 1000})
    assert average is not None and average.low == pytest.approx(0.4804)


def test_few_documents_are_said_to_be_few() -> None:
    for documents, said in ((6, True), (100, False)):
        told = whole()
        for stage in told["stages"]:
            for figures in stage["texts"].values():
                figures["documents"] = documents
        assert ("intervals are narrower than they should be" in markdown(told)) is said
