"""Adapters of given tensors, and numbers to fill them with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from chinese_llama.merging.plan import Adapter, load


def drawn(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_adapter(
    place: Path, tensors: dict[str, torch.Tensor], weight: float = 1.0, **config: Any
) -> Adapter:
    """An adapter of these tensors (named without PEFT's prefix), alpha 2 r; it counts `weight`."""
    place.mkdir(parents=True, exist_ok=True)
    ranks = {len(tensor) for key, tensor in tensors.items() if "lora_A" in key}
    rank = ranks.pop() if ranks else 1
    assert not ranks
    dora = any("magnitude" in key for key in tensors)
    text = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_dora": dora, **config}
    (place / "adapter_config.json").write_text(json.dumps(text))
    held = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(held, place / "adapter_model.safetensors")
    adapter = load(place.name, place)
    adapter.weight = weight
    return adapter


def lora(
    name: str, shape: Sequence[int], rank: int = 2, seed: int = 1, size: float = 0.1, dora: bool = False
) -> dict[str, torch.Tensor]:
    """A pair for the weight `name`, as PEFT names it."""
    stem = name.removesuffix(".weight")
    found = {
        f"{stem}.lora_A.weight": drawn(rank, shape[1], seed=seed),
        f"{stem}.lora_B.weight": drawn(shape[0], rank, seed=seed + 1000, size=size),
    }
    if dora:
        found[f"{stem}.lora_magnitude_vector"] = drawn(shape[0], seed=seed + 2000).abs() + 0.5
    return found


def delta(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What a plain pair of `write_adapter` adds, float64."""
    stem = name.removesuffix(".weight")
    return 2 * tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
