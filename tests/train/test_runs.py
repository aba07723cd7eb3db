"""Runs that can be believed: stopped, resumed, spread out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chinese_llama.adapt.launch import recipe
from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import UserError
from chinese_llama.resources import shipped
from chinese_llama.train.log import read_log
from tests import tiny
from tests.train.running import losses, pretrain, start, tensors, wait_for, words


@pytest.fixture
def mixture(work: Path, tmp_path: Path) -> Path:
    """A configuration with everything in play: two weighted sources, shuffling, accumulation, rows first."""
    for name, texts in (("zh", tiny.CHINESE), ("en", tiny.ENGLISH)):
        tiny.write_texts(tmp_path / f"{name}.jsonl", [f"{text} {n}" for n, text in enumerate(texts)])
    data = [
        {"path": f"{tmp_path}/{name}.jsonl", "weight": share} for name, share in (("zh", 0.7), ("en", 0.3))
    ]
    config = {
        "data": data,
        "block_size": 32,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "learning_rate": 5e-3,
        "embedding_learning_rate": 1e-2,
        "rows_only_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 16,
        "logging_steps": 1,
        "save_steps": 4,
        "eval_split": 0.2,
        "eval_steps": 4,
    }
    (tmp_path / "mixture.yaml").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path / "mixture.yaml"


def test_a_run_that_is_killed_twice_equals_one_that_was_not(
    mixture: Path, extended: Path, tmp_path: Path
) -> None:
    """In the rows-only phase, and after it: the weights and the log are those of the whole run."""
    common = ["--config", str(mixture), "--model_name_or_path", str(extended)]
    recipe("pt_lora").main([*common, "--output_dir", str(tmp_path / "whole")])
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        process = start([*common, "--output_dir", str(tmp_path / "broken")])
        wait_for(tmp_path / "broken.run", checkpoint, process)
        process.kill()
        process.communicate()
        assert not (tmp_path / "broken").exists()
    recipe("pt_lora").main([*common, "--output_dir", str(tmp_path / "broken")])
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    measured = [
        [entry["eval"] for entry in read_log(tmp_path / name / "log.jsonl") if "eval" in entry]
        for name in ("whole", "broken")
    ]
    assert measured[0] == measured[1] and len(measured[0]) == 5


def test_lora_waits_while_only_rows_train(mixture: Path, extended: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe("pt_lora").main(
        ["--config", str(mixture), "--model_name_or_path", str(extended), "--output_dir", str(out)]
    )
    rates = [e["learning_rates"] for e in read_log(out / "log.jsonl") if "learning_rates" in e]
    assert [rate["lora"] for rate in rates[:6]] == [0.0] * 6 and rates[7]["lora"] == 5e-3
    assert max(rate["rows"] for rate in rates) == 1e-2
    with pytest.raises(UserError, match="leaves LoRA none of the 4 steps"):
        recipe("pt_lora").main(
            [
                *("--config", str(mixture), "--model_name_or_path", str(extended)),
                *("--output_dir", str(tmp_path / "b"), "--max_steps", "4"),
            ]
        )


def test_equal_configurations_give_equal_trajectories(extended: Path, work: Path, tmp_path: Path) -> None:
    """8 blocks at once, 8 times one, and two processes of two times two."""
    common = ["--max_steps", "4", "--lora_dropout", "0", "--logging_steps", "1", "--learning_rate", "5e-3"]

    def shape(name: str, batch: int, accumulated: int, processes: int = 1) -> Path:
        out = tmp_path / name
        more = [
            "--per_device_train_batch_size",
            str(batch),
            "--gradient_accumulation_steps",
            str(accumulated),
        ]
        if processes == 1:
            return pretrain(extended, work / "zh.jsonl", out, *common, *more)
        arguments = [*words(extended, work / "zh.jsonl", out), "--block_size", "32", "--lora_r", "4"]
        process = start([*arguments, *common, *more], processes)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        return out

    at_once, one_by_one, two = shape("a", 8, 1), shape("b", 1, 8), shape("c", 2, 2, 2)
    manifest = read_manifest(two)
    assert manifest is not None and manifest.metrics["tokens_per_step"] == 8 * 32
    for other in (one_by_one, two):
        assert losses(other) == pytest.approx(losses(at_once), rel=1e-4)
        for name, tensor in tensors(at_once).items():
            assert torch.allclose(tensor, tensors(other)[name], atol=2e-4), name


def test_the_adapters_configuration_is_in_order(extended: Path, work: Path, tmp_path: Path) -> None:
    """PEFT writes a set: in another process the same training would have another sha256."""
    pretrain(extended, work / "zh.jsonl", tmp_path / "out", "--max_steps", "3")
    found = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert len(found) == 7 and found == sorted(found)


def test_a_truncated_checkpoint_costs_only_its_steps(extended: Path, work: Path, tmp_path: Path) -> None:
    common = ["--max_steps", "12", "--save_steps", "4"]
    whole = pretrain(extended, work / "zh.jsonl", tmp_path / "whole", *common)
    out = tmp_path / "out"
    process = start(
        [
            *words(extended, work / "zh.jsonl", out),
            *("--block_size", "32", "--per_device_train_batch_size", "2"),
            *("--logging_steps", "2", "--lora_r", "4", *common),
        ]
    )
    wait_for(tmp_path / "out.run", "checkpoint-8", process)
    process.kill()
    process.communicate()
    for file in (tmp_path / "out.run").glob("checkpoint-*/adapter_model.safetensors"):
        if file.parent.name != "checkpoint-4":
            file.write_bytes(file.read_bytes()[:1000])
    pretrain(extended, work / "zh.jsonl", out, *common)
    assert all(torch.equal(tensor, tensors(out)[name]) for name, tensor in tensors(whole).items())


def test_sigterm_saves_and_stops(extended: Path, work: Path, tmp_path: Path) -> None:
    arguments = [*words(extended, work / "zh.jsonl", tmp_path / "out"), "--block_size", "32"]
    process = start([*arguments, "--max_steps", "20000", "--save_steps", "5", "--lora_r", "4"])
    wait_for(tmp_path / "out.run", "checkpoint-5", process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "The same command goes on" in err and "Traceback" not in err


def test_a_full_disk_is_one_sentence_and_loses_nothing(extended: Path, work: Path, tmp_path: Path) -> None:
    """A limit on the size of files, set after the first checkpoint, stands in for a disk that is full."""
    limited = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from chinese_llama.train import trainer\n"
        "seal = trainer.seal\n"
        "def sealed(directory):\n"
        "    seal(directory)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "trainer.seal = sealed\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = [*words(extended, work / "zh.jsonl", tmp_path / "out"), "--block_size", "32", "--lora_r", "4"]
    command = [sys.executable, "-c", limited, str(shipped("recipes") / "pt_lora.py"), *arguments]
    done = subprocess.run(
        [*command, "--max_steps", "6", "--save_steps", "2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "The disk is full: step 4 could not be saved" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in (tmp_path / "out.run").glob("*checkpoint-*")] == ["checkpoint-2"]
