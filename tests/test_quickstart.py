"""The main job, as a newcomer runs it: one command, then the three that work as typed."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
GIB = 1 << 20  # ru_maxrss counts KiB


def typed(workspace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / words[0]), *words[1:]], cwd=workspace, capture_output=True, text=True, input=""
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    done = typed(folder, "chinese-llama", "quickstart")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "chinese-llama chat --model quickstart/merged" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 * GIB
    return folder


@pytest.fixture(scope="module")
def told(workspace: Path) -> dict[str, Any]:
    return json.loads((workspace / "quickstart/report/report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figures(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{stage: {text: figures}}."""
    return {stage["name"]: stage["texts"] for stage in told["stages"]}


def test_chinese_is_learnt(figures: dict[str, dict[str, Any]]) -> None:
    base, plus, merged = (figures[name]["zh"] for name in ("base", "plus", "merged"))
    assert plus["bits_per_character"] < 0.5 * base["bits_per_character"]
    assert merged["bits_per_character"] < 0.5 * base["bits_per_character"]
    assert merged["characters_per_token"] > 3 * base["characters_per_token"]


def test_english_stays_close_after_pretraining(figures: dict[str, dict[str, Any]]) -> None:
    base, plus = (figures[name]["en"] for name in ("base", "plus"))
    assert plus["bits_per_byte"] < 1.1 * base["bits_per_byte"]
    assert plus["tokens"] == base["tokens"]


def test_merging_loses_nothing(figures: dict[str, dict[str, Any]]) -> None:
    for name in ("zh", "en"):
        unmerged, merged = (figures[stage][name]["bits_per_byte"] for stage in ("alpaca", "merged"))
        assert merged == pytest.approx(unmerged, rel=1e-4)


def test_questions_of_the_kind_that_was_taught_are_answered(told: dict[str, Any]) -> None:
    assert told["right"]["merged"]["questions"] == 120
    assert told["right"]["merged"]["right"] >= 72
    assert told["right"]["base"]["right"] < 12


def test_held_out_texts_are_not_trained_on(workspace: Path) -> None:
    folder = workspace / "quickstart" / "text"
    for name in ("zh", "en"):
        train, held = (
            set((folder / f"{n}.jsonl").read_text("utf-8").splitlines()) for n in (name, f"{name}_heldout")
        )
        assert held and not train & held
    train, held = (
        [json.loads(x) for x in (folder / f"{n}.jsonl").read_text("utf-8").splitlines()]
        for n in ("instructions", "instructions_heldout")
    )
    asked = {(record["instruction"], record["input"]) for record in train}
    assert len(train) >= 300 and not any((record["instruction"], record["input"]) in asked for record in held)


def test_the_report_is_one_page_without_network(workspace: Path) -> None:
    page = (workspace / "quickstart/report/report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 4
    loads = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)([^"')\s>]+)""", page)
    assert loads == []
    assert "| merged |" in (workspace / "quickstart/report/report.md").read_text(encoding="utf-8")


def test_all_stands_when_it_is_run_again(workspace: Path) -> None:
    done = typed(workspace, "chinese-llama", "adapt")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("stands") == 7 and "merged" in done.stdout


def test_the_three_commands_work_as_typed(workspace: Path) -> None:
    commands = (
        ("chinese-llama", "extend-vocab"),
        ("accelerate", "launch", "recipes/pt_lora.py"),
        ("chinese-llama", "merge", "--loras", "plus,alpaca"),
    )
    for command in commands:
        done = typed(workspace, *command)
        assert done.returncode == 0, done.stderr[-2000:]
    (workspace / "deeper").mkdir()
    done = typed(
        workspace / "deeper", "chinese-llama", "merge", "--loras", "plus,alpaca", "--output", "again"
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_accelerate_launch_trains(workspace: Path) -> None:
    command = (
        "accelerate",
        "launch",
        "recipes/pt_lora.py",
        "--output_dir",
        "other",
        "--max_steps",
        "3",
    )
    done = typed(workspace, *command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (workspace / "other" / "adapter_model.safetensors").is_file()


def test_chat_and_generate_answer(workspace: Path) -> None:
    asked = ("generate", "--prompt", "请问中国的首都是哪里？")
    assert "北京" in typed(workspace, "chinese-llama", *asked).stdout
    done = subprocess.run(
        [str(BIN / "chinese-llama"), "chat"],
        cwd=workspace,
        capture_output=True,
        text=True,
        input="请问中国的首都是哪里？\n\n",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0 and "北京" in done.stdout


def test_another_workspace_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "chinese-llama.yaml").write_text("base: mine\n", encoding="utf-8")
    done = typed(tmp_path, "chinese-llama", "quickstart")
    assert done.returncode == 2 and "another workspace" in done.stderr
    assert (tmp_path / "chinese-llama.yaml").read_text(encoding="utf-8") == "base: mine\n"
