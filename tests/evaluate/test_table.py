"""What `eval` prints: aligned, in 80 columns, all that was measured."""

from __future__ import annotations

from typing import Any

import pytest

from chinese_llama.evaluate.table import WIDE, aligned, told
from chinese_llama.terminal import columns

LONG = "a-model-with-a-rather-long-name"


def model(name: str, factor: float = 1.0, **more: Any) -> dict[str, Any]:
    figures = {
        "characters_per_token": 1.5, "bits_per_character": 4.25 * factor, "bits_per_byte": 1.75 * factor,
        "perplexity": 71234.5 * factor, "characters": 65_432, "bytes": 196_120, "tokens": 43_621,
        "documents": 312, "window": 512, "stride": 256, "context": 250.4 * factor, "unknown": 0,
        "interval": {"bits_per_character": [4.0 * factor, 4.5 * factor]},
    }  # fmt: skip
    return {"name": name, "model": f"models/{name}", "loras": [], "texts": {"中文": figures}, "choices": [],
            "wikitext": None, "speed": None} | more  # fmt: skip


def comparison(
    stage: str, difference: float, interval: list[float] | None, verdict: str, **limits: float
) -> Any:
    found = {"difference": difference, "interval": interval, "verdict": verdict}
    over = [name for name, limit in limits.items() if difference > limit]
    return {"stage": stage, "baseline": "base", "texts": {"中文": found}, "limits": limits, "broken": over}


def test_columns_are_aligned_and_fit() -> None:
    text = told(
        [model("base"), model(LONG, 10.0), model("same", loras=["plus", "alpaca"])],
        [
            comparison(LONG, 0.5481, [0.5091, 0.5832], "worse", 中文=0.125),
            comparison("same", -0.0003, [-0.0006, 1.0012], "no difference shown", 中文=0),
        ],
    )
    assert text.splitlines() == [
        "base              models/base",
        "..ther-long-name  models/a-model-with-a-rather-long-name",
        "same              models/same + plus + alpaca",
        "",
        "中文: 312 documents, 65,432 characters, 196,120 bytes",
        "                  chars/   bits per         95 %  bits per  perplexity  context",
        "                   token  character     interval      byte   per token   tokens",
        "base               1.500      4.250  4.000-4.500     1.750    71234.50      250",
        "..ther-long-name   1.500      42.50  40.00-45.00     17.50   712345.00    2,504",
        "same               1.500      4.250  4.000-4.500     1.750    71234.50      250",
        "Bits against base:",
        "                   change   95 % interval              verdict        limit",
        "..ther-long-name  +54.8 %  +50.9 to +58.3                worse  over 12.5 %",
        "same              -0.03 %   -0.06 to +100  no difference shown   within 0 %",
        "",
        "Windows of 512 tokens, stride 256.",
        "Context: how many tokens are seen before one that is scored, on average.",
    ]
    assert max(map(columns, text.splitlines())) <= WIDE


def test_models_that_saw_other_windows_are_named() -> None:
    other = model("ours")
    other["texts"]["中文"]["window"] = 128
    text = told([model("base"), other, model("merged")], [])
    assert (
        "Windows of 512 tokens, stride 256 (base, merged).\nWindows of 128 tokens, stride 256 (ours)." in text
    )


def test_names_that_would_be_cut_alike_are_letters() -> None:
    names = ["first/checkpoint-final-merged", "second/checkpoint-final-merged"]
    found = comparison(names[1], -0.5, [-0.6, -0.4], "better") | {"baseline": names[0]}
    lines = told([model(name) for name in names], [found]).splitlines()
    assert lines[:2] == [f"A  models/{names[0]}", f"B  models/{names[1]}"]
    assert [line[:2] for line in lines[6:8]] == ["A ", "B "]
    assert "Bits against A:" in lines and any(line.startswith("B  -50.0 %") for line in lines)


def test_unknown_tokens_few_documents_and_huge_figures_are_told() -> None:
    odd = model("base", 1e6)
    odd["texts"]["中文"] |= {"unknown": 4362, "documents": 1, "interval": {"bits_per_character": None}}
    text = told([odd, model("ours")], [comparison("ours", 0.5, None, "one document shows nothing")])
    assert "base: 4,362 of 43,621 tokens are unknown; what they hide costs no bits." in text
    assert "中文: 1 document, " in text and "Only" not in text
    assert "ours  +50.0 %                 one document shows nothing" in text
    assert ["1.500", "4.2e+06", "1.8e+06", "7.1e+10", "250,400,000"] in [
        x.split()[1:] for x in text.splitlines()
    ]
    odd["texts"]["中文"]["documents"] = 19
    assert "Only 19 documents: intervals are narrower than they should be." in told([odd], [])


def test_exams_wikitext_and_speed() -> None:
    exam = {"exam": "ceval", "shots": 5, "questions": 1346, "average": {"accuracy": 0.251, "stderr": 0.012}}
    exam["categories"] = {"STEM": exam["average"], "Social Science": {"accuracy": 1.0, "stderr": 0.0}}
    one = exam | {"average": {"accuracy": 0.5, "stderr": None}}
    speed = {"characters": 256, "characters_per_second": 50.0, "tokens_per_second": 40.0, "device": "cpu",
             "dtype": "float32", "repeats": 5, "text": "zh"}  # fmt: skip
    word = {"word_perplexity": 12.5, "byte_perplexity": 1.625}
    models = [
        model("base", choices=[exam], speed=speed, wikitext=word, texts={}),
        model("ours", choices=[one], speed=speed | {"characters_per_second": 125.0}, wikitext=word, texts={}),
    ]
    assert told(models, []).splitlines()[3:] == [
        "ceval, 5-shot, 1,346 questions: % right, standard error",
        "                        base          ours",
        "average          25.1 +- 1.2          50.0",
        "STEM             25.1 +- 1.2   25.1 +- 1.2",
        "Social Science  100.0 +- 0.0  100.0 +- 0.0",
        "",
        "WikiText: perplexity",
        "      per word  per byte",
        "base     12.50     1.625",
        "ours     12.50     1.625",
        "",
        "Decoding 256 characters of zh on cpu in float32 (5 runs)",
        "      characters/s  tokens/s  times base",
        "base          50.0      40.0        1.00",
        "ours         125.0      40.0        2.50",
    ]
    assert "times" not in told(models[:1], [])


@pytest.mark.parametrize("name", ["base", "中文模型很长的名字一二三"])
def test_wide_characters_take_two_columns(name: str) -> None:
    lines = told([model("base"), model(name)], []).splitlines()
    rows = [line for line in lines if "4.250" in line]
    assert len({columns(row) for row in rows}) == 1
    if name != "base":
        assert rows[1].startswith("..") and name in lines[1]


def test_columns_that_do_not_fit_go_below() -> None:
    rows = [["", "one", "two", "three"], ["中", "1", "22", "333"]]
    assert aligned(rows, 12) == ["    one  two", "中    1   22", "", "    three", "中    333"]
    assert aligned(rows, 3)[:2] == ["    one", "中    1"]  # one at least
    assert aligned([["a"]]) == []


def test_a_model_called_by_its_place_needs_no_legend() -> None:
    assert told([model("m") | {"model": "m"}], []).startswith("中文: 312 documents, 65,432 characters")
