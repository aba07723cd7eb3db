"""The text for the terminal: the table, right answers, answers on one line each."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.evaluate.report import terminal
from chinese_llama.terminal import columns
from tests.evaluate.report.adaptations import damaged, odd, whole


def test_the_form_that_the_readme_shows() -> None:
    told = whole()
    for stage in told["stages"]:
        del stage["texts"]["code"]
    lines = terminal.text(told).splitlines()
    assert lines[1] == " " * 30 + "tokens/character (zh)  bits/character (zh)  bits/byte (en)"
    assert lines[2] == "base" + "1.92".rjust(47) + "17.80".rjust(21) + "2.15".rjust(16)
    assert "merged" + "0.66".rjust(45) + "8.10".rjust(21) + "2.18".rjust(16) in lines
    said = "Questions answered with the right word: 100 of 120 (83 % [76, 89]) by merged; 1 of 120 (1 % [0, 5]) by base."
    assert said in lines
    at = lines.index("[merged] 中国的首都是哪里？")
    assert lines[at + 1] == "    中国的首都是北京，故宫和长城都在那里。"


def test_more_texts_go_below() -> None:
    text = terminal.text(whole())
    assert "bits/byte (code)" in text
    table = text[: text.index("Chinese (zh) got better")]
    assert max(map(columns, table.splitlines())) <= 98
    assert table.count("\nmerged") == 2


def test_a_stage_without_a_text_has_a_dash() -> None:
    told = whole()
    del told["stages"][0]["texts"]["code"]
    told["stages"][0]["texts"]["en"] = None
    lines = [line for line in terminal.text(told).splitlines() if line.startswith("base")]
    assert [line.endswith(" -") for line in lines] == [True, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_any_part_may_be_missing_or_broken(seed: int) -> None:
    text = terminal.text(damaged(odd() if seed % 2 else whole(), random.Random(seed)))
    text.encode("utf-8")
    assert not any((ord(c) < 32 and c != "\n") or ord(c) == 127 for c in text)
