"""What a report finds in what it is told: which stage is which, the verdict, what was not measured."""

from __future__ import annotations

import re
from typing import Any

import pytest

from chinese_llama.evaluate.report.blocks import Card, Evidence
from chinese_llama.evaluate.report.exams import accuracy, exams
from chinese_llama.evaluate.report.made import gaps, rights, samples
from chinese_llama.evaluate.report.measured import forgetting
from chinese_llama.evaluate.report.outline import sections
from chinese_llama.evaluate.report.summary import summary
from chinese_llama.evaluate.report.training import training
from chinese_llama.evaluate.report.values import Measure
from chinese_llama.evaluate.report.view import View, text_label, view
from tests.evaluate.report.adaptations import comparison, curve, figures, whole


def named(*names: str) -> View:
    return view({"stages": [{"name": name, "texts": figures(8, 2, None, 1)} for name in names]})


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (("base", "plus", "merged"), "base stage final"),
        (("base", "merged", "after"), "base final stage"),
        (("first", "second"), "base final"),
        (("control", "base", "plus", "control 2"), "control base final control"),
        (("base",), "base"),
        (("control",), "control"),
        ((), ""),
    ],
)
def test_the_kinds_of_stages(names: tuple[str, ...], kinds: str) -> None:
    assert " ".join(stage.kind for stage in named(*names).stages) == kinds


def test_labels_are_the_given_ones_else_names() -> None:
    told = {"stages": [{"name": "base", "label": "七十亿"}, {"name": "plus"}, {"label": "x" * 90}, {}]}
    assert [stage.label for stage in view(told).stages] == ["七十亿", "plus", "x" * 59 + "…", "stage 4"]
    twice = named("base", "plus", "plus", "merged")
    assert [stage.name for stage in twice.stages] == ["base", "plus", "plus (3)", "merged"]
    assert view(told).stage("elsewhere").label == "elsewhere"
    assert text_label("zh") == "Chinese (zh)" and text_label("code") == "code"


def test_the_chinese_text_is_found_by_name_or_by_its_bytes() -> None:
    bits = {"bits_per_character": 9.0, "bits_per_byte": 3.0}
    english = {"bits_per_character": 2.0, "bits_per_byte": 2.0}
    assert view({"stages": [{"texts": {"a": bits, "zh_news": english}}]}).chinese == "zh_news"
    seen = view({"stages": [{"texts": {"en": english, "novels": bits}}]})
    assert seen.chinese == "novels"
    assert seen.by_character("novels") and not seen.by_character("en")
    assert view({"stages": [{"texts": {"en": english}}]}).chinese is None


def test_a_stage_is_compared_with_the_base_where_it_was() -> None:
    told = whole()
    told["comparisons"].insert(0, {**told["comparisons"][2], "baseline": "control"})
    found = view(told).comparison(view(told).final)
    assert found and found.baseline.name == "base"


def verdict(told: dict[str, Any]) -> list[str]:
    return [said for _, said in summary(view(told)).verdict]


def test_verdicts() -> None:
    told = whole()
    told["comparisons"] = [
        comparison("merged", (0.02, -0.01, 0.05), (-0.01, -0.02, -0.005), (0.01, -0.01, 0.03))
    ]
    assert verdict(told)[:3] == [
        "Chinese (zh): no difference shown (+2.0 % [−1.0, +5.0]).",
        "Fewer bits than before in English (en).",
        "Nothing was shown to be lost in code.",
    ]
    told["comparisons"] = [comparison("merged", (0.02, 0.01, 0.03), (0.01, 0.005, 0.02), (0.01, 0.005, 0.02))]
    told["comparisons"][0]["limits"] = {}
    assert summary(view(told)).verdict[:2] == [
        ("bad", "Chinese (zh) got worse: it takes 2.0 % more bits."),
        ("bad", "English (en) got worse: it takes 1.0 % more bits [+0.5, +2.0]."),
    ]
    texts = told["comparisons"][0]["texts"]
    texts |= {"law": texts["en"], "wiki": texts["en"]}
    assert (
        "More bits, but beyond no limit: English (en) +1.0 %, code +1.0 %, law +1.0 %, wiki +1.0 %."
        in verdict(told)
    )
    told["comparisons"] = []
    assert verdict(told)[0].startswith("Chinese (zh) went from 17.80 to 8.10 bits per character;")
    told["stages"] = told["stages"][:1]
    assert verdict(told) == ["No comparison was made, so there is no verdict."]


