"""Which stages a workspace has, and what becomes of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chinese_llama.adapt import plan
from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import OutputExists, UserError
from chinese_llama.workspace import FILE, Workspace
from tests.adapt import spaces


def names(**values: Any) -> list[str]:
    return [stage.name for stage in plan.stages_of(Workspace(Path("/nowhere") / FILE, values))]


TRAINED = {"pt_lora": {"data": "zh.jsonl"}, "sft_lora": {"data": "ins.jsonl"}}


def test_a_workspace_has_the_stages_that_it_says_something_of() -> None:
    both = ["extend_vocab", "extend_model", "pt_lora", "sft_lora", "merge", "eval"]
    assert names(**TRAINED) == both
    assert names(train_vocab={"corpus": ["zh.jsonl"]}, **TRAINED) == ["train_vocab", *both]
    own = {"train_vocab": {"corpus": ["zh.jsonl"]}, "extend_vocab": {"chinese_sp": "other.model"}}
    assert names(**own, **TRAINED) == both
    assert names(control={}, **TRAINED) == [*both[:2], "control", *both[2:]]
    assert names(pt_lora={"data": "zh.jsonl"}) == ["extend_vocab", "extend_model", "pt_lora", "merge", "eval"]
    assert names(merge={"loras": []}) == ["extend_vocab", "extend_model", "eval"]


def test_without_instructions_only_plus_is_merged() -> None:
    space = Workspace(Path("/nowhere") / FILE, {"pt_lora": {"data": "zh.jsonl"}})
    assert space.settings.merge.loras == ["plus"]


def test_each_stage_reads_those_below_it() -> None:
    found = plan.stages_of(Workspace(Path("/nowhere") / FILE, {**TRAINED, "control": {}}))
    reads = {stage.name: stage.reads for stage in found}
    assert reads["pt_lora"] == ("extend_model",) and reads["sft_lora"] == ("extend_model", "pt_lora")
    assert reads["merge"] == ("extend_model", "pt_lora", "sft_lora")
    assert reads["control"] == () and "control" in reads["eval"]
    elsewhere = {"pt_lora": {"data": "zh.jsonl", "model_name_or_path": "other"}}
    found = plan.stages_of(Workspace(Path("/nowhere") / FILE, elsewhere))
    assert {stage.name: stage.reads for stage in found}["pt_lora"] == ()


def test_only_and_from_choose() -> None:
    found = plan.stages_of(Workspace(Path("/nowhere") / FILE, TRAINED))
    assert [s.name for s in plan.chosen(found, None, None)] == [s.name for s in found]
    assert [s.name for s in plan.chosen(found, "pt-lora", None)] == ["pt_lora"]
    assert [s.name for s in plan.chosen(found, None, "merge")] == ["merge", "eval"]
    with pytest.raises(UserError, match=r"--only sft_lra: .*did you mean 'sft_lora'.*extend_vocab"):
        plan.chosen(found, "sft_lra", None)
    with pytest.raises(UserError, match="--from control: this workspace has no such stage"):
        plan.chosen(found, None, "control")
    with pytest.raises(UserError, match="exclude each other"):
        plan.chosen(found, "merge", "merge")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, work: Path, base: Path, chinese_sp: Path) -> Workspace:
    """A workspace in which tokenizer and extended model stand."""
    space = spaces.write(tmp_path_factory.mktemp("space"), spaces.settings(work, base, chinese_sp))
    for stage in plan.stages_of(space)[:2]:
        stage.make({"keep": True}, False)
    return space


def states(space: Workspace, **changed: Any) -> dict[str, plan.State]:
    import yaml

    values = yaml.safe_load(space.file.read_text(encoding="utf-8"))
    for name, section in changed.items():
        values[name] = {**values.get(name, {}), **section}
    return plan.states(plan.stages_of(Workspace(space.file, values)))


def test_what_stands_and_what_is_missing(made: Workspace) -> None:
    found = states(made)
    assert [found[name].kind for name in ("extend_vocab", "extend_model")] == [plan.STANDS] * 2
    assert [found[name].kind for name in ("pt_lora", "sft_lora", "merge", "eval")] == [plan.MISSING] * 4


def test_another_setting_makes_a_stage_stale_and_those_above_it(made: Workspace) -> None:
    found = states(made, extend_vocab={"min_count": 0, "pad_token": "<|pad|>"})
    assert found["extend_vocab"] == plan.State(
        plan.STALE, "made with pad_token None, and <|pad|> is asked for"
    )
    assert found["extend_model"] == plan.State(plan.OPEN, "extend_vocab is made first")
    assert states(made, extend_model={"init": "random"})["extend_vocab"].kind == plan.STANDS


def test_asking_makes_nothing(made: Workspace) -> None:
    folder = made.file.parent
    before = sorted(folder.rglob("*"))
    states(made, extend_model={"init": "random"})
    assert sorted(folder.rglob("*")) == before


def test_a_result_whose_file_was_changed_or_removed_is_stale(made: Workspace) -> None:
    place = made.path(made.settings.extend_model.output)
    manifest = read_manifest(place)
    assert manifest is not None
    weights = place / next(iter(manifest.files))
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-4])
        assert "has been changed since" in states(made)["extend_model"].why
        weights.unlink()
        assert "has been removed since" in states(made)["extend_model"].why
    finally:
        weights.write_bytes(content)
    assert states(made)["extend_model"].kind == plan.STANDS


def test_what_is_no_result_of_this_tool_is_never_made_again(made: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputExists, match="mine exists"):
        states(made, extend_vocab={"output": str(tmp_path / "mine")})
