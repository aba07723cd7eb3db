"""A workspace is found from anywhere below it, and fills in what a command line leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chinese_llama import workspace
from chinese_llama.errors import BadFile, UserError
from chinese_llama.resources import PACKAGE
from chinese_llama.workspace import FILE, Workspace


def space(folder: Path, **values: Any) -> Workspace:
    return Workspace(folder / FILE, values)


def test_the_nearest_file_above_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    (tmp_path / FILE).write_text("base: outer\n")
    monkeypatch.chdir(below)
    assert (found := workspace.find()) is not None
    assert found.file == tmp_path / FILE
    (tmp_path / "a" / FILE).write_text("base: inner\n")
    assert (found := workspace.find()) is not None
    assert found.settings.base == "inner"
    assert workspace.required("merge", "--base").file == found.file
    assert (found := workspace.find(tmp_path)) is not None
    assert found.settings.base == "outer"


def test_without_a_file_both_ways_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert workspace.find() is None
    with pytest.raises(UserError, match="give --base, or make a workspace with `chinese-llama init DIR`"):
        workspace.required("merge", "--base")


def test_defaults_lead_from_stage_to_stage(tmp_path: Path) -> None:
    made = space(tmp_path)
    assert made.settings.merge.loras == ["plus", "alpaca"]
    assert made.settings.sft_lora["adapters"] == ["plus"]
    assert made.adapters() == {
        "plus": str(tmp_path / "work/plus"),
        "alpaca": str(tmp_path / "work/alpaca"),
    }


def test_adapters_are_those_of_the_recipes_and_the_listed_ones(tmp_path: Path) -> None:
    made = space(
        tmp_path, pt_lora={"output_dir": "p"}, adapters={"pro": "hfl/pro", "mine": "/x", "alpaca": "a"}
    )
    assert made.adapters() == {
        "plus": str(tmp_path / "p"),
        "alpaca": str(tmp_path / "a"),
        "pro": "hfl/pro",
        "mine": "/x",
    }


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(elsewhere)
    made = space(tmp_path, base="models/llama")
    assert made.base() == str(tmp_path / "models/llama")
    assert made.path("a") == tmp_path / "a"
    assert made.path("/a") == Path("/a")
    assert made.path("~/a") == Path("~/a").expanduser()
    assert made.place("hfl/name") == "hfl/name"
    assert made.paths("a.txt") == str(tmp_path / "a.txt")
    assert made.paths(["a.txt", {"path": "b.txt", "weight": 0.5}]) == [
        str(tmp_path / "a.txt"),
        {"path": str(tmp_path / "b.txt"), "weight": 0.5},
    ]


def test_a_workspace_without_base_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names no base: add `base: DIRECTORY`"):
        space(tmp_path).base()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extend_modl": {}}, r"chinese-llama\.yaml: unknown setting 'extend_modl'.*extend_model"),
        (
            {"train_vocab": {"vocab_sise": 3}},
            r"chinese-llama\.yaml: train_vocab: .*'vocab_sise'.*'vocab_size'",
        ),
        ({"train_vocab": {"vocab_size": "many"}}, r"chinese-llama\.yaml: train_vocab\.vocab_size: .*many"),
        ({"train_vocab": 3}, r"chinese-llama\.yaml: .*train_vocab"),
        ({"adapters": ["a"]}, r"chinese-llama\.yaml: .*adapters"),
        ({"adapters": {"a": ["b"]}}, r"chinese-llama\.yaml: adapters\.a: \['b'\] is no path"),
        ({"eval": {"text": {"zh": ["a"]}}}, r"chinese-llama\.yaml: eval\.text\.zh: \['a'\] is no path"),
        ({"pt_lora": {"output_dir": 3}}, r"chinese-llama\.yaml: pt_lora\.output_dir: 3 is no path"),
        ({"control": {"output_dir": 3}}, r"chinese-llama\.yaml: control\.output_dir: 3 is no path"),
        ({"merge": {"loras": 3}}, r"chinese-llama\.yaml: merge\.loras: 3: write a list"),
        ({"merge": {"loras": [None]}}, r"chinese-llama\.yaml: merge\.loras: \[None\]: write a list"),
        (
            {"sft_lora": {"adapters": {"a": "b"}}},
            r"chinese-llama\.yaml: sft_lora\.adapters: .*: write a list",
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        space(tmp_path, **values).adapters()


@pytest.mark.parametrize("section", ["train_vocab", "extend_model", "pt_lora", "merge", "eval", "adapters"])
def test_a_section_with_every_line_commented_out_means_its_defaults(tmp_path: Path, section: str) -> None:
    (tmp_path / FILE).write_text(f"{section}:\n  # output: elsewhere\n")
    assert Workspace(tmp_path / FILE).settings == space(tmp_path).settings


def test_one_adapter_need_not_be_a_list(tmp_path: Path) -> None:
    """As in a recipe's fields, where a single value stands for a list of one."""
    assert space(tmp_path, merge={"loras": "plus"}).settings.merge.loras == ["plus"]
    assert space(tmp_path, merge={"loras": "plus, alpaca"}).settings.merge.loras == ["plus", "alpaca"]
    assert space(tmp_path, sft_lora={"adapters": "plus"}).settings.sft_lora["adapters"] == ["plus"]


