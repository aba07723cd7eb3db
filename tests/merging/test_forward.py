"""The logits of a model that is never loaded: those of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from chinese_llama.merging.forward import knows, logits
from chinese_llama.model.shards import EMBED

IDS = [1, 5, 60, 59, 2, 33, 33, 0, 17, 41]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "one key for each query": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "grouped queries": (LlamaConfig, LlamaForCausalLM, {}),
    "one key for all": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "wide heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 12}),
    "attention bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mlp bias": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True}),
    "tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "coarse norm": (LlamaConfig, LlamaForCausalLM, {"rms_norm_eps": 0.1}),
    "other theta": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}, "head_dim": 16},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4096}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "tied qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
}


class Held:
    """The weights of models in memory, of one or of several at once."""

    def __init__(self, *states: dict[str, torch.Tensor]) -> None:
        self.states = states

    def embed(self, ids: list[int]) -> torch.Tensor:
        self.count = len(ids)
        return torch.cat([state[EMBED][ids] for state in self.states])

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        bias = name.removesuffix("weight") + "bias"
        parts = zip(x.chunk(len(self.states)), self.states, strict=True)
        return torch.cat([part @ state[name].T + state.get(bias, torch.zeros(1)) for part, state in parts])

    def vector(self, name: str) -> torch.Tensor:
        return torch.stack([state[name] for state in self.states]).repeat_interleave(self.count, 0)


def model(kind: str, seed: int = 0) -> Any:
    """A pico model of a kind, all of its numbers drawn."""
    config, made, more = MODELS[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = made(config(**{**sizes, **heads, **more})).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3 + ("norm" in name))
    return found


def old(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as transformers 4 wrote it."""
    found = {key: value for key, value in config.items() if key != "rope_parameters"}
    rope = dict(config["rope_parameters"])
    found["rope_theta"] = rope.pop("rope_theta")
    scaled = rope["rope_type"] != "default"
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")  # before 4.43
    return found | {"rope_scaling": rope if scaled else None, "head_dim": config.get("head_dim")}


def of(found: Any, config: dict[str, Any]) -> torch.Tensor:
    seen: list[int] = []
    result = logits(Held(found.state_dict()), config, IDS, lambda: seen.append(1))
    assert len(seen) == config["num_hidden_layers"]
    return result


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_are_those_of_transformers(kind: str) -> None:
    found = model(kind)
    with torch.no_grad():
        wanted = found(torch.tensor([IDS])).logits[0]
    config = json.loads(found.config.to_json_string(use_diff=False))
    assert knows(config) and knows(old(config))
    for written in (config, old(config)):
        torch.testing.assert_close(of(found, written), wanted, rtol=1e-4, atol=1e-4)


def test_what_the_configuration_says_counts() -> None:
    """Each kind of model above would be told from the plain one."""
    for kind in ("coarse norm", "other theta", "linear", "llama3"):
        found = model(kind)
        config = json.loads(found.config.to_json_string(use_diff=False))
        plain = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
        off = (of(found, config) - of(found, plain | {"rms_norm_eps": 1e-6})).abs().max()
        assert float(off) > 1e-2, kind


def test_what_old_configurations_leave_out() -> None:
    found = model("one key for each query")
    config = json.loads(found.config.to_json_string(use_diff=False))
    left_out = ("head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "rms_norm_eps")
    short = {key: value for key, value in config.items() if key not in left_out}
    assert torch.equal(of(found, short), of(found, config))


def test_several_models_at_once_give_what_each_gives() -> None:
    one, two = model("grouped queries"), model("grouped queries", seed=1)
    config = json.loads(one.config.to_json_string(use_diff=False))
    states = [found.state_dict() for found in (one, two)]
    both = logits(Held(*states), config, IDS, lambda: None)
    for found, part in zip((one, two), both.chunk(2), strict=True):
        torch.testing.assert_close(part, of(found, config), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        GemmaConfig().to_dict(),
        {"model_type": "mixtral"},
        {},
        {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"model_type": "qwen2", "rope_scaling": {"rope_type": "longrope"}},
        {"model_type": "llama", "hidden_act": "gelu"},
    ],
)
def test_what_is_computed_otherwise_is_not_known(config: dict[str, Any]) -> None:
    assert not knows(config)
    assert knows({"model_type": "llama", "hidden_act": "silu", "rope_scaling": None})
