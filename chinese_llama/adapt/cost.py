"""`adapt --dry-run`: what each stage would need of memory and disk, by arithmetic on shapes and settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chinese_llama.adapt import control, launch, plan
from chinese_llama.adapt.plan import Stage, State
from chinese_llama.artifacts import read_manifest
from chinese_llama.config import load_yaml
from chinese_llama.data.mixture import sources
from chinese_llama.directories import whole_path
from chinese_llama.hub import local
from chinese_llama.model.shards import EMBED, HEAD, Weights
from chinese_llama.model.tensors import nbytes
from chinese_llama.workspace import Workspace

PROCESS = 400 << 20  # bytes: Python with torch, transformers and a few blocks of tensors
TRAINER = 600 << 20  # bytes: the same in accelerate's launcher and a recipe, which run beside this process
PACKED, PACKED_BASE = (
    1.0,
    2.5,
)  # bytes of packed data for a byte of text; the base has a token for a byte or two
UNPACKED = {".gz": 3.5, ".zst": 3.5, ".parquet": 2.0}  # bytes of text for a byte of such a file
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
    most = section.size or old + (space.settings.train_vocab.vocab_size if trains else _pieces(space))
    rows = made.vocab_size if made and made.vocab_size else most
    grown = nbytes((max(0, rows - old), hidden), dtype) * sum(name in base for name in (EMBED, HEAD))
    total = sum(nbytes(*base.meta(name)) for name in base) + grown
    return Sizes({**base.config(), "vocab_size": rows}, old, total)


def _pieces(space: Workspace) -> int:
    """Pieces of the Chinese model that the tokenizer is extended with, at most."""
    named = space.settings.extend_vocab.chinese_sp or "20k"
    if named in PIECES:
        return PIECES[named]
    from chinese_llama.vocab.merge import chinese_model
    from chinese_llama.vocab.proto import read_chinese

    return len(read_chinese(chinese_model(space.path(named))).pieces)


def costs(space: Workspace, stages: list[Stage]) -> dict[str, Cost]:
    """What each stage needs, whether it is to be made or not."""
    model = sizes(space)
    matrices = 2 * 4 * model.rows * int(model.config["hidden_size"])
    found = {
        "train_vocab": Cost(1 << 30, 1 << 20),
        "extend_vocab": Cost(PROCESS + (200 << 20), 10 << 20),
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
    import torch

    from chinese_llama.model.load import resolve_dtype
    from chinese_llama.train.estimate import estimate, settings_of
    from chinese_llama.train.fields import Recipe, checked
    from chinese_llama.train.jobs import JOBS

    recipe = "sft_lora" if name == "sft_lora" else "pt_lora"
    words = ["--workspace", str(space.file), *(control.words(space) if name == "control" else [])]
    found: Recipe[Any] = checked(recipe, JOBS[recipe][0], launch.recipe(recipe, space).DEFAULTS, words)
    if found.fields.dtype == "auto":
        found.fields.dtype = resolve_dtype("auto")
    config = {**model.config, "vocab_size": model.old_rows} if name == "control" else model.config
    settings = settings_of(found.fields, found.training, max(0, config["vocab_size"] - model.old_rows))
    settings = dataclasses.replace(settings, **_launched(space))
    told = estimate(config, settings)
    gpu = torch.cuda.is_available() and not found.training.get("use_cpu")
    memory = told.total if gpu else PROCESS + settings.processes * (TRAINER + told.total)
    whole = estimate(config, dataclasses.replace(settings, processes=1, sharding="none")).parts
    trained = whole["trainable parameters"]
    kept = int(found.training.get("save_total_limit") or 2) + 1
    packed = _text_bytes(found.fields.data) * (PACKED_BASE if name == "control" else PACKED)
    return Cost(memory, trained + round(packed), kept * (trained + whole["optimizer"]))


def _text_bytes(data: Any) -> float:
    """About how many bytes of text a recipe's data is."""
    files = [file for source in sources(data) for file in source.list_files()]
    return sum(file.stat().st_size * UNPACKED.get(file.suffix, 1.0) for file in files)


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
    lines = [f"{'stage':<{width}}  {'memory':>9}  {'disk':>9}"]
    for stage in stages:
        cost, becomes = needed[stage.name], _becomes(told[stage.name])
        figures = f"{_size(cost.memory):>9}  {_size(cost.disk):>9}"
        lines.append(f"{stage.name:<{width}}  {figures}  {space.shown(stage.output)}: {becomes}")
    todo = [needed[stage.name] for stage in stages if told[stage.name].kind != plan.STANDS]
    if not todo:
        return "\n".join([*lines, "", "Nothing is to be made."])
    disk = sum(cost.disk for cost in todo) + max(cost.passing for cost in todo)
    free = _free(stages[-1].output)
    short = "" if disk <= free else " That is not enough."
    lines += [
        "",
        f"To be written: about {_size(disk)}, checkpoints included; free on the disk: {_size(free)}.{short}",
    ]
    memory = max(cost.memory for cost in todo)
    return "\n".join([*lines, f"Memory at the fullest moment: about {_size(memory)} of {_device()}."])


def _becomes(state: State) -> str:
    words = {
        plan.STANDS: "stands",
        plan.MISSING: "to be made",
        plan.UNFINISHED: f"goes on from {state.why}",
        plan.BLOCKED: f"waits: {state.why}",
        plan.OPEN: f"stands or is made again ({state.why})",
    }
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
