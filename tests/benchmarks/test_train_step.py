"""The benchmark of a training step: two contenders through the real entry, and its arithmetic."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.step.material import flops, slice_of
from benchmarks.train_step import run, table
from tests import tiny


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, base: Path, chinese_sp: Path, work: Path) -> list[str]:
    """RESULTS.md, line by line, after a run of two contenders, one that fails and one that is not installed."""
    place = tmp_path_factory.mktemp("step")
    given = [
        "--tokenizer",
        base / "tokenizer.model",
        "--chinese-sp",
        chinese_sp,
        "--corpus",
        work / "zh.jsonl",
    ]
    sizes = "--hidden 32 --layers 1 --heads 2 --block 16 --batch 2 --measured 1 --rounds 1 --dtype float32"
    names = ["--contenders", "ours,modules-to-save,trl,axolotl", "--peer", "trl=/bin/false"]
    places = ["--work", place / "made", "--results", place / "RESULTS.md"]
    words = ["train-step", *given, *sizes.split(), *names, *places]
    main([str(word) for word in words])
    return (place / "RESULTS.md").read_text(encoding="utf-8").splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_contenders_compute_the_same(results: list[str]) -> None:
    """Same weights, same blocks in the same order: the first losses are equal, and so is nearly the next."""
    header, _, *rows = [cells(line) for line in results if line.startswith("|")]
    ours, peft = (dict(zip(header, row, strict=True)) for row in rows)
    assert ours[""] == "ours, `embeddings: new-rows`"
    assert peft["step / `modules_to_save`"] == peft["peak / `modules_to_save`"] == "1.00"
    assert ours["loss at step 0"] == peft["loss at step 0"]  # four digits; a mark would make them differ
    assert float(ours["mean loss after it"]) == pytest.approx(float(peft["mean loss after it"]), abs=0.05)
    peak = next(value for name, value in ours.items() if name.startswith("peak memory"))
    assert float(peak.split()[0]) >= float(ours["memory when loaded, GiB"])


def test_it_says_what_ran_and_what_did_not(results: list[str]) -> None:
    text = "\n".join(results)
    assert "float32, blocks of 16" in text
    assert "left out: axolotl. trl failed (ended without a word)." in text


def test_options_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--tokenizer", "a", "--chinese-sp", "b", "--corpus", "c"]
    for words, sentence in (
        (["--contenders", "our"], r"unknown contenders: ['our']"),
        (["--measured", "0"], "at least 1"),
        (["--peer", "trl"], "NAME=PYTHON"),
    ):
        with pytest.raises(SystemExit):
            main(["train-step", *files, *words])
        assert sentence in capsys.readouterr().err


def test_no_contender_begins_when_the_time_is_over() -> None:
    """And nothing of it is written."""
    assert run("ours", None, Namespace(end=0.0, seconds=5)) == {"failed": "not begun: 5 s were over"}


def test_a_loss_that_differs_is_marked() -> None:
    """And ratios are those of rounds, not of medians."""
    made = {
        "options": {"hidden": 8, "layers": 1, "block": 4},
        "rows": 10,
        "rate": 1e9,
        "characters_per_token": 2.0,
    }
    options = Namespace(dtype="float32", block=4, cuda=False)

    def once(loss: float, seconds: float) -> dict[str, object]:
        gib = 2**30
        return {
            "first_loss": loss,
            "later_loss": 1,
            "seconds": [seconds],
            "loaded": gib,
            "peak": gib,
            "batch": 1,
        }

    found = {"ours": [once(2.5, 1), once(2.5, 3)], "modules-to-save": [once(2.0, 2), once(2.0, 2)]}
    ours, peft = (cells(line) for line in table(found, options, made).splitlines()[2:])
    assert ours[2] == "2.5000 (differs!)" and peft[2] == "2.0000"
    assert ours[4:8] == ["2.000", "1.00", "2", "4"]


def test_the_flop_of_a_token_are_those_of_7b() -> None:
    """LLaMA 7B at vocabulary 32,000 has 6,738 million weights, 131 million of them looked up."""
    count = flops({"hidden": 4096, "layers": 32, "block": 2048}, rows=32_000, rank=8)
    assert count["model"] / 4 == pytest.approx(6.738e9 - 131e6, rel=1e-3)
    assert (
        count["lora"] / 6 == 19_988_480
    )  # the published number of trainable weights of r=8 on all projections
    assert count["whole head"] == 2 * 131_072_000


def test_a_slice_ends_with_a_line(tmp_path: Path) -> None:
    corpus = tiny.write_texts(tmp_path / "all.jsonl", tiny.CHINESE)
    slice_of(corpus, tmp_path / "some.jsonl", 50)
    kept = (tmp_path / "some.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in kept] == tiny.CHINESE[: len(kept)]
    assert len("".join(kept)) >= 50 > len("".join(kept[:-1]))
