"""Runs that break at odd moments, in one process: what goes on, and from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import DoesNotFit, UserError
from chinese_llama.train import course, trainer
from chinese_llama.train.log import read_log
from tests import tiny
from tests.train.running import losses, pretrain, tensors

COMMON = ("--max_steps", "8", "--save_steps", "2", "--logging_steps", "3", "--lr_scheduler_type", "constant")


class Killed(BaseException):
    """Stands in for a kill: nothing of ours catches it and goes on."""


def broken(place: Any, name: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the function `name` of a module die when it is called for the nth time, once."""
    original, calls = getattr(place, name), [0]

    def function(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == times:
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(place, name, function)


def same(first: Path, second: Path) -> None:
    """Weights and logs, but for the times."""
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert losses(first) == losses(second)
    steps = [[entry["step"] for entry in read_log(path / "log.jsonl")] for path in (first, second)]
    assert steps[0] == steps[1]
    manifests = [read_manifest(path) for path in (first, second)]
    assert manifests[0] and manifests[1] and manifests[0].metrics == manifests[1].metrics


@pytest.fixture(scope="module")
def whole(extended: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(extended, work / "zh.jsonl", tmp_path_factory.mktemp("whole") / "a", *COMMON)


@pytest.mark.parametrize(
    ("place", "name", "times"),
    [
        (course, "save", 1),  # after the last checkpoint, before the adapter
        (trainer, "seal", 3),  # the third checkpoint is written, but not sealed
        (trainer, "rotate_checkpoints", 3),  # just after a checkpoint; between two lines of the log
        (course, "_metrics", 1),
    ],
)
def test_a_run_that_breaks_ends_as_if_it_had_not(
    place: Any,
    name: str,
    times: int,
    whole: Path,
    extended: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(place, name, times, monkeypatch)
    with pytest.raises(Killed):
        pretrain(extended, work / "zh.jsonl", tmp_path / "a", *COMMON)
    assert not (tmp_path / "a").exists()
    same(whole, pretrain(extended, work / "zh.jsonl", tmp_path / "a", *COMMON))


def test_one_checkpoint_is_enough_to_go_on(
    whole: Path, extended: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one goes only when the new one is whole."""
    broken(trainer, "seal", 2, monkeypatch)
    more = (*COMMON, "--save_total_limit", "1")
    with pytest.raises(Killed):
        pretrain(extended, work / "zh.jsonl", tmp_path / "a", *more)
    assert (tmp_path / "a.run" / "checkpoint-2").is_dir()
    same(whole, pretrain(extended, work / "zh.jsonl", tmp_path / "a", *more))


def test_a_checkpoint_of_zeros_is_passed_over(
    whole: Path, extended: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves: a file of the right size."""
    broken(course, "save", 1, monkeypatch)
    with pytest.raises(Killed):
        pretrain(extended, work / "zh.jsonl", tmp_path / "a", *COMMON)
    file = tmp_path / "a.run" / "checkpoint-8" / "optimizer.pt"
    file.write_bytes(bytes(file.stat().st_size))
    same(whole, pretrain(extended, work / "zh.jsonl", tmp_path / "a", *COMMON))


def test_other_texts_may_be_measured_from_now_on(
    extended: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(trainer, "rotate_checkpoints", 2, monkeypatch)
    with pytest.raises(Killed):
        pretrain(
            *(extended, work / "zh.jsonl", tmp_path / "a", *COMMON, "--eval_steps", "2"),
            *("--eval_text", f"en={work / 'en.jsonl'}"),
        )
    made = pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "a", *COMMON, "--eval_steps", "2", "--save_steps", "4"),
        *("--eval_text", f"zh={work / 'zh.jsonl'}"),
    )
    page = (made / "run.md").read_text(encoding="utf-8")
    assert "en, bits per character" in page and "zh, bits per character" in page


def test_forgetting_is_not_forgotten(extended: Path, work: Path, tmp_path: Path) -> None:
    """The same command does not slip through when it is given again."""
    arguments = (
        *("--max_steps", "8", "--learning_rate", "0.3", "--eval_steps", "4", "--warmup_steps", "0"),
        *("--eval_text", f"en={work / 'en.jsonl'}", "--max_regression", "en=0.01", "--on_regression", "stop"),
    )
    for _ in range(3):
        with pytest.raises(UserError, match=r"Stopped: en rose from .* by step 4,"):
            pretrain(extended, work / "zh.jsonl", tmp_path / "a", *arguments)


def test_an_adapter_goes_on_only_on_its_own_base(
    whole: Path, extended: Path, tokenizer: Path, work: Path, tmp_path: Path
) -> None:
    from chinese_llama.model.resize import extend_model

    tiny.write_base(tmp_path / "base", tiny.base_tokenizer(), initializer_range=0.1)
    extend_model(tmp_path / "base", tokenizer, tmp_path / "other")
    with pytest.raises(DoesNotFit, match="trained on another base"):
        pretrain(tmp_path / "other", work / "zh.jsonl", tmp_path / "a", "--init_adapter", str(whole))
    with pytest.raises(DoesNotFit, match="are the same one"):
        pretrain(
            *(extended, work / "zh.jsonl", tmp_path / "a"),
            *("--init_adapter", str(whole), "--adapters", f"plus={whole}"),
        )


def test_a_dora_adapter_goes_on(extended: Path, work: Path, tmp_path: Path) -> None:
    first = pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "3", "--learning_rate", "1e-2"),
        "--use_dora",
    )
    second = pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "b", "--max_steps", "3", "--learning_rate", "1e-2"),
        *("--init_adapter", str(first)),
    )
    assert tensors(first).keys() == tensors(second).keys()
    assert any("lora_magnitude" in name for name in tensors(second))
    assert losses(second)[0] < losses(first)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed: -1 is less than 0"),
        (["--learning_rate", "-1e-3"], "learning_rate: -0.001 is less than 0"),
        (["--learning_rate", ".nan"], "learning_rate: nan is not a finite number"),
        (["--adam_beta1", "2"], "beta"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size: 0 is less than 1"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: 0 is less than 1"),
        (["--weight_decay", "-1"], "weight_decay: -1 is less than 0"),
        (["--remove_unused_columns", "true"], "remove_unused_columns is not taken"),
        (["--save_only_model", "true"], "save_only_model is not taken: a run could not be resumed"),
        (["--eval_on_start", "true"], "eval_on_start is not taken"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "cannot be set up: .*min_lr"),
        (["--num_train_epochs", "0", "--max_steps", "-1"], "no step to train"),
        (["--lora_alpha", ".nan"], "lora_alpha must be a finite number"),
        (["--max_regression", "en=.nan"], "max_regression: en: nan is not a share"),
        (["--eval_text", "a/b=x.txt"], "must have no slash"),
        (["--accelerator_config", '{"dispatch_batches": true}'], "dispatch_batches is not taken"),
        (["--lora_target_modules", "q_proj", "lm_head"], "LoRA: trainable_token_indices cannot be applied"),
        (["--rows_only_steps", "-1"], "rows_only_steps must be a finite number, and not negative"),
    ],
)
def test_a_bad_setting_is_one_sentence(
    arguments: list[str], message: str, extended: Path, work: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "3", *arguments)
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.run").exists()


