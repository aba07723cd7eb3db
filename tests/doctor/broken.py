"""Copies of good artifacts with something broken in them, and what is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from chinese_llama.directories import MANIFEST
from chinese_llama.doctor.finding import Finding

Q = "model.layers.0.self_attn.q_proj.weight"


def copied(source: Path, place: Path) -> Path:
    """A copy without the manifest, which would tell that it was changed."""
    return Path(shutil.copytree(source, place, ignore=shutil.ignore_patterns(MANIFEST)))


def set_json(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; those that are None are removed."""
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def set_tensors(file: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """Set tensors of a .safetensors file; those that are None are removed."""
    held: dict[str, Any] = {**load_file(file), **tensors}
    save_file(
        {key: tensor.contiguous() for key, tensor in held.items() if tensor is not None},
        file,
        {"format": "pt"},
    )


def change(file: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """One tensor of a file, made another."""
    set_tensors(file, {name: how(load_file(file)[name].clone())})


def put(value: float, *where: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What sets numbers of a tensor."""

    def how(tensor: torch.Tensor) -> torch.Tensor:
        tensor[where] = value
        return tensor

    return how


def sharded(source: Path, place: Path) -> Path:
    """A model in two shards with an index."""
    copied(source, place)
    held = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(held)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: held[name] for name in part}, place / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return place


def checks(findings: Iterable[Finding]) -> dict[str, str]:
    """Severity by check; every finding shows what it saw and says what to do, or is a note; none is a traceback."""
    found = list(findings)
    for finding in found:
        assert finding.what.endswith((".", ")")) or ":" in finding.what, finding
        assert (finding.remedy and finding.evidence) or finding.severity == "note", finding
        assert finding.check != "not-examined", finding
    return {finding.check: finding.severity for finding in found}


def grave(findings: Iterable[Finding]) -> list[Finding]:
    """What is no note."""
    return [finding for finding in findings if finding.severity != "note"]
