"""What adapter_config.json says, against what PEFT writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chinese_llama.doctor.adapter import check_adapter
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.things import recognise
from tests.doctor.broken import change, checks, set_json, set_tensors
from tests.model.test_adapters import peft_adapter

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MATRICES = ["embed_tokens", "lm_head"]


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    return peft_adapter(base, tmp_path / "lora")


def found(place: Path) -> dict[str, str]:
    return checks(check_adapter(recognise(place)))


def one(place: Path, check: str) -> Finding:
    return next(finding for finding in check_adapter(recognise(place)) if finding.check == check)


def test_all_that_peft_saves_of_grown_rows(base: Path, tmp_path: Path) -> None:
    """Where rows were grown, PEFT saves a matrix three times: as trained, as trained, as it was before."""
    place = peft_adapter(base, tmp_path / "full", rows=430, modules_to_save=MATRICES)
    held = load_file(place / FILE)
    for name in ("base_model.model.lm_head", "base_model.model.model.embed_tokens"):
        trained = held[f"{name}.weight"]
        set_tensors(place / FILE, {f"{name}.modules_to_save.weight": trained})
        set_tensors(place / FILE, {f"{name}.original_module.weight": trained + 1})
    assert found(place) == {}


def test_lora_of_an_embedding_begins_with_a_zero_a(base: Path, tmp_path: Path) -> None:
    place = peft_adapter(base, tmp_path / "x", target_modules=["q_proj", "embed_tokens"])
    assert found(place) == {}
    (key,) = (key for key in load_file(place / FILE) if "lora_embedding_A" in key)
    change(place / FILE, key, torch.zeros_like)
    assert found(place) == {"zero-pairs": "warning"}


@pytest.mark.parametrize("alpha", [8000, 0.01])
def test_an_alpha_that_nobody_trains_with(lora: Path, alpha: float) -> None:
    set_json(lora / CONFIG, lora_alpha=alpha)
    assert found(lora) == {"alpha-unusual": "warning"}
    set_json(lora / CONFIG, lora_alpha=128, use_rslora=None)
    assert found(lora) == {}


def test_ranks_that_only_rank_pattern_says(lora: Path) -> None:
    set_json(lora / CONFIG, rank_pattern={"layers.1.self_attn.q_proj": 2})
    finding = one(lora, "rank-differs")
    assert "rank_pattern" in finding.remedy and '"r"' not in finding.remedy


def test_patterns_of_a_wrong_type(lora: Path) -> None:
    set_json(lora / CONFIG, rank_pattern=[1], alpha_pattern="x")
    assert found(lora) == {"adapter-config-wrong": "error"}
    assert one(lora, "adapter-config-wrong").evidence == ["rank_pattern: [1]"]


def test_49954_pieces_by_an_added_token(base: Path, tmp_path: Path) -> None:
    """As old Alpaca tokenizers came: tokenizer.model, and [PAD] in added_tokens.json."""
    less = peft_adapter(base, tmp_path / "less", rows=420, modules_to_save=MATRICES)
    more = peft_adapter(base, tmp_path / "more", rows=421, modules_to_save=MATRICES)
    for place in (less, more):
        shutil.copy(base / "tokenizer.model", place)
        (place / "added_tokens.json").write_text(json.dumps({"[PAD]": 420}))
    assert found(more) == {}
    assert found(less) == {"rows-do-not-fit": "error"}
    assert "added_tokens.json adds: [PAD]" in one(less, "rows-do-not-fit").evidence
