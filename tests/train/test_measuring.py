"""What a run tells: measures, logs, pictures, the forgetting limit, NaN, the dry run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import UserError
from chinese_llama.train.log import read_log
from tests.train.running import losses, pretrain, tensors


def test_nan_stops_with_the_step_the_documents_and_the_cause(
    extended: Path, work: Path, tmp_path: Path
) -> None:
    """A learning rate that makes the loss overflow."""
    with pytest.raises(UserError) as caught:
        pretrain(
            *(extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "40", "--learning_rate", "1e30"),
            *("--max_grad_norm", "0", "--warmup_steps", "0"),
        )
    told = str(caught.value)
    assert re.search(
        r"The (loss|gradient) is (nan|inf) at step \d+\. Its batch held the documents zh \d+", told
    )
    assert "Likely cause" in told and "learning_rate" in told
    assert not (tmp_path / "a").exists()


def test_a_base_with_nan_is_named(extended: Path, work: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(extended, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the base itself: .*layers\.1\.mlp\.up_proj.*not finite"):
        pretrain(broken, work / "zh.jsonl", tmp_path / "a", "--max_steps", "3")


def test_measures_are_logged_drawn_and_told(extended: Path, work: Path, tmp_path: Path) -> None:
    out = pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "6", "--eval_steps", "3"),
        *("--eval_text", f"zh={work / 'zh.jsonl'}", f"en={work / 'en.jsonl'}", "--learning_rate", "1e-2"),
    )
    measured = [entry for entry in read_log(out / "log.jsonl") if "eval" in entry]
    assert [entry["step"] for entry in measured] == [0, 3, 6]
    zh = [entry["eval"]["zh"]["bits_per_character"] for entry in measured]
    assert zh[2] < zh[1] < zh[0]
    page = (out / "run.md").read_text(encoding="utf-8")
    assert f"{zh[2]:.3f}" in page and "| lora_A |" in page
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{zh[2]:.3f}" in (out / "README.md").read_text(encoding="utf-8")
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.metrics["measured"]["eval/zh/bits_per_character"] == zh[2]
    entry = next(entry for entry in read_log(out / "log.jsonl") if "loss" in entry)
    assert {"grad_norm", "tokens_per_second", "characters_per_second", "learning_rates"} <= set(entry)
    assert entry["characters_per_second"] > entry["tokens_per_second"] > 0
    assert "memory_gib" in entry or "gpu_memory_gib" in entry


def test_tensorboard_gets_the_figures(extended: Path, work: Path, tmp_path: Path) -> None:
    """Beside the output, where they outlive the run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "3", "--logging_steps", "1"),
        *("--report_to", "tensorboard", "--eval_text", f"en={work / 'en.jsonl'}"),
    )
    events = EventAccumulator(str(tmp_path / "a.tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert any(name.endswith("loss") for name in names)
    assert any("en/bits_per_byte" in name for name in names)


def test_a_tracker_that_is_not_installed_is_one_sentence(extended: Path, work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="comet"):
        pretrain(extended, work / "zh.jsonl", tmp_path / "a", "--report_to", "comet_ml")


def test_measuring_changes_nothing(extended: Path, work: Path, tmp_path: Path) -> None:
    common = ("--max_steps", "4", "--lora_dropout", "0.1")
    plain = pretrain(extended, work / "zh.jsonl", tmp_path / "a", *common)
    measured = pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "b", *common),
        *("--eval_steps", "1", "--eval_text", f"en={work / 'en.jsonl'}"),
    )
    assert all(torch.equal(tensor, tensors(measured)[name]) for name, tensor in tensors(plain).items())


def test_forgetting_warns_or_stops(
    extended: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate so high that the English gets worse."""
    arguments = (
        *("--max_steps", "8", "--learning_rate", "0.3", "--eval_steps", "2", "--warmup_steps", "0"),
        *("--eval_text", f"en={work / 'en.jsonl'}", "--max_regression", "en=0.01"),
    )
    pretrain(extended, work / "zh.jsonl", tmp_path / "warned", *arguments)
    assert "Warning: en rose from" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"Stopped: en rose from .* over the limit of 1\.0%"):
        pretrain(extended, work / "zh.jsonl", tmp_path / "a", *arguments, "--on_regression", "stop")
    assert not (tmp_path / "a").exists() and list((tmp_path / "a.run").glob("checkpoint-*"))
    pretrain(extended, work / "zh.jsonl", tmp_path / "a", *arguments)
    assert losses(tmp_path / "a") == losses(tmp_path / "warned")
    with pytest.raises(UserError, match="no text is named 'fr'"):
        pretrain(extended, work / "zh.jsonl", tmp_path / "b", *arguments[:-1], "fr=0.1")


def test_a_dry_run_tells_and_runs_a_step(
    extended: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(extended, work / "zh.jsonl", tmp_path / "a", "--dry-run", "--num_train_epochs", "3")
    told = capsys.readouterr().out
    for wanted in ("lora_A", "embed_tokens", "zh ", "100.0%", "frozen weights", "optimizer", "One step ran"):
        assert wanted in told
    steps = int(re.search(r"The run: ([\d,]+) steps of 2 blocks of 32", told)[1].replace(",", ""))  # type: ignore[index]
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.run").exists()
    pretrain(extended, work / "zh.jsonl", tmp_path / "a", "--num_train_epochs", "3")
    manifest = read_manifest(tmp_path / "a")
    assert manifest is not None and manifest.metrics["steps"] == steps
