"""The trainer's own parts: groups and their rates, the watch for NaN, whole checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chinese_llama.artifacts import Manifest
from chinese_llama.model.load import load_model
from chinese_llama.model.lora import add_lora, lora_config
from chinese_llama.train import session
from chinese_llama.train.checkpoints import last_checkpoint, seal, sealed_checkpoint, whole
from chinese_llama.train.fields import PretrainingFields
from chinese_llama.train.trainer import Watch, parameter_groups

ARGUMENTS = SimpleNamespace(learning_rate=1e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def model(extended: Path) -> Any:
    loaded = load_model(extended, "float32")
    new = list(range(420, loaded.config.vocab_size))
    return add_lora(loaded, lora_config(loaded, 4, 8, 0.0, ["q_proj", "down_proj"], "new-rows", new))


def rates(model: Any, **fields: Any) -> dict[str, tuple[float, float]]:
    groups = parameter_groups(model, ARGUMENTS, PretrainingFields(**fields))
    return {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}


def test_rows_have_a_rate_of_their_own_and_no_decay(model: Any) -> None:
    assert rates(model) == {"lora": (1e-3, 0.1), "rows": (1e-3, 0.0)}
    assert rates(model, embedding_learning_rate=5e-4)["rows"] == (5e-4, 0.0)
    assert rates(model, embedding_learning_rate=0.0)["rows"] == (0.0, 0.0)


def test_every_trainable_parameter_is_in_one_group(model: Any) -> None:
    groups = parameter_groups(model, ARGUMENTS, PretrainingFields(loraplus_lr_ratio=16.0))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)


def test_lora_plus_rates_are_those_of_peft(model: Any) -> None:
    """peft's own optimiser for LoRA+ gives A and B the same rates."""
    from peft.optimizers import create_loraplus_optimizer

    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.1
    )
    rate = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    ours = parameter_groups(model, ARGUMENTS, PretrainingFields(loraplus_lr_ratio=16.0))
    lora = [(group["lr"], p) for group in ours if group["name"] != "rows" for p in group["params"]]
    assert lora and all(rate[id(parameter)] == pytest.approx(lr) for lr, parameter in lora)
    assert {group["name"] for group in ours} == {"lora", "lora_B", "rows"}


def told(*steps: tuple[float, float], scaled: bool = False) -> tuple[Watch, list[Any]]:
    """A watch after steps of (loss, gradient norm), and what it said after each."""
    watch, said = Watch(), []
    for number, (loss, norm) in enumerate(steps, 1):
        watch.losses.append((torch.tensor(loss), [("zh.jsonl", [number])]))
        watch.step(number, torch.tensor(norm), scaled)
        said.append(watch.bad())
    return watch, said


def test_a_watch_tells_the_step_and_its_documents() -> None:
    nan = float("nan")
    assert told((1.0, 1.0), (2.0, 3.0))[1] == [None, None]
    assert told((1.0, 1.0), (nan, 1.0))[1][1] == (2, "The loss is nan", [("zh.jsonl", [2])])
    assert told((1.0, float("inf")))[1][0] == (1, "The gradient is inf", [("zh.jsonl", [1])])
    assert told((1.0, float("inf")), scaled=True)[1] == [None]


def test_a_watch_sees_the_gradient_grow() -> None:
    assert told((1.0, 1.0), (1.0, 2.0), (1.0, 30.0))[0].grown() == "1 to 30"
    assert told((1.0, 1.0), (1.0, 2.0), (1.0, 3.0))[0].grown() == ""


def checkpoint(directory: Path, step: int, sealed: bool = True) -> Path:
    made = directory / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "optimizer.pt").write_bytes(b"x" * 100)
    (made / "trainer_state.json").write_text("{}")
    if sealed:
        seal(made)
    return made


def test_a_checkpoint_counts_when_it_is_sealed_and_keeps_its_sizes(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 5)
    assert whole(made)
    (made / "optimizer.pt").write_bytes(b"x" * 99)
    assert not whole(made)
    assert not whole(checkpoint(tmp_path, 6, sealed=False))
    (made / "files.json").write_text(json.dumps([]))
    assert not whole(made)


def test_broken_checkpoints_are_passed_over_and_kept_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 15, sealed=False)
    (checkpoint(tmp_path, 20) / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert capsys.readouterr().err.count("is not whole; it is passed over") == 2
    assert (tmp_path / "broken-checkpoint-15").is_dir()
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_the_newest_sealed_checkpoint_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    assert sealed_checkpoint(tmp_path / "nowhere") == ""
    for number in (5, 20, 100):
        (tmp_path / f"checkpoint-{number}").mkdir()
    for number in (5, 20):
        seal(tmp_path / f"checkpoint-{number}")
    before = sorted(tmp_path.rglob("*"))
    assert sealed_checkpoint(tmp_path) == "checkpoint-20", "100 is being written"
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_left_unfinished_is_told_apart(tmp_path: Path) -> None:
    mine, other = (Manifest("adapter", "pt_lora", settings={"lora_r": rank}) for rank in (4, 8))
    output, run = tmp_path / "plus", tmp_path / "plus.run"
    assert session._state(output, mine) == ("missing", "")
    (run / "checkpoint-7").mkdir(parents=True)
    (run / session.RECORD).write_text(session._described(mine))
    assert session._state(output, mine) == ("missing", ""), "the checkpoint is not whole"
    seal(run / "checkpoint-7")
    assert session._state(output, mine) == ("unfinished", "checkpoint-7")
    assert session._state(output, other) == (
        "blocked",
        f"{run} holds an unfinished run with other inputs or settings",
    )
    (run / session.RECORD).write_text("{")
    assert session._state(output, mine)[0] == "blocked"
