"""python -m benchmarks: the list, where a table goes, and `prepare` on a text of some lines."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks import prepare
from benchmarks.__main__ import NAMES, main
from benchmarks.record import command_line, in_turns, markdown, measured, ratio, record

DOCUMENTS = [{"text": f"今天天气很好，我们去公园散步。{number}\nGood morning."} for number in range(40)]
QUESTIONS = [{"instruction": "写出反义词。", "input": "大", "output": f"小 {n}"} for n in range(40)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The two files that `prepare` reads."""
    for name, records in (("zh_pretrain", DOCUMENTS), ("alpaca_zh", QUESTIONS)):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    return tmp_path


def test_without_a_name_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_its_benchmark(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.util.find_spec(f"benchmarks.{name.replace('-', '_')}")
    if name not in ("rows", "train-step"):  # they import torch for their help
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert "--results" in capsys.readouterr().out


def test_an_unknown_name() -> None:
    with pytest.raises(SystemExit, match="'big' is no benchmark; known are vocab, "):
        main(["big"])


def test_a_table_goes_to_the_section_of_its_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["x", "merge", "--results", "r.md", "--work", "/some/place", "--peer", "a=/b/c"]
    )
    assert command_line() == "python -m benchmarks merge --work place --peer a=c"
    file = tmp_path / "new" / "results.md"
    file.parent.mkdir()
    file.write_text(
        "# Results\n\n## Merging: `python -m benchmarks merge --peft`\n\nold\n\n## Other\n\nlast\n"
    )
    record("merge", markdown(["a", "b"], [["x", 1]]), "A note.", file)
    record("rows", "table of rows", "", file)
    text = file.read_text()
    assert capsys.readouterr().out.count("| x | 1 |") == 1
    merging, other, rows = text.split("\n## ")[1:]
    assert merging.startswith("Merging") and merging.index("old") < merging.index("A note.")
    assert merging.rstrip().endswith("| a | b |\n| --- | ---: |\n| x | 1 |")
    assert other.strip() == "Other\n\nlast"
    assert rows.startswith("rows: `python -m benchmarks rows`\n") and rows.strip().endswith("table of rows")


def test_seconds_memory_and_output_of_a_command(tmp_path: Path) -> None:
    code = "import os; x = bytearray(150 << 20); print(os.getcwd())"
    found = measured([sys.executable, "-c", code], tmp_path)
    assert found.output == str(tmp_path)
    assert found.seconds > 0 and 150 < found.peak_mib < 300
    with pytest.raises(SystemExit, match="failed"):
        measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_memory_of_several_processes_is_that_of_all_together() -> None:
    child = "import time; x = bytearray(100 << 20); time.sleep(0.8)"
    code = (
        f"import subprocess, sys; a = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in 'ab']; "
    )
    found = measured([sys.executable, "-c", code + "[one.wait() for one in a]"])
    assert found.peak_mib > 200


def test_ways_take_turns() -> None:
    done: list[str] = []
    found = in_turns({name: lambda name=name: done.append(name) or len(done) for name in "ab"}, 2)
    assert done == ["a", "b", "a", "b"]
    assert found == {"a": [1, 3], "b": [2, 4]}
    assert ratio([1.0, 4.0, 9.0], [2.0, 2.0, 3.0]) == 2.0


@pytest.mark.parametrize("kind", prepare.KINDS)
def test_all_ways_to_prepare_read_the_same_texts(
    kind: str, data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plain.jsonl"
    with gzip.open(data / f"{prepare.KINDS[kind]}.jsonl.gz", "rb") as stream:
        file.write_bytes(stream.read())
    task = prepare.Task(kind, file, tokenizer, 512, tmp_path / "made")
    tokens = {
        way: prepare.timed(way, task)["tokens"] for way in ("ours", "encode_batch", "encode_batch_fast")
    }
    assert tokens["encode_batch"] == tokens["encode_batch_fast"]
    special = 2 * 40  # bos and eos
    assert tokens["ours"] == pytest.approx(tokens["encode_batch"] + special, abs=40)


def test_prepare_from_the_command_line(
    data: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.md"
    options = ["--data", str(data), "--tokenizer", str(tokenizer), "--work", str(tmp_path / "work")]
    main(["prepare", *options, "--ways", "encode_batch", "--rounds", "1", "--results", str(results)])
    lines = [line for line in results.read_text().splitlines() if line.startswith("| encode_batch |")]
    assert len(lines) == 2 and all("| 1.00 |" in line for line in lines)


def test_blocks_as_the_peers_cut_them() -> None:
    made = prepare.grouped(
        {"input_ids": [[1, 2, 3], [4, 5], [6, 7]], "attention_mask": [[1] * 3, [1] * 2, [1] * 2]}, 3
    )
    assert made["input_ids"] == made["labels"] == [[1, 2, 3], [4, 5, 6]]
    assert made["attention_mask"] == [[1] * 3] * 2