def test_what_is_merged_is_what_the_tuning_builds_on_and_what_it_makes(tmp_path: Path) -> None:
    for adapters, loras in (
        (["plus"], ["plus", "alpaca"]),
        ([], ["alpaca"]),
        (["a", "b"], ["a", "b", "alpaca"]),
    ):
        made = space(tmp_path, sft_lora={"data": "i.jsonl", "adapters": adapters})
        assert made.settings.merge.loras == loras


def test_a_directory_in_a_list_of_adapters_is_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "plus").mkdir()
    monkeypatch.chdir("/")
    made = space(tmp_path)
    assert made.item("old") == made.adapter_place("old") == str(tmp_path / "old")
    assert made.item("x=old") == f"x={tmp_path / 'old'}"
    assert made.item("plus") == "plus" and made.adapter_place("plus") == str(tmp_path / "work/plus")
    assert made.item("chinese-alpaca-7b") == "chinese-alpaca-7b"


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("base: x\nmerge: [\n")
    with pytest.raises(BadFile, match=r"chinese-llama\.yaml, line \d: is not valid YAML"):
        workspace.find(tmp_path)


@pytest.mark.parametrize(
    "place", ["zh.jsonl", "/a b/中文.jsonl", "a, b.jsonl", "x: y.txt", "a #1.txt", "[a].txt"]
)
def test_the_template_holds_what_it_was_given(tmp_path: Path, place: str) -> None:
    """Whatever characters a path has."""
    (tmp_path / FILE).write_text(workspace.template(place, place, place, place), encoding="utf-8")
    settings = Workspace(tmp_path / FILE).settings
    assert settings.base == place
    assert settings.extend_vocab.corpus == [place]
    assert settings.pt_lora["data"] == [{"path": place, "weight": 0.8}, {"path": place, "weight": 0.2}]
    assert settings.sft_lora["data"] == place
    assert settings.pt_lora["learning_rate"] == 2e-4


def test_the_template_names_the_defaults(tmp_path: Path) -> None:
    """What it shows as set is what holds without it."""
    (tmp_path / FILE).write_text(workspace.template("b", "c", None, "i"), encoding="utf-8")
    written, default = Workspace(tmp_path / FILE).settings, space(tmp_path).settings
    assert written.train_vocab.vocab_size == default.train_vocab.vocab_size
    assert written.extend_vocab == replace(default.extend_vocab, corpus=["c"])
    assert written.extend_model == default.extend_model
    assert written.merge == default.merge
    assert written.pt_lora["output_dir"] == default.pt_lora["output_dir"]
    assert written.pt_lora["data"] == [{"path": "c", "weight": 0.8}]


def test_the_quickstart_workspace_loads() -> None:
    loaded = Workspace(PACKAGE / "quickstart" / FILE)
    assert loaded.settings.base
    assert set(loaded.settings.eval.text) == {"zh", "en"}
