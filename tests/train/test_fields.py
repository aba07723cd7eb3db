"""The fields of a recipe come from the workspace, the file and the command line, in that order."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.errors import UserError
from chinese_llama.train.fields import DEFAULTS as COMMON
from chinese_llama.train.fields import (
    PROJECTIONS,
    PretrainingFields,
    Recipe,
    TuningFields,
    resolve,
    settings_of_transformers,
)
from chinese_llama.train.fields import training_arguments as arguments
from chinese_llama.workspace import FILE

DEFAULTS = {"learning_rate": 2e-4, "num_train_epochs": 1, "report_to": "none"}
NEEDED = ["--model_name_or_path", "m", "--data", "d.txt", "--output_dir", "o"]
SPACE = """
base: base
pt_lora: {data: [{path: zh.jsonl, weight: 0.8}, {path: en.jsonl, weight: 0.2}], model_name_or_path: big, lora_r: 4, learning_rate: 3e-3}
sft_lora: {data: ins.jsonl, model_name_or_path: big}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the corpora that the tests name."""
    monkeypatch.chdir(tmp_path)
    for name in ("d.txt", "zh.jsonl", "en.jsonl", "ins.jsonl"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    return tmp_path


def pretraining(*argv: str) -> Recipe[PretrainingFields]:
    return resolve("pt_lora", PretrainingFields, DEFAULTS, argv)


def test_a_command_line_alone_is_enough(here: Path) -> None:
    recipe = pretraining(*NEEDED, "--lora-r", "16", "--learning_rate", "1e-5", "--bf16")
    assert recipe.fields == PretrainingFields(
        "m", data="d.txt", output_dir="o", lora_r=16, eval_text={}, max_regression={}
    )
    assert recipe.fields.lora_target_modules == PROJECTIONS
    given = {"learning_rate": 1e-5, "bf16": True, "per_device_eval_batch_size": 8}
    assert recipe.training == {**COMMON, **DEFAULTS, **given}
    assert recipe.workspace is None
    assert not recipe.keep


def test_later_wins(here: Path) -> None:
    """Defaults, then the file, then the command line."""
    (here / "c.yaml").write_text("lora_r: 32\nlora_alpha: 64\nlearning_rate: 1e-3\nblock_size: 64\n")
    recipe = pretraining(*NEEDED, "--config", "c.yaml", "--lora_r", "2", "--learning_rate=5e-4")
    fields = recipe.fields
    assert (fields.lora_r, fields.lora_alpha, fields.block_size, fields.lora_dropout) == (2, 64, 64, 0.05)
    assert recipe.training["learning_rate"] == 5e-4
    assert recipe.training["num_train_epochs"] == 1


def test_a_workspace_is_the_configuration(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / FILE).write_text(SPACE)
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    recipe = pretraining()
    assert recipe.keep
    assert recipe.workspace is not None
    assert recipe.fields.data == [
        {"path": str(here / "zh.jsonl"), "weight": 0.8},
        {"path": str(here / "en.jsonl"), "weight": 0.2},
    ]
    assert recipe.fields.model_name_or_path == str(here / "big")
    assert recipe.fields.output_dir == str(here / "work/plus")
    assert recipe.fields.lora_r == 4
    assert recipe.training["learning_rate"] == 3e-3
    assert not pretraining("--output_dir", "mine").keep


def test_beside_a_file_a_workspace_gives_only_places(here: Path) -> None:
    (here / FILE).write_text(SPACE)
    (here / "c.yaml").write_text("lora_alpha: 64\nmodel_name_or_path: other\n")
    recipe = pretraining("--config", "c.yaml")
    assert recipe.fields.model_name_or_path == "other"
    assert recipe.fields.output_dir == str(here / "work/plus")
    assert recipe.fields.lora_r == 8
    assert recipe.training["learning_rate"] == DEFAULTS["learning_rate"]
    assert recipe.keep
    assert not pretraining("--config", "c.yaml", "--output_dir", "mine").keep


def test_tuning_stands_on_plus(here: Path) -> None:
    (here / FILE).write_text(SPACE)
    recipe = resolve("sft_lora", TuningFields, DEFAULTS, ["--max_seq_length", "64"])
    assert recipe.fields.adapters == ["plus"]
    assert recipe.fields.output_dir == str(here / "work/alpaca")
    assert recipe.fields.max_seq_length == 64
    recipe = resolve("sft_lora", TuningFields, DEFAULTS, ["--adapters", "plus=work/p", "b"])
    assert recipe.fields.adapters == ["plus=work/p", "b"]


def test_one_value_stands_for_a_list(here: Path) -> None:
    assert pretraining(*NEEDED, "--lora_target_modules", "q_proj").fields.lora_target_modules == ["q_proj"]


def test_no_model_and_no_workspace_names_both_ways_out(here: Path) -> None:
    with pytest.raises(UserError, match=r"give --model_name_or_path, or .*`chinese-llama init DIR`"):
        pretraining("--data", "d", "--output_dir", "o")


@pytest.mark.parametrize(("left_out", "name"), [(2, "data"), (4, "output_dir")])
def test_a_place_that_is_missing_is_named(here: Path, left_out: int, name: str) -> None:
    argv = NEEDED[:left_out] + NEEDED[left_out + 2 :]
    with pytest.raises(UserError, match=rf"--{name} is missing; give it, or set pt_lora\.{name} in"):
        pretraining(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--embeddings", "new-row"], r"embeddings: 'new-row' is none of .*did you mean 'new-rows'"),
        (["--dtype", "int4"], "dtype: 'int4' is none of auto, float32"),
        (["--lora_r", "0"], "lora_r must be at least 1"),
        (["--block_size", "0"], "block_size must be at least 2"),
        (["--block_size", "-5"], "block_size must be at least 2"),
        (["--lora_r", "many"], "command line: lora_r: .*many"),
        (["--config", "none.yaml"], r"none\.yaml: no such file"),
    ],
)
def test_a_wrong_field_is_named(here: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretraining(*NEEDED, *argv)


def test_a_stray_word_is_named(here: Path) -> None:
    with pytest.raises(UserError, match="'stray': settings are given as --name value"):
        pretraining("stray", *NEEDED)


def test_the_file_is_named_where_it_is_wrong(here: Path) -> None:
    (here / "c.yaml").write_text("lora_r: many\n")
    with pytest.raises(UserError, match=r"^c\.yaml: lora_r: .*many"):
        pretraining(*NEEDED, "--config", "c.yaml")


def test_training_arguments_are_those_of_transformers(here: Path) -> None:
    made: Any = arguments(pretraining(*NEEDED, "--max_steps", "3", "--warmup_steps", "0.1"), here / "w")
    assert (made.max_steps, made.learning_rate, made.output_dir) == (3, 2e-4, str(here / "w"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], r"pt_lora: 'learning_rat' is no field .*did you mean 'learning_rate'"),
        (["--blok_size", "1"], r"'blok_size' is no field .*did you mean 'block_size'"),
        (["--lr_scheduler_type", "steep"], "pt_lora: .*steep"),
        (["--learning_rate", "fast"], "pt_lora: .*fast"),
        (["--save_strategy", "sometimes"], "pt_lora: .*sometimes"),
        (["--eval_strategy", "steps"], "pt_lora: eval_strategy is not taken: give eval_text"),
        (["--resume_from_checkpoint", "x"], "pt_lora: resume_from_checkpoint is not taken"),
        (["--data", "gone.txt"], r"gone\.txt: no such file"),
        (["--num_train_epochs", "some"], "pt_lora: .*some"),
    ],
)
def test_what_transformers_refuses_is_one_sentence(here: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        arguments(pretraining(*NEEDED, *argv), here / "w")
    assert "\n" not in str(error.value)


def test_the_adapters_of_a_workspace_belong_to_its_model(here: Path) -> None:
    (here / FILE).write_text(SPACE)
    recipe = resolve("sft_lora", TuningFields, DEFAULTS, ["--model_name_or_path", "other"])
    assert recipe.fields.adapters == []
    (here / "c.yaml").write_text("model_name_or_path: other\n")
    assert resolve("sft_lora", TuningFields, DEFAULTS, ["--config", "c.yaml"]).fields.adapters == []


def test_no_is_a_strategy_though_yaml_reads_false(here: Path) -> None:
    assert pretraining(*NEEDED, "--save_strategy", "no").training["save_strategy"] == "no"


def test_what_transformers_takes_is_read_from_its_source() -> None:
    from transformers import TrainingArguments

    wanted = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    found = settings_of_transformers()
    assert found.keys() == wanted
    assert found["max_steps"] == "int" and found["learning_rate"] == "float"


def test_asking_loads_no_library_that_trains() -> None:
    """`chinese-llama adapt` asks every stage whether it stands."""
    code = "import sys, chinese_llama.train.session; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "peft", "accelerate", "datasets"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("given", "non_blocking", "even"),
    [
        (None, True, True),
        ({"even_batches": False}, True, False),
        ({"non_blocking": False}, False, True),
    ],
)
def test_batches_go_to_the_gpu_behind_the_work(
    given: dict[str, bool] | None, non_blocking: bool, even: bool, tmp_path: Path
) -> None:
    training = {"use_cpu": True} if given is None else {"use_cpu": True, "accelerator_config": given}
    recipe = Recipe("pt_lora", PretrainingFields(), training, None, False)
    found = arguments(recipe, tmp_path).accelerator_config
    assert (found.non_blocking, found.even_batches) == (non_blocking, even)
    assert recipe.training.get("accelerator_config") == given, (
        "what is kept with the result is what was given"
    )


def test_liger_leaves_alone_what_is_leaner_already(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patches of a model come after ours, and would take their place."""
    given = [
        "--use_liger_kernel",
        "true",
        "--use_cpu",
        "true",
        "--liger_kernel_config",
        '{"rope": false, "swiglu": true}',
    ]
    recipe = pretraining(*NEEDED, *given)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    with pytest.raises(
        UserError, match="pt_lora: use_liger_kernel needs liger-kernel: pip install liger-kernel"
    ):
        arguments(recipe, here)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: True)
    off = dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy", "rms_norm", "swiglu"), False)
    assert arguments(recipe, here).liger_kernel_config == {"rope": False, **off}
