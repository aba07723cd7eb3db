"""A pico workspace for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from chinese_llama.workspace import FILE, Workspace

QUICK = {"lora_r": 4, "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}


def settings(work: Path, base: Path, chinese_sp: Path) -> dict[str, Any]:
    """What the file of a pico workspace says; texts, base and Chinese model are those of the fixtures."""
    return {
        "base": str(base),
        "extend_vocab": {"chinese_sp": str(chinese_sp)},
        "pt_lora": {**QUICK, "data": [str(work / "zh.jsonl"), str(work / "en.jsonl")], "block_size": 32},
        "sft_lora": {**QUICK, "data": str(work / "ins.jsonl"), "max_seq_length": 128, "template": "belle"},
        "eval": {
            "text": {"zh": str(work / "zh.jsonl"), "en": str(work / "en.jsonl")},
            "prompts": str(work / "ins.jsonl"),
            "samples": 2,
            "max_new_tokens": 4,
        },
    }


def write(folder: Path, values: dict[str, Any], name: str = FILE) -> Workspace:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return Workspace(folder / name)
