"""What the doctor finds in a model's config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.doctor.broken import change, copied, put, set_json, set_tensors
from tests.doctor.test_model import FILE, found, one

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 720\n"
SIZES = (("q", 32), ("k", 16), ("v", 16), ("o", 32))
INV = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return copied(base, tmp_path / "model")


def test_no_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama",}')
    assert found(model) == {"invalid-json": "error"}
    (model / "config.json").write_text(POINTER)
    assert found(model) == {"git-lfs-pointer": "error"}
    (model / "config.json").unlink()
    assert found(model) == {"config-missing": "error"}


FIELDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "no type": ({"model_type": None}, {"config-field-missing": "error"}),
    "no width": ({"intermediate_size": None}, {"config-field-missing": "error"}),
    "no epsilon": ({"rms_norm_eps": None}, {"config-field-missing": "warning"}),
    "no length": ({"max_position_embeddings": None}, {"config-field-missing": "warning"}),
    "layers": ({"num_hidden_layers": 1}, {"layers-differ": "error"}),
    "more layers": ({"num_hidden_layers": 3}, {"layers-differ": "error"}),
    "groups": ({"num_key_value_heads": 4}, {"heads-differ": "error"}),
    "groups lost": ({"num_key_value_heads": None}, {"heads-differ": "error"}),
    "head size": ({"head_dim": 16}, {"heads-differ": "error"}),
    "width": ({"intermediate_size": 80}, {"shapes-differ": "error"}),
    "bos": ({"bos_token_id": 420}, {"token-id-beyond-rows": "error"}),
    "several eos": ({"eos_token_id": [2, 999]}, {"token-id-beyond-rows": "error"}),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, {"quantised": "note"}),
    "dtype": ({"dtype": "bfloat16"}, {"dtypes-differ": "note"}),
    "dtype that is none": ({"dtype": "float17"}, {"config-field-wrong": "error", "dtypes-differ": "note"}),
    "whole numbers": ({"dtype": "int8"}, {"dtype-of-whole-numbers": "error"}),
    "no factor": ({"rope_scaling": {"type": "linear"}}, {"config-field-wrong": "error"}),
    "foreign": ({"model_type": "gpt2"}, {}),
    "unheard of": ({"model_type": "banana"}, {"config-field-wrong": "error"}),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field(model: Path, case: str) -> None:
    fields, wanted = FIELDS[case]
    set_json(model / "config.json", **fields)
    assert found(model) == wanted


def test_a_tensor_that_is_missing(model: Path) -> None:
    set_tensors(model / FILE, {"model.norm.weight": None})
    assert found(model) == {"tensors-missing": "error"}


def test_a_rotary_base_that_was_lost(model: Path) -> None:
    """Llama 3's 128,256 rows go with 500,000."""
    rows = 128_256
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change(model / FILE, name, lambda tensor: torch.randn(rows, 32).to(tensor.dtype))
    for file in model.glob("tokenizer*"):
        file.unlink()
    set_json(model / "config.json", vocab_size=rows, rope_parameters=None)
    assert found(model) == {"rope-theta": "warning"}
    set_json(model / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    assert found(model) == {}
    set_json(model / "config.json", rope_parameters=None, rope_theta=500_000.0)
    assert found(model) == {}


def test_a_rotary_scaling_that_nobody_knows(model: Path) -> None:
    for fields in (
        {"rope_parameters": {"rope_type": "cubic"}},
        {"rope_scaling": {"type": "cubic", "factor": 2}},
    ):
        set_json(model / "config.json", **{"rope_parameters": None, **fields})
        assert found(model)["rope-scaling-unknown"] == "error"


def test_tensors_without_a_place(model: Path) -> None:
    """Biases that config.json lost (attention_bias) change every answer; what is left of an adapter does not."""
    name = "model.layers.1.self_attn.q_proj.lora_A.weight"
    set_tensors(model / FILE, {name: torch.ones(4, 32)})
    assert found(model) == {"tensors-not-used": "warning"}
    biases = {
        f"model.layers.{i}.self_attn.{part}_proj.bias": torch.ones(n) for i in (0, 1) for part, n in SIZES
    }
    set_tensors(model / FILE, {name: None, **biases})
    assert found(model) == {"tensors-not-used": "error"}
    set_json(model / "config.json", attention_bias=True)
    assert found(model) == {}
    set_tensors(model / FILE, dict.fromkeys(biases))
    assert found(model) == {"tensors-missing": "error"}


def test_whole_numbers_without_their_scales(model: Path) -> None:
    change(model / FILE, "model.layers.0.mlp.up_proj.weight", lambda tensor: (tensor * 100).to(torch.int8))
    assert found(model) == {"dtype-of-whole-numbers": "error"}


def test_masks_are_no_weights(model: Path) -> None:
    """Older exports hold those of GPT-2's attention."""
    set_json(model / "config.json", model_type="gpt2")
    set_tensors(model / FILE, {"h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)})
    assert found(model) == {}


def test_an_output_that_was_tied(model: Path) -> None:
    change(
        model / FILE, "lm_head.weight", lambda _: load_file(model / FILE)["model.embed_tokens.weight"].clone()
    )
    assert found(model) == {"untied-with-same-head": "note"}
    set_json(model / "config.json", tie_word_embeddings=True)
    assert found(model) == {}


def test_rotary_buffers(model: Path) -> None:
    stored = 1.0 / 10_000.0 ** (torch.arange(0, 8, 2).float() / 8)
    set_tensors(model / FILE, {INV: stored.half()})
    assert found(model) == {"rotary-buffers": "note"}
    set_tensors(model / FILE, {INV: 1.0 / 1e6 ** (torch.arange(0, 8, 2).float() / 8)})
    assert found(model) == {"rotary-buffers-differ": "warning"}
    assert "1,000,000" in one(model, "rotary-buffers-differ").remedy


def test_a_broken_generation_config(model: Path) -> None:
    (model / "generation_config.json").write_text("<html>")
    assert found(model) == {"file-is-text": "error"}
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 420]}')
    assert found(model) == {"token-id-beyond-rows": "error"}
    (model / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    assert found(model) == {"token-id-beyond-rows": "error"}


def test_fields_of_any_type_do_no_harm(model: Path) -> None:
    values: list[Any] = ["x", -1, 1.5, [1], {"a": 1}, True, 10**30]
    for value in values:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "rope_scaling",
            "dtype",
            "eos_token_id",
            "head_dim",
            "model_type",
            "tie_word_embeddings",
        ):
            before = (model / "config.json").read_text()
            set_json(model / "config.json", **{name: value})
            found(model)
            (model / "config.json").write_text(before)


def test_half_precision_is_measured(model: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        set_tensors(
            model / FILE, {name: tensor.to(dtype) for name, tensor in load_file(model / FILE).items()}
        )
        set_json(model / "config.json", dtype=str(dtype).removeprefix("torch."))
        assert found(model) == {}
        change(model / FILE, "lm_head.weight", put(torch.nan, 5, 5))
        assert found(model) == {"not-finite": "error"}
        change(model / FILE, "lm_head.weight", put(0.1, 5, 5))
