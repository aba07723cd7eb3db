"""How the tests of this folder run recipes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from chinese_llama.adapt.launch import recipe
from chinese_llama.resources import shipped
from chinese_llama.train.log import read_log

QUICK = ["--block_size", "32", "--per_device_train_batch_size", "2", "--logging_steps", "2", "--lora_r", "4"]


def pretrain(base: Path, data: Path, output: Path, *more: str) -> Path:
    """Run pt_lora in this process."""
    recipe("pt_lora").main([*words(base, data, output), *QUICK, *more])
    return output


def words(base: Path, data: Path | str, output: Path) -> list[str]:
    return ["--model_name_or_path", str(base), "--data", str(data), "--output_dir", str(output)]


def start(arguments: list[str], processes: int = 1, name: str = "pt_lora") -> subprocess.Popen[str]:
    """Start a recipe in processes of its own."""
    command = [sys.executable]
    if processes > 1:
        config = shipped("recipes") / "launch" / "cpu_2.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--num_processes", str(processes), "--main_process_port", str(29_700 + os.getpid() % 200)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(shipped("recipes") / f"{name}.py"), *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for(directory: Path, name: str, process: subprocess.Popen[Any], seconds: float = 120) -> None:
    """Wait until a checkpoint is whole: its list of files is written last."""
    end = time.monotonic() + seconds
    while not (directory / name / "files.json").is_file():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.02)


def losses(adapter: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(adapter / "log.jsonl") if "loss" in entry]


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")
