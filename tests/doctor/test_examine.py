"""Everything together: what is looked at, in which order it is told, and that bad content never stops it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chinese_llama.doctor.examine import Report, as_json, examine, text
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.things import Thing
from chinese_llama.errors import UserError
from chinese_llama.terminal import columns
from tests.doctor.broken import copied, set_json


def checks(*paths: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(list(paths)).findings}


def test_healthy_things_have_no_fault(extended: Path, base: Path, tokenizer: Path, chinese_sp: Path) -> None:
    report = examine([base, tokenizer, extended, chinese_sp])
    assert [thing.kind for thing in report.things] == ["model", "tokenizer", "model", "vocabulary"]
    assert report.exit_code == 0
    assert not [finding for finding in report.findings if finding.severity != "note"]
    assert text(report).endswith("Nothing is wrong.")


def test_the_worst_comes_first_and_everything_once(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None, "pad_token": None}))
    (tmp_path / "zh.jsonl").write_text('{"text": "<s>"}\n')
    report = examine([tmp_path / "t", tmp_path / "zh.jsonl", tmp_path / "t"])
    assert [thing.path.name for thing in report.things] == ["t", "zh.jsonl"]
    ranks = [("error", "warning", "note").index(finding.severity) for finding in report.findings]
    assert ranks == sorted(ranks) and ranks[0] == 0
    assert report.exit_code == 1
    told = as_json(report)
    assert told["exit_code"] == 1
    assert told["counts"]["error"] == report.counts()["error"] >= 1
    assert {one["check"] for one in told["findings"]} >= {"no-eos", "no-pad", "control-tokens"}
    assert json.loads(json.dumps(told)) == told


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        examine([tmp_path / "nothing"])
    with pytest.raises(UserError, match="download it first"):
        examine([Path("hfl/chinese-llama-plus-lora-7b")])


def test_bad_content_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("[1, 2")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x00" * 40)
    (tmp_path / "model" / "tokenizer.json").write_text("nonsense")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": 3}')
    (tmp_path / "adapter" / "tokenizer.model").write_bytes(b"")
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "notes.bin").write_bytes(b"\x00\x01")
    (tmp_path / "empty").mkdir()
    report = examine(sorted(tmp_path.iterdir()))
    assert report.exit_code == 1
    for name in ("model", "adapter", "data.jsonl", "notes.bin", "empty"):
        assert any(name in finding.where for finding in report.findings), name
    assert {"invalid-json", "wrong-encoding", "unknown-file"} <= {one.check for one in report.findings}
    assert not {"not-examined"} & {one.check for one in report.findings}


def test_a_directory_of_things_stands_for_them(tokenizer: Path, chinese_sp: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "all" / "one")
    shutil.copytree(tokenizer, tmp_path / "all" / "two")
    assert [thing.path.name for thing in examine([tmp_path / "all"]).things] == ["one", "two"]


def test_a_model_with_its_own_code(base: Path, tmp_path: Path) -> None:
    """As Baichuan is published: no value of its config.json is wrong."""
    place = copied(base, tmp_path / "baichuan")
    (place / "tokenizer.json").unlink()
    own = {"AutoConfig": "configuration_baichuan.BaichuanConfig"}
    set_json(place / "config.json", model_type="baichuan", auto_map=own)
    assert "config-field-wrong" not in checks(place)
    own = {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}
    set_json(place / "tokenizer_config.json", tokenizer_class="BaichuanTokenizer", auto_map=own)
    found = checks(place)
    assert found["needs-own-code"].severity == "error" and "config-field-wrong" not in found


def test_parts_of_one_are_looked_at_once(base: Path, tokenizer: Path) -> None:
    parts = [
        base / "tokenizer.model",
        base,
        base / "config.json",
        base / "." / "model.safetensors",
        tokenizer,
    ]
    report = examine(parts)
    assert [thing.path for thing in report.things] == [base, tokenizer]
    notes = [finding for finding in report.findings if finding.check == "pad-is-unk"]
    assert len(notes) == 1  # of two tokenizers


def test_of_very_many_things_the_first_are_looked_at(tokenizer: Path, tmp_path: Path) -> None:
    for number in range(21):
        (tmp_path / f"{number:02}").mkdir()
        shutil.copy(tokenizer / "tokenizer_config.json", tmp_path / f"{number:02}")
    report = examine([tmp_path])
    assert len(report.things) == 20
    found = next(finding for finding in report.findings if finding.check == "looked-at-in-part")
    assert found.severity == "note" and found.evidence == [str(tmp_path / "20")]


def test_data_alone_do_not_wait_for_torch(work: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from chinese_llama.doctor.examine import examine;"
        f"examine([Path({str(work / 'zh.jsonl')!r})]); print({{'torch', 'transformers'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_workspace_stands_for_all_that_it_names(
    work: Path, base: Path, tokenizer: Path, tmp_path: Path
) -> None:
    shutil.copyfile(work / "ins.jsonl", tmp_path / "eval.jsonl")
    file = tmp_path / "chinese-llama.yaml"
    file.write_text(
        f"base: {base}\n"
        f"extend_vocab: {{output: {tokenizer}}}\n"
        f"pt_lora: {{data: [{{path: {work / 'en.jsonl'}, weight: 1}}]}}\n"
        f"sft_lora: {{data: {work / 'ins.jsonl'}}}\n"
        "eval: {text: {zh: eval.jsonl}}\n"
    )
    for path in (file, tmp_path):
        report = examine([path])
        names = [thing.path.name for thing in report.things]
        assert names == ["base", "tokenizer", "en.jsonl", "ins.jsonl", "eval.jsonl"]
        found = {finding.check: finding for finding in report.findings}
        assert found["workspace-names-missing"].severity == "note"
        assert "adapter plus" in str(found["workspace-names-missing"].evidence)
        assert found["data-overlap"].severity == "error"


def test_a_workspace_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "chinese-llama.yaml"
    for content in ("base: [", "bose: x", "pt_lora: 3", "pt_lora: {data: {weight: 2}}", "eval: {text: 3}"):
        file.write_text(content)
        assert checks(file)["workspace-not-readable"].severity == "error", content


def test_the_text(tmp_path: Path) -> None:
    finding = Finding("warning", "some-check", "here", "Something is so.", ["line 1"], "Do that.")
    report = Report(
        [Thing(tmp_path, "tokenizer", "a tokenizer", {"pieces": 32000})],
        ["chinese-llama merge ..."],
        [finding, replace(finding, where="there")],
    )
    told = re.sub(r"\x1b\[[0-9;]*m", "", text(report))
    assert told.splitlines() == [
        str(tmp_path),
        "  a tokenizer; 32,000 pieces",
        "",
        "Merge, in this order:",
        "  chinese-llama merge ...",
        "",
        "Warnings",
        "  [some-check] here, there",
        "    Something is so.",
        "      line 1",
        "    -> Do that.",
        "",
        "0 errors, 2 warnings, 0 notes.",
    ]
    assert text(Report()).strip() == "Nothing is wrong."


def test_the_text_of_a_terminal() -> None:
    """Sentences and evidence are wrapped; paths stay whole, and commands, which are there to be copied."""
    words, path = "many words " * 20, "/a/rather/long/path/" + "of-a-directory/" * 5
    finding = Finding("error", "x", "here", words.strip(), [words, path], f"chinese-llama merge {words}")
    told = re.sub(r"\x1b\[[0-9;]*m", "", text(Report([], [], [finding]), 60)).splitlines()
    assert f"    -> chinese-llama merge {words}" in told and f"      {path}" in told
    assert all(len(line) <= 60 for line in told if path not in line and "->" not in line)
    indents = [len(line) - len(line.lstrip()) for line in told if line.lstrip().startswith(("many", "words"))]
    chinese = ["词 word " * 12, "字" * 70, f"语料在/{'路径' * 20}/里"]
    told = text(Report([], [], [replace(finding, evidence=chinese, remedy="")]), 60).splitlines()
    told = [line for line in told if any("\u4e00" <= c <= "\u9fff" for c in line)]
    assert [columns(line) for line in told] == [56, 52, 60, 60, 42, 96] and told[-1].strip() == chinese[-1]
    assert (
        indents == [4] * 4 + [6] + [8] * 4
    )  # what follows stands further in only where a line is one of several


def test_what_files_hold_does_not_reach_the_terminal_as_commands(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07"
    finding = Finding("error", "x", f"a{evil}", f"b{evil}", [f"c{evil}"], f"d{evil}")
    thing = Thing(tmp_path, "model", f"a model{evil}", {}, None)
    told = text(Report([thing], [f"merge {evil}"], [finding]))
    assert "\x07" not in told and "\x1b]" not in told and told.count("owned") == 6
