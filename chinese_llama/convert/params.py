"""params.json, and what it says in the words of Hugging Face's config.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from chinese_llama.convert.layout import Sizes
from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.model.shards import read_json

THETA = 10000.0  # base of the rotary frequencies where nothing says otherwise
# what Meta's format cannot say, kept by a conversion into it for the way back
KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
# later models than LLaMA 2 (LLaMA 3.1, Mistral): the tensors look alike and mean something else
FOREIGN = ("use_scaled_rope", "sliding_window", "moe")


def read_params(file: Path) -> dict[str, Any]:
    """params.json, checked. Raises BadFile."""
    if not file.is_file():
        raise BadFile(file, "no such file; Meta's checkpoints have it beside consolidated.00.pth.")
    params = read_json(file)
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads"):
        value = params.get(name)
        if name == "n_kv_heads" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadFile(file, f"{name} must be a whole number above 0, not {value!r}.")
    for name in ("norm_eps", "rope_theta"):
        value = params.get(name, THETA if name == "rope_theta" else None)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise BadFile(file, f"{name} must be a number above 0, not {value!r}.")
    size = params.get("vocab_size", -1)
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise BadFile(file, f"vocab_size must be a whole number above 0, or -1, not {size!r}.")
    for name in FOREIGN:
        if params.get(name):
            raise BadFile(file, f"has {name}; this is a later model than LLaMA 1 and 2, which are converted.")
    _check_heads(file, params["dim"], params["n_heads"], kv_heads(params))
    return params


def kv_heads(params: dict[str, Any]) -> int:
    """Key/value heads: as many as heads where nothing else is said."""
    return params.get("n_kv_heads") or params["n_heads"]


def _check_heads(file: Path, dim: int, heads: int, kv: int) -> None:
    if dim % heads or dim // heads % 2:
        raise BadFile(file, f"dim {dim} does not divide into {heads} heads of an even size.")
    if heads % kv:
        raise BadFile(file, f"{heads} heads do not divide into groups of {kv} key/value heads.")


def hf_config(params: dict[str, Any], sizes: Sizes, dtype: torch.dtype, context: int) -> dict[str, Any]:
    """config.json of the model, in words that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": float(params.get("rope_theta", THETA)),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def context_of(params: dict[str, Any], dtype: torch.dtype) -> int:
    """Tokens that a published model was trained on at once: Code Llama 16384 (it is the one with another
    rotary base), LLaMA 2 4096 (bfloat16), LLaMA 1 2048 (float16)."""
    if params.get("rope_theta", THETA) > THETA:
        return 16384
    return 4096 if dtype == torch.bfloat16 else 2048


def hf_sizes(config: dict[str, Any], vocab: int) -> Sizes:
    """The sizes that a config.json says. Raises DoesNotFit for what Meta's format has no place for."""
    kind = config.get("model_type")
    if kind != "llama":
        raise DoesNotFit(f"config.json: Meta's format is for models of type llama, not {kind}.")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise DoesNotFit(f"config.json: {name} is set, and Meta's format has no place for biases.")
    if config.get("hidden_act", "silu") != "silu":
        raise DoesNotFit(
            f"config.json: hidden_act {config['hidden_act']}, and Meta's format knows only silu."
        )
    if config.get("quantization_config"):
        raise DoesNotFit("config.json: the weights are quantised; Meta's format holds plain ones.")
    heads = _whole(config, "num_attention_heads")
    kv = heads if config.get("num_key_value_heads") is None else _whole(config, "num_key_value_heads")
    dim = _whole(config, "hidden_size")
    if dim % heads or dim // heads % 2 or heads % kv:
        raise DoesNotFit(
            f"config.json: hidden size {dim}, {heads} heads and {kv} key/value heads do not fit."
        )
    if config.get("head_dim") not in (None, dim // heads):
        raise DoesNotFit(
            f"config.json: heads of {config['head_dim']} in a hidden size of {dim}; in Meta's format {heads} "
            f"heads have {dim // heads} each."
        )
    rope_theta(config)
    return Sizes(
        dim, _whole(config, "num_hidden_layers"), heads, kv, _whole(config, "intermediate_size"), vocab
    )


def _whole(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DoesNotFit(f"config.json: {name} must be a whole number above 0, not {value!r}.")
    return value


def rope_theta(config: dict[str, Any]) -> float:
    """The base of the rotary frequencies, as transformers 4 or 5 writes it. Raises DoesNotFit for scaled
    ones."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    for said in (new, old):
        kind = said.get("rope_type", said.get("type", "default"))
        if kind != "default":
            raise DoesNotFit(f"config.json: rope scaling ({kind}), which Meta's format has no place for.")
    return float(new.get("rope_theta", config.get("rope_theta", THETA)))


def meta_params(config: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """params.json of a model that has none of Meta's own."""
    params: dict[str, Any] = {"dim": sizes.dim, "n_layers": sizes.layers, "n_heads": sizes.heads}
    if sizes.kv_heads != sizes.heads:
        params["n_kv_heads"] = sizes.kv_heads
    params |= ffn_rule(sizes.dim, sizes.ffn)
    params |= {"norm_eps": _eps(config), "vocab_size": sizes.vocab}
    theta = rope_theta(config)
    return params | ({"rope_theta": theta} if theta != THETA else {})


def still_says(params: dict[str, Any], config: dict[str, Any], sizes: Sizes) -> bool:
    """Whether a params.json is that of this model still, but for the size of the vocabulary."""
    said = (params["dim"], params["n_layers"], params["n_heads"], kv_heads(params))
    numbers = (float(params.get("rope_theta", THETA)), float(params["norm_eps"]))
    shape = (sizes.dim, sizes.layers, sizes.heads, sizes.kv_heads)
    return said == shape and numbers == (rope_theta(config), _eps(config))


def resized(params: dict[str, Any], vocab: int) -> dict[str, Any]:
    """params.json with a new size of the vocabulary; -1, "as the tokenizer has it", stays."""
    return {**params, "vocab_size": vocab} if params.get("vocab_size", -1) != -1 else dict(params)


def _eps(config: dict[str, Any]) -> float:
    return float(config.get("rms_norm_eps", 1e-6))


def ffn_width(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """The width of the feed-forward, as Meta's code computes it."""
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return -(-width // multiple_of) * multiple_of


def ffn_rule(dim: int, ffn: int) -> dict[str, Any]:
    """`multiple_of`, and `ffn_dim_multiplier` where it is needed, that make `ffn_width` give `ffn`.

    The published models' own where they are Meta's sizes: 256; 4096 and 1.3 (70B).
    """
    powers = [2**power for power in range(12, -1, -1)]
    for multiple in (256, *powers):
        if ffn_width(dim, multiple) == ffn:
            return {"multiple_of": multiple}
    multiple = next(power for power in powers if ffn % power == 0)
    whole = int(2 * (4 * dim) / 3)
    exact = (ffn + 0.5) / whole  # inside what is rounded to `ffn`, so enough digits of it always do
    for digits in range(1, 17):
        multiplier = math.floor(exact * 10**digits) / 10**digits
        if ffn_width(dim, multiple, multiplier) == ffn:
            return {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
    raise ValueError(f"no multiplier of {whole} gives {ffn}")
