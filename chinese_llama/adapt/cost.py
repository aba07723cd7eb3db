"""`adapt --dry-run`: what each stage would need of memory and disk, by arithmetic on shapes and settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chinese_llama.adapt import launch, plan
from chinese_llama.adapt.plan import Stage, State
from chinese_llama.artifacts import read_manifest
from chinese_llama.config import load_yaml
from chinese_llama.directories import whole_path
from chinese_llama.hub import local
from chinese_llama.model.shards import EMBED, HEAD, Weights
from chinese_llama.model.tensors import nbytes
from chinese_llama.workspace import Workspace

PROCESS = 300 << 20  # bytes: Python with torch and a few blocks of tensors
PIECES = {"20k": 20_000, "8k": 8_000}  # that come along, at most
SHARDING = {"FSDP": "fsdp", "DEEPSPEED": "zero3"}


@dataclass(frozen=True)
class Cost:
    """Bytes: of memory at the fullest moment (of a GPU, where training has one), and of disk, in the end and, for
    training, with its checkpoints before that."""

    memory: int
    disk: int
    passing: int = 0


@dataclass(frozen=True)
class Sizes:
    """The model that training sees: its config.json, rows that the base has, and bytes of all weights."""

    config: dict[str, Any]
    old_rows: int
    bytes: int

    @property
    def rows(self) -> int:
        return int(self.config["vocab_size"])


def sizes(space: Workspace) -> Sizes:
    """The base with the rows of the tokenizer as it is, or as the workspace asks for. Raises UserError."""
    base = Weights(local(space.base()))
    (old, hidden), dtype = base.meta(EMBED)
    made = read_manifest(space.path(space.settings.extend_vocab.output))
    section = space.settings.extend_vocab
    trains = any(stage.name == "train_vocab" for stage in plan.stages_of(space))
    known = PIECES["20k"] if not section.chinese_sp else PIECES.get(section.chinese_sp)
    most = section.size or old + (space.settings.train_vocab.vocab_size if trains or not known else known)
    rows = made.vocab_size if made and made.vocab_size else most
    grown = nbytes((max(0, rows - old), hidden), dtype) * sum(name in base for name in (EMBED, HEAD))
    total = sum(nbytes(*base.meta(name)) for name in base) + grown
    return Sizes({**base.config(), "vocab_size": rows}, old, total)


def costs(space: Workspace, stages: list[Stage]) -> dict[str, Cost]:
    """What each stage needs, whether it is to be made or not."""
    model = sizes(space)
    matrices = 2 * 4 * model.rows * int(model.config["hidden_size"])
    found = {
        "train_vocab": Cost(1 << 30, 1 << 20),
        "extend_vocab": Cost(1 << 30, 10 << 20),
        "extend_model": Cost(PROCESS + matrices, model.bytes),
        "merge": Cost(PROCESS, model.bytes),
        "eval": Cost(_loaded(model) + PROCESS + 12 * 4096 * model.rows, 2 << 20),
    }
    for name in ("pt_lora", "sft_lora", "control"):
        if any(stage.name == name for stage in stages):
            found[name] = _training(space, name, model)
    return {stage.name: found[stage.name] for stage in stages}


def _loaded(model: Sizes) -> int:
    """Bytes of the model in memory: in float32 on a CPU."""
    import torch

    return model.bytes if torch.cuda.is_available() else model.bytes * 2


def _training(space: Workspace, name: str, model: Sizes) -> Cost:
    from chinese_llama.model.load import resolve_dtype
    from chinese_llama.train.estimate import estimate, settings_of
    from chinese_llama.train.fields import Recipe, checked
    from chinese_llama.train.jobs import JOBS

    recipe = "sft_lora" if name == "sft_lora" else "pt_lora"
    words = ["--workspace", str(space.file)]
    words += ["--embeddings", "frozen"] if name == "control" else []
    found: Recipe[Any] = checked(recipe, JOBS[recipe][0], launch.recipe(recipe, space).DEFAULTS, words)
    if found.fields.dtype == "auto":
        found.fields.dtype = resolve_dtype("auto")
    config = {**model.config, "vocab_size": model.old_rows} if name == "control" else model.config
    settings = settings_of(found.fields, found.training, max(0, config["vocab_size"] - model.old_rows))
    settings = dataclasses.replace(settings, **_launched(space))
    told = estimate(config, settings)
    trained = told.parts["trainable parameters"]
    kept = int(found.training.get("save_total_limit") or 2) + 1
    return Cost(told.total, trained, kept * (trained + told.parts["optimizer"]))


def _launched(space: Workspace) -> dict[str, Any]:
    """Processes and sharding, as accelerate's configuration file says."""
    file = launch.launch_file(space)
    if file is None:
        return {}
    told = load_yaml(file)
    kind = SHARDING.get(str(told.get("distributed_type")), "none")
    if kind == "zero3" and (told.get("deepspeed_config") or {}).get("zero_stage") != 3:
        kind = "zero2"
    return {"processes": int(told.get("num_processes") or 1), "sharding": kind}


def table(space: Workspace, stages: list[Stage], told: dict[str, State]) -> str:
    """The plan: each stage, what becomes of it, and what it needs."""
    needed = costs(space, stages)
    width = max(len(stage.name) for stage in stages)
    lines = [f"{'stage':<{width}}  {'memory':>9}  {'disk':>9}  "]
    for stage in stages:
        cost = needed[stage.name]
        where = (
            stage.output.relative_to(space.file.parent)
            if stage.output.is_relative_to(space.file.parent)
            else stage.output
        )
        lines.append(
            f"{stage.name:<{width}}  {_size(cost.memory):>9}  {_size(cost.disk):>9}  {where}: {_becomes(told[stage.name])}"
        )
    todo = [needed[stage.name] for stage in stages if told[stage.name].kind != plan.STANDS]
    disk = sum(cost.disk for cost in todo) + max((cost.passing for cost in todo), default=0)
    lines += [
        "",
        f"To be written: about {_size(disk)}, checkpoints included; free on the disk: {_size(_free(stages[-1].output))}.",
    ]
    memory = max((cost.memory for cost in todo), default=0)
    return "\n".join([*lines, f"Memory at the fullest moment: about {_size(memory)} of {_device()}."])


def _becomes(state: State) -> str:
    words = {plan.STANDS: "stands", plan.MISSING: "to be made", plan.UNFINISHED: f"goes on from {state.why}"}
    return words.get(state.kind, f"to be made again ({state.why})")


def _device() -> str:
    import psutil
    import torch

    if torch.cuda.is_available():
        return f"{_size(torch.cuda.get_device_properties(0).total_memory)} on each GPU"
    return f"{_size(psutil.virtual_memory().total)} in this machine"


def _free(output: Path) -> int:
    import shutil

    whole = whole_path(output)
    return shutil.disk_usage(next(parent for parent in [whole, *whole.parents] if parent.is_dir())).free


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
