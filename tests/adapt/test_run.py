"""The whole way at pico size, as it is typed: what is missing is made, what stands is kept, what broke goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chinese_llama.adapt import plan
from chinese_llama.adapt.run import adapt, planned
from chinese_llama.adapt.settled import settled
from chinese_llama.errors import UserError
from chinese_llama.workspace import Workspace
from tests.adapt import spaces
from tests.train.running import wait_for

BIN = Path(sys.executable).parent
NAMED = "mine.yaml"  # any name will do


def typed(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "chinese-llama"), "adapt", *words], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, work: Path, base: Path, chinese_sp: Path) -> Workspace:
    """A workspace in which all has been made, with a control."""
    values = spaces.settings(work, base, chinese_sp) | {"control": {}, "title": "中文 pico"}
    space = spaces.write(tmp_path_factory.mktemp("adapted"), values, NAMED)
    done = typed(space.file.parent, NAMED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "[7/7] eval" in done.stderr and "report.html" in done.stdout
    return space


def told(space: Workspace) -> dict[str, Any]:
    return json.loads((space.file.parent / "work/report/report.json").read_text(encoding="utf-8"))


def changed(space: Workspace, folder: Path, **sections: Any) -> Workspace:
    """The workspace with other settings, in a file beside it."""
    values = yaml.safe_load(space.file.read_text(encoding="utf-8"))
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return spaces.write(space.file.parent, values, f"{folder.name}.yaml")


def test_the_report_tells_every_stage_and_the_control(space: Workspace) -> None:
    found = told(space)
    assert [s["name"] for s in found["stages"]] == ["base", "extended", "control", "plus", "alpaca", "merged"]
    assert found["title"] == "中文 pico"
    by_name = {s["name"]: s["texts"] for s in found["stages"]}
    for text in ("zh", "en"):
        unmerged, merged = (by_name[name][text]["bits_per_byte"] for name in ("alpaca", "merged"))
        assert merged == pytest.approx(unmerged, rel=1e-4)
        assert by_name["control"][text]["tokens"] == by_name["base"][text]["tokens"]
    pairs = [(c["stage"], c["baseline"]) for c in found["comparisons"]]
    assert pairs == [("merged", "base"), ("control", "base"), ("plus", "control")]
    assert set(found["curves"]) == {"control", "plus", "alpaca"}
    assert {"base", "tokenizer", "extended", "control", "plus", "alpaca", "merged"} <= {
        a["role"] for a in found["artifacts"]
    }
    assert all(len(a["sha256"]) == 64 for a in found["artifacts"])
    assert found["vocabulary"]["added"] > 0
    assert [set(s["answers"]) for s in found["samples"]] == [{"base", "merged"}] * 2
    speeds = {s["name"]: s["speed"] for s in found["stages"] if s["speed"]}
    assert set(speeds) == {"base", "merged"}


def test_the_control_reads_the_same_characters(space: Workspace) -> None:
    found = told(space)
    read = {name: log[-1]["characters"] for name, log in found["curves"].items()}
    per_step = read["control"] / found["curves"]["control"][-1]["step"]
    assert abs(read["control"] - read["plus"]) <= per_step


def test_all_stands_when_it_is_run_again(space: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    folder = space.file.parent
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    found = plan.stages_of(space)
    assert {state.kind for state in plan.states(found).values()} == {plan.STANDS}
    assert settled(space, found)
    over, text = adapt(Workspace(space.file))
    assert over == [] and "merged" in text
    assert capsys.readouterr().err.count("stands") == 7
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before


def test_a_dry_run_makes_nothing_and_says_what_would_be_made(space: Workspace, tmp_path: Path) -> None:
    folder = space.file.parent
    other = changed(space, tmp_path, sft_lora={"max_steps": 4})
    before = sorted(folder.rglob("*"))
    text = planned(other)
    assert sorted(folder.rglob("*")) == before
    state = {line.split()[0]: line.partition(": ")[2] for line in text.splitlines()[1:8]}
    assert state["pt_lora"] == "stands" and state["extend_model"] == "stands"
    assert state["sft_lora"] == "to be made again (made with max_steps 3, and 4 is asked for)"
    assert state["merge"] == "stands or is made again (sft_lora is made first)"
    assert "--force" in planned(other, only="pt_lora", force=True)


def test_only_what_is_stale_is_made_again(space: Workspace, tmp_path: Path) -> None:
    folder = space.file.parent
    plus = (folder / "work/plus/adapter_model.safetensors").stat().st_mtime_ns
    other = changed(space, tmp_path, eval={"samples": 1}, merge={"output": "work/again"})
    done = typed(folder, other.file.name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("stands") == 5 and "made again: it was made" in done.stderr
    assert (folder / "work/again/model.safetensors").is_file()
    assert (folder / "work/plus/adapter_model.safetensors").stat().st_mtime_ns == plus
    assert len(told(space)["samples"]) == 1


def test_a_broken_limit_is_exit_code_1_with_the_report_written(space: Workspace, tmp_path: Path) -> None:
    limits = {"max_regression": {"en": 0.0, "zh": 0.0}, "output": "work/gate"}
    other = changed(space, tmp_path, eval=limits)
    done = typed(space.file.parent, other.file.name, "--only", "eval")
    found = json.loads((space.file.parent / "work/gate/report.json").read_text(encoding="utf-8"))
    worse = [name for name, c in found["comparisons"][0]["texts"].items() if c["difference"] > 0]
    assert worse, "three steps at this rate do harm somewhere; choose another limit"
    assert done.returncode == 1, done.stderr[-2000:]
    assert found["comparisons"][0]["broken"] == worse
    assert all(f"{name}: " in done.stdout for name in worse) and "over the limit of" in done.stdout


def test_a_stopped_training_goes_on(space: Workspace, tmp_path: Path) -> None:
    folder = space.file.parent
    longer = {"max_steps": 4000, "save_steps": 5, "output_dir": "work/long"}
    other = changed(space, tmp_path, pt_lora=longer, control=None)
    words = [str(BIN / "chinese-llama"), "adapt", other.file.name, "--only", "pt_lora"]
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(folder / "work/long.run", "checkpoint-5", process)
    with pytest.raises(UserError, match=rf"Another process works in .*{other.file.name}"):
        adapt(other, only="pt_lora")
    os.kill(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error[-2000:]
    assert "the same command goes on" in error and "Traceback" not in error
    state = plan.states(plan.stages_of(other))["pt_lora"]
    assert state.kind == plan.UNFINISHED and state.why.startswith("checkpoint-")
    faster = changed(other, tmp_path / "faster", pt_lora={"learning_rate": 1e-3})
    assert plan.states(plan.stages_of(faster))["pt_lora"].kind == plan.BLOCKED
    with pytest.raises(UserError, match=r"unfinished run with other .*--only pt_lora --force"):
        adapt(faster, only="pt_lora")
    assert not (folder / "work/long").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": None}, "names no base"),
        ({"base": "not/here/at/all"}, r"base: .*not/here/at/all: no such directory"),
        ({"pt_lora": {"data": "nothing.jsonl"}}, r"nothing\.jsonl: no such file"),
        ({"sft_lora": {"lerning_rate": 1}}, "'lerning_rate' is no field .*did you mean 'learning_rate'"),
        ({"eval": {"text": {"zh": "nothing.txt"}}}, r"nothing\.txt: no such file"),
        ({"eval": {"prompts": "nothing.txt"}}, r"nothing\.txt: no such file"),
        ({"eval": {"choices": {"ceval": "nothing"}}}, "nothing"),
        ({"eval": {"max_regression": {"e": 0.1}}}, r"no text is named 'e'"),
        ({"launch": "nothing.yaml"}, r"nothing\.yaml: no such file \(`launch:`"),
    ],
)
def test_what_any_stage_would_trip_over_is_told_before_the_first(
    tmp_path: Path, work: Path, base: Path, chinese_sp: Path, values: dict[str, Any], message: str
) -> None:
    whole = spaces.settings(work, base, chinese_sp)
    for name, value in values.items():
        whole[name] = {**whole[name], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        adapt(spaces.write(tmp_path, whole))
    assert not (tmp_path / "work").exists()


def test_only_needs_what_lies_below(tmp_path: Path, work: Path, base: Path, chinese_sp: Path) -> None:
    space = spaces.write(tmp_path, spaces.settings(work, base, chinese_sp))
    with pytest.raises(
        UserError,
        match=r"pt_lora reads .*extended, which extend_model has not made yet; begin with --from extend_model",
    ):
        adapt(space, only="pt_lora")
    assert not (tmp_path / "work").exists()
