"""What all contenders of `train-step` share: their settings, their data, and the watch on their steps.

A contender runs in a process of its own, some with another interpreter, so that nothing here may import
chinese_llama. Each trains with a Trainer of transformers or of a class above it: a callback that every such
Trainer is given takes the figures, and ends the process when it has them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
MATRICES = ["embed_tokens", "lm_head"]
VERSIONS = ("torch", "transformers", "peft", "trl", "llamafactory", "axolotl", "unsloth")


@dataclass(frozen=True)
class Settings:
    """One run of one contender.

    `model`, `tokenizer`: directories; `blocks`: a Parquet file with a row for every `block` tokens (input_ids,
    labels, position_ids, int64; attention_mask: 1 for the first document of the row, 2 for the second ...;
    seq_lengths: the tokens of each); `corpus`, `prepared`: what the blocks were packed from, and where a recipe
    finds them packed. `rows` of the vocabulary, the new ones from `first_new` on. `across`: attention runs
    through a block, as in the reference project, else within a document. `upcast`: what trains is float32.
    `result`: the file that the figures go to.
    """

    model: str
    tokenizer: str
    corpus: str
    prepared: str
    blocks: str
    work: str
    result: str
    dtype: str
    block: int
    batch: int
    warmup: int
    measured: int
    rows: int
    first_new: int
    rank: int
    alpha: int
    dropout: float
    embeddings: str = "new-rows"
    across: bool = False
    upcast: bool = True
    quantization: str = "none"
    checkpointing: bool = False
    optim: str = "adamw_torch_fused"
    profile: bool = False

    @property
    def steps(self) -> int:
        """Steps before the measured ones, and these."""
        return self.warmup + self.measured

    @property
    def lora(self) -> dict[str, Any]:
        """The fields of a peft.LoraConfig that all have in common."""
        return {
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": PROJECTIONS,
        }

    @property
    def training(self) -> dict[str, Any]:
        """The fields of transformers.TrainingArguments that all have in common."""
        import torch

        return {
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": 1,
            "max_steps": self.steps,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "optim": self.optim,
            "bf16": self.dtype == "bfloat16",
            "gradient_checkpointing": self.checkpointing,
            "logging_steps": self.steps,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "seed": 42,
        }


def begin() -> Settings:
    """The settings in the file that the command line names; from now on every Trainer is watched."""
    from transformers import TrainerCallback, trainer

    settings = Settings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    watch = type("Watched", (Watch, TrainerCallback), {})
    trainer.DEFAULT_CALLBACKS.append(watch(settings))
    return settings


def blocks(settings: Settings, *columns: str) -> Any:
    """The data as a datasets.Dataset of these columns, int64 arrays, in the order in which a recipe has it."""
    import datasets

    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_parquet(settings.blocks, cache_dir=str(Path(settings.work) / "cache"))
    return whole.select_columns(list(columns)).with_format("numpy")


class Watch:
    """Takes the loss of the first step and the mean of the others, seconds of each measured step, memory.

    The device is waited for before the first measured step and after the last one only; in between, events
    on its stream tell the time. A step reaches from the end of the one before it to its own end: fetching
    the batch is part of it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.marks: list[Any] = []
        self.losses: list[float] = []
        self.profiler: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.logging_first_step = True
        _wait()
        self.loaded = _memory()
        if _cuda():  # what loading took on the way is not a step's
            import torch

            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.settings.warmup:
            _wait()
            if self.settings.profile:
                self.profiler = _profiler().__enter__()
        if state.global_step >= self.settings.warmup:
            self.marks.append(_mark())
        if state.global_step == self.settings.steps:
            _wait()
            if self.profiler:
                self.profiler.__exit__(None, None, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the figures down after the last step; what would follow (saving) is not measured."""
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))
        if state.global_step < self.settings.steps or "loss" not in (logs or {}):
            return
        result = {
            "first_loss": self.losses[0],
            "later_loss": self.losses[-1],
            "seconds": [_between(one, two) for one, two in zip(self.marks, self.marks[1:], strict=False)],
            "loaded": self.loaded,
            **_peak(),
            "versions": {name: version for name in VERSIONS if (version := _version(name))},
            "profile": _costs(self.profiler) if self.profiler else "",
        }
        Path(self.settings.result).write_text(json.dumps(result), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)


def median_step(result: dict[str, Any]) -> float:
    """Seconds of the middle one of the measured steps."""
    return statistics.median(result["seconds"])


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _wait() -> None:
    import torch

    if _cuda():
        torch.cuda.synchronize()


def _mark() -> Any:
    import torch

    if not _cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(one: Any, two: Any) -> float:
    return float(one.elapsed_time(two)) / 1000 if _cuda() else two - one


def _memory() -> int:
    """Bytes of tensors on the GPU; without one, resident bytes of the process."""
    import torch

    return int(torch.cuda.memory_allocated()) if _cuda() else _resident("VmRSS")


def _peak() -> dict[str, int]:
    import torch

    if _cuda():
        return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {"peak": _resident("VmHWM")}


def _resident(field: str) -> int:
    """Bytes, of a field of /proc/self/status: unlike what getrusage tells, its peak begins with this program."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _profiler() -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _cuda() else [])]
    return profile(activities=activities, profile_memory=not _cuda())


def _costs(profiler: Any) -> str:
    key = "self_cuda_time_total" if _cuda() else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
