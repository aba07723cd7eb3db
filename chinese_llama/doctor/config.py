"""What is wrong with a model's config.json, by itself and against the tensors."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from chinese_llama.doctor.finding import Finding, Severity, listing, some
from chinese_llama.doctor.opened import config_problem
from chinese_llama.doctor.raw import json_object
from chinese_llama.doctor.tensors import VOCABULARY, Readable
from chinese_llama.errors import DoesNotFit
from chinese_llama.merging.forward import TYPES
from chinese_llama.merging.lineage import check_base
from chinese_llama.model.shards import EMBED, HEAD, Named

LAYER = re.compile(r"model\.layers\.(\d+)\.")
ROTARY = re.compile(r"rotary_emb\.inv_freq$")
HEADS = re.compile(r"\.self_attn\.[qkvo]_proj\.")
FETCH = "Fetch config.json and weights again, from one source."
# rows of the vocabulary -> the rotary base that the models with it were trained with
THETA = {128_256: 500_000.0, 32_016: 1_000_000.0}
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_config(path: Path) -> Generator[Finding, None, dict[str, Any]]:
    """Findings about config.json itself; returns what it holds, {} where that is nothing."""
    file = path / "config.json"
    if not file.is_file():
        remedy = "Fetch config.json from where the weights come from."
        yield Finding("error", "config-missing", str(path), "There is no config.json.", listing(path), remedy)
        return {}
    found: list[Finding] = []
    config = json_object(file, found)
    json_object(path / "generation_config.json", found)
    yield from found
    yield from _beside(path)
    if not config:
        return {}
    if isinstance(config.get("model_type"), str):
        problem = config_problem(path)
        yield from [problem] if problem else []
    else:
        remedy = 'Add it: for LLaMA and what was made of it, "model_type": "llama".'
        what = "config.json names no model_type, and does not load."
        yield Finding("error", "config-field-missing", str(file), what, _said(config, ["model_type"]), remedy)
    lost = [name for name in NEEDED if not _whole(config.get(name))]
    if lost and config.get("model_type") in TYPES:
        what = (
            f"config.json does not say {', '.join(lost)}; the defaults of the library are of another model."
        )
        remedy = "Fetch config.json from where the weights come from."
        yield Finding("error", "config-field-missing", str(file), what, _said(config, lost), remedy)
    yield from _rotary(path, config)
    yield from _scaling(path, config)
    yield from _ids(path, config)
    try:
        check_base(path)
    except DoesNotFit as error:
        yield Finding("note", "quantised", str(file), str(error), [], "")
    return config


def _said(config: dict[str, Any], names: list[str]) -> list[str]:
    return [f"{name}: {config[name]!r}"[:200] if name in config else f"{name}: not said" for name in names]


def _whole(value: Any) -> bool:
    return _index(value) and value > 0


def _beside(path: Path) -> Iterator[Finding]:
    """An adapter among the files of a model: transformers loads it on top, or instead."""
    if (path / "adapter_config.json").is_file():
        yield Finding(
            "warning",
            "adapter-beside-weights",
            str(path / "adapter_config.json"),
            "An adapter lies beside the weights of a model, and transformers loads it together with them.",
            some(sorted(file.name for file in path.glob("adapter_*"))),
            "Move adapter_config.json and adapter_model.* to a directory of their own.",
        )


def rotary_base(config: dict[str, Any]) -> float | None:
    """The base of the rotary frequencies that config.json says, in the words of transformers 4 or 5; None if none."""
    for found in (config.get("rope_parameters"), config.get("rope_scaling"), config):
        if isinstance(found, dict) and isinstance(found.get("rope_theta"), (int, float)):
            return float(found["rope_theta"])
    return None


def _rotary(path: Path, config: dict[str, Any]) -> Iterator[Finding]:
    rows, theta = config.get("vocab_size"), rotary_base(config)
    wanted = THETA.get(rows) if isinstance(rows, int) and config.get("model_type") == "llama" else None
    if wanted and (theta or 10_000.0) != wanted:
        yield Finding(
            "warning",
            "rope-theta",
            str(path / "config.json"),
            f"Models of {rows:,} rows are trained with rope_theta {wanted:,.0f}, and config.json says "
            f"{'nothing, which means 10,000' if theta is None else f'{theta:,.0f}'}.",
            _said(config, ["vocab_size", "rope_theta", "rope_parameters"]),
            f'Put "rope_theta": {wanted} into config.json, unless the model was trained otherwise.',
        )
    for name in ("rms_norm_eps", "max_position_embeddings"):
        if config.get("model_type") in TYPES and config.get(name) is None:
            what = (
                f"config.json does not say {name}; the default of the library may be that of another model."
            )
            remedy = f"Add {name} as the model that it comes from has it."
            yield Finding(
                "warning",
                "config-field-missing",
                str(path / "config.json"),
                what,
                _said(config, [name]),
                remedy,
            )


def _scaling(path: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """A kind of rotary scaling that transformers does not have: it says so only when the model is built."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    kind = scaling.get("rope_type") or scaling.get("type") if isinstance(scaling, dict) else None
    if kind and config.get("model_type") in TYPES and kind not in ("default", *ROPE_INIT_FUNCTIONS):
        what = f"config.json names a rotary scaling that transformers does not have, {kind!r}: the model does not load."
        remedy = f"Write the rope_type that it was trained with: {', '.join(ROPE_INIT_FUNCTIONS)}; or none."
        lines = _said(config, ["rope_parameters", "rope_scaling"])
        yield Finding("error", "rope-scaling-unknown", str(path / "config.json"), what, lines, remedy)