def test_the_control_speaks_by_its_comparison_where_there_is_one() -> None:
    told = whole()
    against = comparison("plus", (-0.474, -0.481, -0.467), (0.0, -0.01, 0.01), (0.0, -0.01, 0.01))
    told["comparisons"].append({**against, "baseline": "control"})
    assert verdict(told)[-1] == (
        "Against the control, the same training without the new vocabulary, plus (continued pretraining) takes "
        "47.4 % fewer bits [−48.1, −46.7] in Chinese (zh)."
    )


def test_a_text_of_one_document_has_no_verdict() -> None:
    told = whole()
    alone = {"difference": 0.3, "interval": None, "verdict": "one document shows nothing"}
    told["comparisons"][2] |= {"texts": {"en": alone}, "broken": []}
    assert "English (en): +30.0 % bits, one document shows nothing." in verdict(told)
    assert not any("Nothing was shown to be lost" in said for said in verdict(told))


def cards(told: dict[str, Any]) -> dict[str, Card]:
    found = summary(view(told))
    return {card.what: card for _, cards in found.groups for card in cards}


def test_cards() -> None:
    found = cards(whole())
    assert list(found) == [
        "Chinese (zh)", "Length of text", "Decoding", "Questions", "C-Eval",
        "English (en)", "code", "Vocabulary", "Time",
    ]  # fmt: skip
    assert found["code"].kind == "bad" and found["English (en)"].kind == ""
    assert found["Questions"].before == "1" and found["Questions"].after == "100"
    assert "491,520 characters" in found["Time"].line


def groups(told: dict[str, Any]) -> dict[str, list[str]]:
    return {name: [card.what for card in cards] for name, cards in summary(view(told)).groups}


def test_what_fell_is_a_cost_and_what_rose_a_gain() -> None:
    told = whole()
    told["comparisons"] = [
        comparison("merged", (0.02, 0.01, 0.05), (-0.01, -0.02, -0.005), (0.01, -0.01, 0.03))
    ]
    told["stages"][4]["choices"][0]["average"] = {"accuracy": 0.262, "stderr": 0.012}
    told["right"]["merged"] |= {"right": 0, "share": 0.0}
    found = groups(told)
    assert found["What was gained"] == ["Length of text", "Decoding", "English (en)"]
    assert found["What it cost"] == ["Chinese (zh)", "Questions", "C-Eval", "Vocabulary", "Time"]
    assert cards(told)["C-Eval"].kind == "less"
    told["stages"][4]["choices"][0]["average"] = {"accuracy": 0.1, "stderr": 0.012}
    assert cards(told)["C-Eval"].kind == "bad"
    told["stages"] = told["stages"][:1]
    assert "What was gained" not in groups(told), "nothing can be gained over nothing"


def test_without_english_the_worst_other_texts_are_shown() -> None:
    told = whole()
    for stage in told["stages"]:
        stage["texts"]["law"] = stage["texts"].pop("en")
    assert "code" in cards(told) and "law" not in cards(told)  # it exceeded its limit
    told["comparisons"] = []
    assert {"law", "code"} <= set(cards(told))


def test_tokens_per_character_come_from_the_stages_too() -> None:
    told = whole()
    told["vocabulary"] = None
    card = cards(told)["Length of text"]
    assert (card.before, card.after, card.kind) == ("1.92", "0.66", "good")
    told["stages"][0], told["stages"][4] = told["stages"][4], told["stages"][0]
    told["stages"][0]["name"], told["stages"][4]["name"] = "base", "merged"
    assert cards(told)["Length of text"].line == "No shorter than before."


def test_what_was_not_measured_is_said() -> None:
    assert gaps(view(whole())) == []
    told = whole()
    told["stages"] = [
        {"name": s["name"], "texts": s["texts"]} for s in told["stages"] if s["name"] != "control"
    ]
    told |= {"comparisons": [], "samples": [], "right": {}}
    for stage in told["stages"]:
        for figure in stage["texts"].values():
            del figure["interval"]
    said = " ".join(gaps(view(told)))
    for words in (
        "No control was run",
        "not compared",
        "No intervals",
        "No multiple-choice",
        "Decoding speed",
        "No questions",
    ):
        assert words in said
    assert gaps(view({}))[0] == "No stage was measured."


