"""What is wrong with a model's config.json, by itself and against the tensors."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from chinese_llama.doctor.finding import Finding, Severity, listing, some
from chinese_llama.doctor.tensors import VOCABULARY, Readable
from chinese_llama.doctor.things import UNREADABLE
from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.merging.belongings import pieces_of
from chinese_llama.merging.forward import TYPES
from chinese_llama.merging.lineage import check_base
from chinese_llama.model.shards import EMBED, HEAD, Named, read_json

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
    config: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            try:
                found = read_json(path / name)
                config = found if name == "config.json" else config
            except BadFile as error:
                remedy = f"Fetch {name} again, or mend it at the place that is named."
                yield Finding(
                    "error", "config-damaged", str(path / name), str(error), listing(path / name), remedy
                )
    yield from _beside(path)
    if not config:
        return {}
    if not isinstance(config.get("model_type"), str):
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
    yield from _ids(path, config)
    try:
        check_base(path)
    except DoesNotFit as error:
        yield Finding("note", "quantised", str(file), str(error), [], "")
    return config


def _said(config: dict[str, Any], names: list[str]) -> list[str]:
    return [f"{name}: {config[name]!r}"[:200] if name in config else f"{name}: not said" for name in names]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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


def _ids(path: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """Special tokens in config.json that are no rows, or another token than the tokenizer's."""
    rows = config.get("vocab_size")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(name)
        ids = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
        if any(isinstance(rows, int) and not -1 <= i < rows for i in ids):
            what = f"config.json: {name} {value} is no row of a vocabulary of {rows:,}."
            remedy = f"Set {name} to the id that the tokenizer has for it."
            yield Finding(
                "error",
                "token-id-beyond-rows",
                str(path / "config.json"),
                what,
                _said(config, [name, "vocab_size"]),
                remedy,
            )
    wrong = []
    try:
        pieces = pieces_of(path)
    except UNREADABLE:
        return
    for name, piece in (("bos_token_id", "<s>"), ("eos_token_id", "</s>")):
        others = [other for other in ("<unk>", "<s>", "</s>") if other != piece and other in pieces]
        if piece in pieces and config.get(name) in [pieces[other] for other in others]:
            wrong.append(f"{name} {config[name]}; the tokenizer's {piece} is {pieces[piece]}")
    if wrong:
        what = "config.json names other control tokens than the tokenizer: generation does not stop, or stops at once."
        remedy = "Set the ids in config.json and generation_config.json to the tokenizer's."
        yield Finding("warning", "special-ids-differ", str(path / "config.json"), what, wrong, remedy)


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


def _same(source: Named) -> bool:
    if source.meta(EMBED) != source.meta(HEAD):
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
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    for name in VOCABULARY:
        shapes[name] = (config.get("vocab_size") or 0, hidden)
    return shapes


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
    width = {source.meta(name)[0][1:] for name in VOCABULARY if name in source}
    if any(one != shapes[EMBED][1:] for one in width):
        what = f"The vocabulary has {[list(one) for one in width]} columns, config.json says hidden_size {shapes[EMBED][1]}."
        yield Finding("error", "shapes-differ", where, what, [f"{EMBED}: {one}" for one in width], FETCH)


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
    for name in source:
        shape, dtype = source.meta(name)
        if dtype.is_floating_point and len(shape) > 1:
            counts[str(dtype).removeprefix("torch.")] = counts.get(str(dtype).removeprefix("torch."), 0) + 1
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    lines = [f"config.json: {said or 'says none'}", *(f"{n:,} matrices: {d}" for d, n in counts.items())]
    if len(counts) > 1 or (said and counts and said not in counts):
        what = "The weights are stored in another type than config.json says, and are loaded in that one."
        remedy = "Set dtype (torch_dtype) in config.json to what is stored, or say the dtype when you load."
        yield Finding("note", "dtypes-differ", where, what, lines, remedy)
