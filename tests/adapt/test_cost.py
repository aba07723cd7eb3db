"""What `adapt --dry-run` says of memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chinese_llama.adapt import cost, plan
from chinese_llama.adapt.run import planned
from chinese_llama.errors import UserError
from chinese_llama.model.shards import Weights
from chinese_llama.model.tensors import nbytes
from chinese_llama.workspace import Workspace
from tests.adapt import spaces


def space(tmp_path: Path, work: Path, base: Path, chinese_sp: Path, **more: Any) -> Workspace:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    return spaces.write(folder, spaces.settings(work, base, chinese_sp) | more)


def test_the_disk_is_that_of_the_grown_model(
    tmp_path: Path, work: Path, base: Path, chinese_sp: Path, extended: Path
) -> None:
    found = space(tmp_path, work, base, chinese_sp, extend_vocab={"output": str(work / "tokenizer")})
    told = cost.costs(found, plan.stages_of(found))
    weights = Weights(extended)
    assert told["extend_model"].disk == sum(nbytes(*weights.meta(name)) for name in weights)
    assert told["merge"].disk == told["extend_model"].disk


def test_before_there_is_a_tokenizer_its_size_is_what_was_asked_for(
    tmp_path: Path, work: Path, base: Path, chinese_sp: Path
) -> None:
    old = cost.sizes(space(tmp_path, work, base, chinese_sp)).old_rows
    for section, rows in (
        ({"size": 500}, 500),
        ({}, old + cost.PIECES["20k"]),
        ({"chinese_sp": "8k"}, old + cost.PIECES["8k"]),
    ):
        assert cost.sizes(space(tmp_path, work, base, chinese_sp, extend_vocab=section)).rows == rows
    trained = {"train_vocab": {"corpus": [str(work / "zh.jsonl")], "vocab_size": 77}, "extend_vocab": {}}
    assert cost.sizes(space(tmp_path, work, base, chinese_sp, **trained)).rows == old + 77


def test_training_counts_its_checkpoints_and_the_control_has_no_new_rows(
    tmp_path: Path, work: Path, base: Path, chinese_sp: Path
) -> None:
    found = space(tmp_path, work, base, chinese_sp, control={}, extend_vocab={"size": 5000})
    told = cost.costs(found, plan.stages_of(found))
    plus, control = told["pt_lora"], told["control"]
    hidden = Weights(base).config()["hidden_size"]
    rows = 2 * 4 * hidden * (5000 - cost.sizes(found).old_rows)
    text = sum((work / name).stat().st_size for name in ("zh.jsonl", "en.jsonl"))
    assert plus.disk - control.disk == rows + round(text * cost.PACKED) - round(text * cost.PACKED_BASE)
    assert plus.passing - control.passing == pytest.approx(3 * 3 * rows, rel=1e-4), (
        "three checkpoints, each with two moments"
    )
    assert control.memory < plus.memory


def test_sharding_of_the_launch_file_divides_the_memory(
    tmp_path: Path, work: Path, base: Path, chinese_sp: Path
) -> None:
    one = space(tmp_path, work, base, chinese_sp)
    many = space(tmp_path, work, base, chinese_sp, launch="recipes/launch/fsdp2.yaml")
    stages = plan.stages_of(one)
    alone, shared = (cost.costs(found, stages)["pt_lora"] for found in (one, many))
    assert (shared.memory - cost.PROCESS) / 8 < alone.memory - cost.PROCESS, "each of eight on this machine"
    assert (shared.disk, shared.passing) == (alone.disk, alone.passing), "an adapter is whole"
    for name, sharding in (("ddp", "none"), ("zero2", "zero2"), ("zero3", "zero3"), ("fsdp2", "fsdp")):
        told = cost._launched(space(tmp_path, work, base, chinese_sp, launch=f"recipes/launch/{name}.yaml"))
        assert told == {"processes": 8, "sharding": sharding}


def test_the_table_says_what_becomes_of_each_stage(
    tmp_path: Path, work: Path, base: Path, chinese_sp: Path
) -> None:
    found = space(tmp_path, work, base, chinese_sp)
    stages = plan.stages_of(found)
    kinds = [
        plan.State(plan.STANDS),
        plan.State(plan.STALE, "made with init random, and asymmetric is asked for"),
        plan.State(plan.UNFINISHED, "checkpoint-200"),
        *[plan.State(plan.MISSING)] * (len(stages) - 3),
    ]
    text = cost.table(found, stages, {s.name: k for s, k in zip(stages, kinds, strict=True)})
    lines = text.splitlines()
    assert lines[1].startswith("extend_vocab") and lines[1].endswith("work/tokenizer: stands")
    assert lines[2].endswith("to be made again (made with init random, and asymmetric is asked for)")
    assert lines[3].endswith("work/plus: goes on from checkpoint-200")
    assert lines[4].endswith("work/alpaca: to be made")
    assert "To be written: about" in text and "free on the disk" in text and "at the fullest moment" in text


@pytest.mark.parametrize("count", [0, 5 << 20, 3 << 30])
def test_sizes_are_told_in_a_unit_that_fits(count: int) -> None:
    number, unit = cost._size(count).split()
    assert float(number) * {"MiB": 2**20, "GiB": 2**30}[unit] == pytest.approx(count)


def test_a_plan_fetches_nothing(tmp_path: Path, work: Path, chinese_sp: Path) -> None:
    with pytest.raises(UserError, match="no-one/none is not on this disk yet, and a plan fetches nothing"):
        planned(space(tmp_path, work, Path("no-one/none"), chinese_sp))