def _ids(path: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """Special tokens in config.json or generation_config.json that are no rows."""
    rows = config.get("vocab_size")
    for file in ("config.json", "generation_config.json"):
        content = json_object(path / file, [])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = content.get(name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not isinstance(rows, int) or all(_index(i) and -1 <= i < rows for i in ids):
                continue
            what = f"{file}: {name} {value!r} is no row of a vocabulary of {rows:,}."
            remedy = f"Set {name} to the id that the tokenizer has for it."
            lines = [*_said(content, [name]), f"vocab_size: {rows:,}"]
            yield Finding("error", "token-id-beyond-rows", str(path / file), what, lines, remedy)


def _index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- tensors against config.json


def check_against(path: Path, config: dict[str, Any], source: Readable) -> Iterator[Finding]:
    """What config.json and the tensors say of each other."""
    where = str(path / "config.json")
    yield from _vocabulary(where, config, source)
    layers = {int(match[1]) for name in source if (match := LAYER.match(name))}
    said = config.get("num_hidden_layers")
    if _whole(said) and layers and len(layers) != said and source.whole:
        what = f"config.json says {said} layers, and the weights are of {len(layers)}."
        remedy = "Take config.json and weights from one source; a copy of fewer layers is not whole."
        yield Finding(
            "error", "layers-differ", where, what, [f"layers {min(layers)} to {max(layers)}"], remedy
        )
    shapes = wanted_shapes(config)
    if shapes and not config.get("quantization_config"):
        yield from _shapes(where, shapes, source)
        yield from _unused(where, shapes, source)
        lost = [name for name in shapes if name not in source and name not in VOCABULARY]
        lost = [name for name in lost if (m := LAYER.match(name)) is None or int(m[1]) in layers]
        if lost and source.whole:
            what = f"{len(lost):,} tensors that the architecture needs are not there; they would be random."
            yield Finding("error", "tensors-missing", str(path), what, some(lost), FETCH)
    yield from _buffers(where, config, source)
    yield from _dtypes(where, config, source)


def _vocabulary(where: str, config: dict[str, Any], source: Readable) -> Iterator[Finding]:
    """vocab_size, embeddings and output matrix, and whether the latter are one."""
    tied, rows = config.get("tie_word_embeddings"), config.get("vocab_size")
    sizes = {name: source.meta(name)[0][0] for name in VOCABULARY if name in source and source.meta(name)[0]}
    if config and any(size != rows for size in sizes.values() if size) and isinstance(rows, int):
        lines = [f"config.json: vocab_size {rows:,}", *(f"{n}: {size:,} rows" for n, size in sizes.items())]
        what = "config.json and the matrices of the vocabulary are of different sizes."
        most = max(sizes.values())
        remedy = f"Set vocab_size to {most:,} if both matrices have as many rows; else save the model again after resize_token_embeddings."
        yield Finding("error", "vocab-size-differs", where, what, lines, remedy)
    if not source.whole:
        return
    if EMBED not in source:
        what = f"There is no {EMBED}: it is no model of the LLaMA family that this toolkit works on."
        severity: Severity = "error" if config.get("model_type") in TYPES else "note"
        yield Finding(severity, "embeddings-missing", where, what, some(list(source)), FETCH)
    elif HEAD not in source and config and not tied:
        what = f"There is no {HEAD}, and config.json does not tie the output to the embeddings: it would be random."
        remedy = "If the model was trained with tied embeddings, set tie_word_embeddings to true; else fetch the missing tensor."
        yield Finding(
            "error", "untied-without-head", where, what, _said(config, ["tie_word_embeddings"]), remedy
        )
    elif HEAD in source and tied and not _same(source):
        what = f"config.json ties the output to the embeddings, but {HEAD} is another matrix, which is then not used."
        remedy = 'Set "tie_word_embeddings": false in config.json, if the model was trained so.'
        yield Finding(
            "error", "tied-with-another-head", where, what, _said(config, ["tie_word_embeddings"]), remedy
        )
    elif HEAD in source and not tied and _same(source):
        what = f"{HEAD} and {EMBED} are the same numbers, but config.json does not tie them: a training lets them part."
        remedy = 'If the model was trained tied, set "tie_word_embeddings": true in config.json.'
        yield Finding(
            "note", "untied-with-same-head", where, what, _said(config, ["tie_word_embeddings"]), remedy
        )


def _same(source: Named) -> bool:
    if source.meta(EMBED) != source.meta(HEAD) or 0 in source.meta(EMBED)[0]:
        return False
    rows, step = source.meta(EMBED)[0][0], 1024
    return all(
        torch.equal(source.rows(EMBED, i, i + step), source.rows(HEAD, i, i + step))
        for i in range(0, rows, step)
    )


def wanted_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes that config.json says, of a LLaMA, Mistral or Qwen2; {} for others, and where sizes are missing."""
    if config.get("model_type") not in TYPES or not all(_whole(config.get(name)) for name in NEEDED):
        return {}
    hidden, ffn, layers, heads = (config[name] for name in NEEDED)
    size, groups = config.get("head_dim") or hidden // heads, config.get("num_key_value_heads") or heads
    if layers > 10_000 or not (_whole(size) and _whole(groups)):
        return {}
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    parts = {
        "self_attn.q_proj": (heads * size, hidden),
        "self_attn.k_proj": (groups * size, hidden),
        "self_attn.v_proj": (groups * size, hidden),
        "self_attn.o_proj": (hidden, heads * size),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    biased = [part for part in parts if _biased(part, config)]
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
        shapes |= {f"model.layers.{layer}.{part}.bias": parts[part][:1] for part in biased}
    for name in VOCABULARY:
        shapes[name] = (config.get("vocab_size") or 0, hidden)
    return shapes


def _biased(part: str, config: dict[str, Any]) -> bool:
    """Whether a part of a layer has a bias, as transformers builds it."""
    if config["model_type"] == "qwen2":
        return part.endswith(("q_proj", "k_proj", "v_proj"))
    field = {"self_attn": "attention_bias", "mlp": "mlp_bias"}.get(part.partition(".")[0], "")
    return config["model_type"] == "llama" and bool(config.get(field))


def _unused(where: str, shapes: dict[str, tuple[int, ...]], source: Named) -> Iterator[Finding]:
    """Tensors that the architecture has no place for: transformers leaves them out, with what they were trained to."""
    more = [n for n in source if n not in shapes and not ROTARY.search(n)]
    more = [n for n in more if (m := LAYER.match(n)) is None or f"{m[0]}input_layernorm.weight" in shapes]
    if more:
        bias = any(name.endswith("_proj.bias") for name in more)
        remedy = (
            'Set "attention_bias" (or "mlp_bias") to true in config.json, or name the model_type that it was trained as.'
            if bias
            else "Name the model_type that it was trained as; merge adapters (lora_) with chinese-llama merge."
        )
        what = f"{len(more):,} tensors have no place in the architecture of config.json, and are left out when it is loaded."
        yield Finding("error" if bias else "warning", "tensors-not-used", where, what, some(more), remedy)


def _shapes(where: str, shapes: dict[str, tuple[int, ...]], source: Named) -> Iterator[Finding]:
    wrong = {
        n: s for n, s in shapes.items() if n in source and n not in VOCABULARY and source.meta(n)[0] != s
    }
    wrong = {name: shape for name, shape in wrong.items() if 0 not in source.meta(name)[0]}
    heads = {name: shape for name, shape in wrong.items() if HEADS.search(name)}
    for check, found, remedy in (
        (
            "heads-differ",
            heads,
            "Set num_attention_heads, num_key_value_heads and head_dim as the model that it comes from has them.",
        ),
        ("shapes-differ", {n: s for n, s in wrong.items() if n not in heads}, FETCH),
    ):
        if found:
            lines = [f"{n}: {list(source.meta(n)[0])}; config.json: {list(s)}" for n, s in found.items()]
            what = f"{len(found):,} tensors have other shapes than config.json says."
            yield Finding("error", check, where, what, some(lines), remedy)
    there = {name: source.meta(name)[0] for name in VOCABULARY if name in source}
    lines = [f"{n}: {list(s)}" for n, s in there.items() if 0 not in s and s[1:] != shapes[EMBED][1:]]
    if lines:
        what = f"The vocabulary has other columns than config.json says (hidden_size {shapes[EMBED][1]})."
        yield Finding("error", "shapes-differ", where, what, lines, FETCH)


def _buffers(where: str, config: dict[str, Any], source: Named) -> Iterator[Finding]:
    """Rotary frequencies that old conversions saved: they tell what the model was trained with."""
    names = [name for name in source if ROTARY.search(name)]
    if not names:
        return
    stored = source.load(names[0]).float()
    size = 2 * len(stored)
    theta = rotary_base(config) or 10_000.0
    expected = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    if len(stored) < 2 or torch.allclose(stored, expected, rtol=0.02, atol=1e-6):
        what = f"{len(names):,} rotary buffers are stored, as old conversions did; they are not needed."
        yield Finding("note", "rotary-buffers", where, what, some(names), "")
        return
    likely = float(stored[-1]) ** (-size / (size - 2)) if stored[-1] > 0 else float("nan")
    lines = [f"{names[0]}: base about {likely:,.0f}, or scaled", f"config.json: {theta:,.0f}"]
    what = "The rotary frequencies that are stored are not those of config.json: a conversion lost rope_theta or rope_scaling."
    remedy = f"Set rope_theta (rope_scaling) in config.json as the model was trained; the stored ones are of about {likely:,.0f}."
    yield Finding("warning", "rotary-buffers-differ", where, what, lines, remedy)


def _dtypes(where: str, config: dict[str, Any], source: Named) -> Iterator[Finding]:
    counts: dict[str, int] = {}
    for name in [name for name in source if name.endswith("weight")]:  # GPTQ's qweight too, but no masks
        shape, dtype = source.meta(name)
        if len(shape) > 1 and not (config.get("quantization_config") and not dtype.is_floating_point):
            counts[str(dtype).removeprefix("torch.")] = counts.get(str(dtype).removeprefix("torch."), 0) + 1
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    lines = [f"config.json: {said or 'says none'}", *(f"{n:,} matrices: {d}" for d, n in counts.items())]
    whole = [name for name in (*counts, said) if not _fractions(name)]
    if whole:
        what = f"A model cannot be of whole numbers ({', '.join(dict.fromkeys(whole))}) without a quantization_config that says what they stand for."
        remedy = (
            "Give the model before it was quantised, with dtype (torch_dtype) in config.json as it is stored."
        )
        yield Finding("error", "dtype-of-whole-numbers", where, what, lines, remedy)
    elif len(counts) > 1 or (said and counts and said not in counts):
        what = "The weights are stored in another type than config.json says, and are loaded in that one."
        remedy = "Set dtype (torch_dtype) in config.json to what is stored, or say the dtype when you load."
        yield Finding("note", "dtypes-differ", where, what, lines, remedy)


def _fractions(name: str) -> bool:
    """Whether a name is that of a type of fractions, or of none that PyTorch has, which is told elsewhere."""
    kind = getattr(torch, name, None)
    return not isinstance(kind, torch.dtype) or kind.is_floating_point