def test_single_rows_of_tied_matrices_are_not_divided(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 meets them twice, and fails inside PyTorch."""
    tied = tiny.write_base(tmp_path / "tied", tiny.base_tokenizer(), tied=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="new-rows does not go with FSDP where both matrices are one"):
        pretrain(tied, work / "zh.jsonl", tmp_path / "a", "--max_steps", "3", "--use_cpu", "true")


def test_a_dry_run_refuses_what_the_run_would(extended: Path, work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves LoRA none of the 4 steps"):
        pretrain(
            *(extended, work / "zh.jsonl", tmp_path / "a", "--dry_run", "--max_steps", "4"),
            *("--rows_only_steps", "100"),
        )


def test_a_text_must_not_hide_held_out_documents(extended: Path, tmp_path: Path) -> None:
    from tests import tiny

    data = tiny.write_texts(tmp_path / "zh.jsonl", [f"{text} {n}" for n, text in enumerate(tiny.CHINESE)])
    with pytest.raises(UserError, match="'zh' is the name of a source"):
        pretrain(extended, data, tmp_path / "a", "--eval_split", "0.3", "--eval_text", f"zh={data}")


def test_half_precision_and_checkpointing_train(extended: Path, work: Path, tmp_path: Path) -> None:
    """On the CPU: what trains is float32, so the loss is close to that of float32."""
    common = ("--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-2", "--lora_dropout", "0")
    plain = losses(pretrain(extended, work / "zh.jsonl", tmp_path / "a", *common))
    checkpointed = pretrain(
        extended, work / "zh.jsonl", tmp_path / "b", *common, "--gradient_checkpointing", "true"
    )
    assert losses(checkpointed) == pytest.approx(plain, rel=1e-5)
    for dtype in ("bfloat16", "float16"):
        half = pretrain(
            extended, work / "zh.jsonl", tmp_path / dtype, *common, "--dtype", dtype, "--use_cpu", "true"
        )
        assert losses(half) == pytest.approx(plain, rel=0.03)
        assert all(tensor.dtype == torch.float32 for tensor in tensors(half).values())