def test_sections_are_in_order_and_only_those_there_are() -> None:
    assert [section.title for section in sections(view(whole()))] == [
        "Bits by stage", "Forgetting", "Answers", "Multiple choice", "Decoding speed", "Vocabulary", "Training",
        "What was made from what", "Settings", "Notes",
    ]  # fmt: skip
    assert [section.title for section in sections(view({}))] == ["Notes"]


def test_forgetting_shares_an_axis_and_leaves_out_what_dwarfs() -> None:
    section = forgetting(view(whole()))
    assert section
    plots = section.blocks[0].plots  # type: ignore[union-attr]
    assert [plot.title for plot in plots] == [
        "merged against base: code beyond the limit",
        "plus (continued pretraining) against base: no text beyond its limit",
        "alpaca, unmerged against base: code beyond the limit",
    ]
    assert all("Chinese" not in plot.drawing and "English (en)" in plot.drawing for plot in plots)
    told = whole()
    for one in (*told["stages"], *told["comparisons"]):
        one["texts"]["新闻"] = one["texts"]["zh"]
    (block,) = (one for one in forgetting(view(told)).blocks if isinstance(one, Evidence))  # type: ignore[union-attr]
    assert all("新闻" not in plot.drawing for plot in block.plots), "another text that gained as much"
    assert "Chinese (zh), 新闻" in block.tables[0].note
    told = whole()
    told["comparisons"][0]["limits"] = {"en": 0.02}
    assert "code −0.4 %" in forgetting(view(told)).blocks[0].plots[1].title  # type: ignore[union-attr]
    limits = [re.findall(r'<line x1="([^"]*)"[^>]*class="limit"', plot.drawing) for plot in plots]
    assert len(limits[0]) == 2
    assert limits[0] == limits[1] == limits[2]


def test_training_goes_by_characters_where_all_logs_count_them() -> None:
    told = whole()
    assert "characters read" in str(training(view(told)))
    del told["curves"]["alpaca"][3]["characters"]
    assert "characters read" not in str(training(view(told)))
    up = [{"step": entry["step"], "loss": 9 - entry["loss"]} for entry in curve(7, 3, 50, False, (1, 1))]
    assert ": the loss rises from" in str(training(view({"curves": {"plus": up}})))
    assert training(view({"curves": {"plus": []}})) is None


def test_a_control_trains_apart() -> None:
    told = whole()
    told["curves"]["control"] = curve(7, 4, 50, True, (17.8, 14.1))
    section = training(view(told))
    assert section
    titles = [plot.title for block in section.blocks if isinstance(block, Evidence) for plot in block.plots]
    assert titles[-4:-2] == [
        "Chinese (zh): 19.07 → 8.09 bits per character",
        "English (en): 2.150 → 2.130 bits per byte",
    ]
    assert titles[-2].startswith("control without new pieces, Chinese (zh): 17.")


def test_subjects_that_are_missing_are_named() -> None:
    told = whole()
    told["stages"][4]["choices"][0]["missing"] = ["law", "logic"]
    del told["stages"][5]["choices"]
    assert "not there, and not counted: law, logic." in str(exams(view(told)))
    told["stages"][4]["choices"][0]["missing"] = list("abcdefgh")
    assert "not there, and not counted: a, b, c, d, e and 3 more." in str(exams(view(told)))


def test_accuracy_stays_a_share() -> None:
    assert accuracy({"accuracy": 0.99, "stderr": 0.1}) == Measure(0.99, 0.99 - 0.196, 1.0)
    assert accuracy({"accuracy": 0.5}) == Measure(0.5)
    assert accuracy({"stderr": 0.5}) is None


def test_right_answers_and_samples() -> None:
    told = whole()
    del told["right"]["merged"]["share"]
    assert rights(view(told))[0] == ("merged", "100 of 120", "83 % [76, 89]")
    found = samples(view(told))
    assert [answer.found for answer in found[0].answers] == [False, True]
    assert [answer.found for answer in found[4].answers] == [None, None]
    assert found[0].answers[0].text == "The capital of the"
