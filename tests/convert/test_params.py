"""params.json and config.json say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from chinese_llama.convert.layout import Sizes
from chinese_llama.convert.params import (
    context_of,
    ffn_rule,
    ffn_width,
    hf_config,
    hf_sizes,
    meta_params,
    read_params,
    resized,
    rope_theta,
    still_says,
)
from chinese_llama.errors import BadFile, DoesNotFit
from tests.convert.checkpoints import PARAMS

# as Meta published them
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "7B": (11008, {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05}),
    "13B": (13824, {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05}),
    "33B": (17920, {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-06}),
    "65B": (22016, {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05}),
    "70B": (
        28672,
        {
            "dim": 8192,
            "multiple_of": 4096,
            "ffn_dim_multiplier": 1.3,
            "n_heads": 64,
            "n_kv_heads": 8,
            "n_layers": 80,
            "norm_eps": 1e-05,
        },
    ),
}


def sizes_of(params: dict[str, Any], ffn: int, vocab: int = 32000) -> Sizes:
    kv = params.get("n_kv_heads", params["n_heads"])
    return Sizes(params["dim"], params["n_layers"], params["n_heads"], kv, ffn, vocab)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_get_their_own_params_back(name: str) -> None:
    ffn, params = PUBLISHED[name]
    sizes = sizes_of(params, ffn)
    config = hf_config(params, sizes, torch.float16, 2048)
    assert hf_sizes(config, 32000) == sizes
    assert meta_params(config, sizes) == {**params, "vocab_size": 32000}


@given(dim=st.integers(1, 5000).map(lambda half: 2 * half), ffn=st.integers(1, 50000))
def test_every_width_has_a_rule(dim: int, ffn: int) -> None:
    rule = ffn_rule(dim, ffn)
    assert ffn_width(dim, **rule) == ffn


def test_transformers_reads_the_config() -> None:
    params = {**PARAMS, "n_kv_heads": 2, "rope_theta": 1000000.0}
    config = LlamaConfig.from_dict(hf_config(params, sizes_of(params, 96), torch.bfloat16, 512))
    assert config.rope_parameters["rope_theta"] == 1000000.0
    assert (config.dtype, config.max_position_embeddings) == (torch.bfloat16, 512)
    assert (config.num_key_value_heads, config.intermediate_size, config.head_dim) == (2, 96, 8)
    assert (config.bos_token_id, config.eos_token_id, config.rms_norm_eps) == (1, 2, 1e-05)
    assert not config.tie_word_embeddings


def test_context_is_that_of_the_published_models() -> None:
    assert context_of(PARAMS, torch.float16) == 2048
    assert context_of(PARAMS, torch.bfloat16) == 4096
    assert context_of({**PARAMS, "rope_theta": 1e6}, torch.bfloat16) == 16384


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": None}, "dim must be a whole number"),
        ({"n_layers": 0}, "n_layers must be a whole number above 0, not 0"),
        ({"n_heads": True}, "n_heads must be"),
        ({"n_kv_heads": "2"}, "n_kv_heads must be"),
        ({"norm_eps": None}, "norm_eps must be a number"),
        ({"norm_eps": -1e-5}, "norm_eps must be a number above 0"),
        ({"rope_theta": "1e4"}, "rope_theta must be"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"vocab_size": 3.5}, "vocab_size must be"),
        ({"n_heads": 5}, "dim 32 does not divide into 5 heads"),
        ({"n_heads": 32}, "of an even size"),
        ({"n_kv_heads": 3}, "4 heads do not divide into groups of 3"),
        ({"use_scaled_rope": True}, "use_scaled_rope; this is a later model"),
        ({"sliding_window": 4096}, "sliding_window"),
    ],
)
def test_bad_params_are_told(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "params.json"
    file.write_text(json.dumps({**PARAMS, **change}))
    with pytest.raises(BadFile, match=said) as caught:
        read_params(file)
    assert str(caught.value).startswith(str(file))


def test_params_that_are_no_json_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no such file; Meta's checkpoints"):
        read_params(tmp_path / "params.json")
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(BadFile, match="not readable JSON"):
        read_params(tmp_path / "params.json")


def test_absent_is_what_metas_code_takes(tmp_path: Path) -> None:
    content = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-05, "use_scaled_rope": False}
    (tmp_path / "params.json").write_text(json.dumps(content))
    assert read_params(tmp_path / "params.json") == content


CONFIG = hf_config(PARAMS, sizes_of(PARAMS, 96, 421), torch.float16, 2048)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen2"}, "models of type llama, not qwen2"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_attention_heads": None}, "num_attention_heads must be"),
        ({"hidden_size": "32"}, "hidden_size must be"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"head_dim": 16}, "heads of 16 in a hidden size of 32; in Meta's format 4 heads have 8 each"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope scaling \(linear\)"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"rope scaling \(llama3\)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope scaling \(yarn\)"),
    ],
)
def test_what_metas_format_has_no_place_for(change: dict[str, Any], said: str) -> None:
    with pytest.raises(DoesNotFit, match=said):
        hf_sizes({**CONFIG, **change}, 421)


def test_theta_as_both_versions_of_transformers_write_it() -> None:
    assert rope_theta({}) == 10000.0
    assert rope_theta({"rope_theta": 5e5, "rope_scaling": None}) == 5e5
    assert rope_theta({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}) == 1e6


def test_params_stay_until_the_model_is_another() -> None:
    sizes = sizes_of(PARAMS, 96, 600)
    assert still_says(PARAMS, CONFIG, sizes)
    assert not still_says(PARAMS, {**CONFIG, "rope_theta": 5e5}, sizes)
    assert not still_says(PARAMS, {**CONFIG, "rms_norm_eps": 1e-6}, sizes)
    assert not still_says({**PARAMS, "n_kv_heads": 2}, CONFIG, sizes)
    assert resized(PARAMS, 600)["vocab_size"] == -1
    assert resized({**PARAMS, "vocab_size": 421}, 600)["vocab_size"] == 600
    assert resized({"dim": 32}, 600) == {"dim": 32}


def test_another_theta_is_said() -> None:
    params = meta_params({**CONFIG, "rope_theta": 1e6}, sizes_of({**PARAMS, "n_kv_heads": 2}, 96, 421))
    assert params == {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "multiple_of": 32,
        "norm_eps": 1e-05,
        "vocab_size": 421,
        "rope_theta": 1e6,
    }
