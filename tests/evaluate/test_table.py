"""What `eval` prints: aligned, in 100 columns, all that was measured."""

from __future__ import annotations

from typing import Any

from chinese_llama.evaluate.report.values import columns
from chinese_llama.evaluate.table import told


def model(name: str, factor: float = 1.0, **more: Any) -> dict[str, Any]:
    figures = {
        "characters_per_token": 1.5, "bits_per_character": 4.25 * factor, "bits_per_byte": 1.75 * factor,
        "perplexity": 71234.5 * factor, "characters": 65_432, "bytes": 196_120, "tokens": 43_621,
        "documents": 312, "window": 512, "stride": 256, "context": 250.4 * factor,
    }  # fmt: skip
    return {"name": name, "model": f"models/{name}", "loras": [], "texts": {"zh": figures}, "choices": [],
            "wikitext": None, "speed": None} | more  # fmt: skip


def comparison(stage: str, difference: float, interval: list[float] | None, verdict: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "texts": {"zh": {"difference": difference, "interval": interval, "verdict": verdict}},
    }


def test_columns_are_aligned_and_fit() -> None:
    long = "a-model-with-a-rather-long-name"
    lines = told(
        [model("base"), model(long, 100.0), model("same", loras=["plus", "alpaca"])],
        [
            comparison(long, -0.5481, [-0.5832, -0.5091], "better"),
            comparison("same", -0.0003, [-0.0006, 1.0012], "no difference shown"),
        ],
    ).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].endswith("models/same + plus + alpaca")
    rows = [line for line in lines if "4.250" in line or "425.000" in line]
    assert rows[0].split() == ["base", "1.500", "4.250", "1.750", "71234.50"]
    assert " ".join(rows[1].split()[1:]) == "1.500 425.000 175.000 7.1e+06 -54.8 % (-58.3 to -50.9) better"
    assert rows[1].startswith("..")
    assert rows[2].endswith("-0.03 % (-0.06 to +100)  no difference shown")
    assert (
        len(
            {
                row.index(cell) + len(cell)
                for row, cell in zip(rows, ("1.750", "175.000", "1.750"), strict=True)
            }
        )
        == 1
    )
    head = next(line for line in lines if "perplexity" in line)
    assert head.index("perplexity") + len("perplexity") == rows[0].index("71234.50") + len("71234.50")
    seen = "seen before a scored token, on average: 250, 25,040, 250."
    assert lines[-1] == f"Windows of 512 tokens, stride 256; {seen}"


def test_exams_wikitext_and_speed() -> None:
    exam = {"exam": "ceval", "shots": 5, "questions": 1346, "average": {"accuracy": 0.251, "stderr": 0.012}}
    exam["categories"] = {"STEM": exam["average"], "Social Science": {"accuracy": 1.0, "stderr": 0.0}}
    one = exam | {"average": {"accuracy": 0.5, "stderr": None}}
    speed = {"characters": 256, "characters_per_second": 50.0, "tokens_per_second": 40.0, "device": "cpu",
             "dtype": "float32", "repeats": 5}  # fmt: skip
    word = {"word_perplexity": 12.5, "byte_perplexity": 1.625}
    text = told(
        [
            model("base", choices=[exam], speed=speed, wikitext=word),
            model("ours", choices=[one], speed=speed | {"characters_per_second": 125.0}, wikitext=word),
        ],
        [],
    )
    for line in (
        "ceval, 5-shot, 1,346 questions: % right, standard error",
        "                                                    Social",
        "                       average          STEM       Science",
        "base               25.1 +- 1.2   25.1 +- 1.2  100.0 +- 0.0",
        "ours                      50.0   25.1 +- 1.2  100.0 +- 0.0",
        "base              12.50 per word, 1.625 per byte (perplexity)",
        "Decoding 256 characters token by token on cpu in float32 (medians of 5 runs)",
        "base              50.0 characters/s, 40.0 tokens/s",
        "ours              125.0 characters/s, 40.0 tokens/s, 2.50 times base",
    ):
        assert line in text.splitlines()
    assert text.isascii()
    assert "\n\n   " not in told([model("a", choices=[exam | {"categories": {}}])], [])


def test_wide_characters_take_two_columns() -> None:
    lines = told([model("base"), model("中文模型很长的名字")], []).splitlines()
    rows = [line for line in lines if "4.250" in line]
    assert rows[1].startswith("..模型很长的名字 ") and "中文模型很长的名字" in lines[1]
    assert [columns(row[: row.index("4.250")]) for row in rows] == [
        columns(rows[0][: rows[0].index("4.250")])
    ] * 2


def test_large_changes_keep_to_their_column() -> None:
    text = told([model("a"), model("b")], [comparison("b", 1.2125, [0.9994, 13.9], "worse")])
    row = next(line for line in text.splitlines() if "worse" in line)
    assert row.split()[4:] == ["71234.50", "+121", "%", "(+99.9", "to", "+1390)", "worse"] and len(row) <= 100


def test_one_document_has_a_verdict_without_an_interval() -> None:
    text = told([model("a"), model("b")], [comparison("b", 0.5, None, "one document shows nothing")])
    assert "+50.0 %  one document shows nothing" in text
    single = model("a")
    single["texts"]["zh"]["documents"] = 1
    assert "zh: 1 document, " in told([single], [])


def test_a_model_called_by_its_place_needs_no_legend() -> None:
    text = told([model("m") | {"model": "m"}], [])
    assert text.startswith("zh: 312 documents, 65,432 characters, 196,120 bytes\n")
    assert "interval" not in text and text.endswith("on average: 250.")
