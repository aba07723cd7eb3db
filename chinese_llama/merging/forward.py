"""The logits of a LLaMA, one block of one weight in memory at a time.

For comparing models that are too large to load, on a few tokens; float32. The architecture is that of
transformers' LlamaForCausalLM (RMSNorm, rotary halves, grouped queries, SwiGLU), with biases where the
model has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from chinese_llama.model.shards import EMBED, HEAD

TYPES = ("llama", "mistral", "qwen2")  # model_type


class Source(Protocol):
    """Where the weights are. What it gives may be of several sequences of the same tokens, one behind the other
    (of several models); `tokens` are then those of all of them."""

    def embed(self, ids: list[int]) -> torch.Tensor:
        """Input rows, [tokens, hidden]."""

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, in] times the transposed weight `name` [out, in], plus its bias: [tokens, out]."""

    def vector(self, name: str) -> torch.Tensor:
        """A weight of one dimension, [hidden], or for each token its own, [tokens, hidden]."""


def knows(config: dict[str, Any]) -> bool:
    """Whether `logits` computes what models of this kind do."""
    rope = _rope(config)
    return (
        config.get("model_type") in TYPES
        and config.get("hidden_act", "silu") == "silu"
        and rope["rope_type"] in ("default", "linear", "llama3")
        and isinstance(rope["rope_theta"], (int, float))
    )


def sized(config: dict[str, Any]) -> bool:
    """Whether the sizes that `logits` needs are there."""
    heads = config.get("num_attention_heads") or 0
    groups = config.get("num_key_value_heads") or heads
    counts = [heads, groups, config.get("hidden_size"), config.get("num_hidden_layers")]
    return all(isinstance(count, int) and count > 0 for count in counts) and heads % groups == 0


def logits(
    source: Source, config: dict[str, Any], ids: list[int], seen: Callable[[], object]
) -> torch.Tensor:
    """The logits [tokens, vocab] of the sequence `ids`, or of several of them (see `Source`); `seen` is called
    after each layer."""
    x = source.embed(ids)
    cos, sin = _rotary(config, len(ids))
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        normed = _norm(x, source.vector(f"{name}.input_layernorm.weight"), config)
        x = x + _attention(source, config, f"{name}.self_attn", normed, cos, sin)
        normed = _norm(x, source.vector(f"{name}.post_attention_layernorm.weight"), config)
        gate = source.linear(f"{name}.mlp.gate_proj.weight", normed)
        up = source.linear(f"{name}.mlp.up_proj.weight", normed)
        x = x + source.linear(f"{name}.mlp.down_proj.weight", torch.nn.functional.silu(gate) * up)
        seen()
    x = _norm(x, source.vector("model.norm.weight"), config)
    return source.linear(EMBED if config.get("tie_word_embeddings") else HEAD, x)


def _norm(x: torch.Tensor, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.get("rms_norm_eps", 1e-6)) * weight


def _attention(
    source: Source, config: dict[str, Any], name: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    heads, groups = (
        config["num_attention_heads"],
        config.get("num_key_value_heads") or config["num_attention_heads"],
    )
    size = cos.shape[1]
    q, k, v = (
        source.linear(f"{name}.{part}_proj.weight", x).view(-1, len(cos), count, size).transpose(1, 2)
        for part, count in (("q", heads), ("k", groups), ("v", groups))
    )
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return source.linear(f"{name}.o_proj.weight", out.transpose(1, 2).reshape(len(x), -1))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, where transformers 4 and 5 keep them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        return {"rope_type": "unknown", "rope_theta": None}
    kind = found.get("rope_type") or found.get("type") or "default"
    return {"rope_theta": config.get("rope_theta", 10_000.0), **found, "rope_type": kind}


def _rotary(config: dict[str, Any], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, head] of positions 0 ... (Su 2021, arXiv 2104.09864)."""
    rope = _rope(config)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        frequencies = _llama3(frequencies, rope)
    angles = torch.outer(torch.arange(count).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _llama3(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Long waves slowed down by `factor`, short ones kept, those between blended (Llama 3.1)."""
    low, high, context = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )
    waves = 2 * math.pi / frequencies
    smooth = ((context / waves - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
