"""`chinese-llama doctor`: output and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chinese_llama.cli_doctor import app
from chinese_llama.errors import report


def doctor(*words: str) -> int:
    """Run the command alone; its exit code."""
    try:
        return report(lambda argv: app(list(argv)), words)
    except SystemExit as done:
        return int(done.code or 0)


def test_healthy(tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(str(tokenizer)) == 0
    out, err = capsys.readouterr()
    assert out.startswith(str(tokenizer)) and out.endswith("Nothing is wrong.\n")
    assert "\x1b[" not in out
    assert "Looking at" in err


def test_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zh.txt").write_bytes("中国的首都是北京，大家都知道。".encode("gb18030"))
    assert doctor(str(tmp_path / "zh.txt")) == 1
    assert "iconv -f GB18030" in capsys.readouterr().out


def test_json_is_all_of_stdout(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zh.jsonl").write_text('{"text": "短"}\n', encoding="utf-8")
    assert doctor(str(tmp_path / "zh.jsonl"), str(tokenizer), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [thing["kind"] for thing in told["things"]] == ["data", "tokenizer"]
    assert told["findings"][0]["check"] == "near-empty-documents"
    assert {*told["findings"][0]} == {"severity", "check", "where", "what", "evidence", "remedy"}


def test_a_path_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("nowhere") == 2
    out, err = capsys.readouterr()
    assert not out and "nowhere: no such file or directory" in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--help") == 0
    assert "--json" in capsys.readouterr().out
