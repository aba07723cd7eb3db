"""What is wrong with an adapter: its tensors, their numbers, its tokenizer; adapter_config.json is looked at next door."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import ADAPTER_FILES, sha256_file
from chinese_llama.doctor.adapter_config import TRAIN, check_against, check_config, module_of
from chinese_llama.doctor.finding import Finding, guarded, listing, some
from chinese_llama.doctor.model import check_manifest, check_pieces
from chinese_llama.doctor.raw import unfinished
from chinese_llama.doctor.tensors import Measured, Readable, check_numbers, check_rows, check_shapes, measure
from chinese_llama.doctor.things import UNREADABLE, Thing, manifest_of
from chinese_llama.merging.adapter import Adapter, load
from chinese_llama.merging.belongings import pieces_of
from chinese_llama.merging.registry import registry
from chinese_llama.model.adapters import LORA, PREFIX, Tensors, pair_of, sort_tensor
from chinese_llama.model.shards import EMBED, HEAD

# what the sentences of reading the tensors are about -> the check, and what to do
TOLD = {
    "are not of rank": ("rank-differs", ""),
    "only one half": ("half-a-pair", "Fetch or save the adapter again: a tensor of it was lost."),
    "magnitude": ("dora-differs", "Set use_dora in adapter_config.json as the adapter was trained."),
    "which token ids": ("token-ids-missing", "Put trainable_token_indices, as trained, into adapter_config.json."),
    "": ("tensor-not-mergeable", "Save the adapter again with PEFT's save_pretrained, as plain LoRA."),
}  # fmt: skip
WHAT = {
    "rank-differs": "LoRA pairs are of another rank than adapter_config.json says",
    "half-a-pair": "LoRA pairs have one half only",
    "dora-differs": "LoRA pairs and adapter_config.json do not agree on DoRA",
    "token-ids-missing": "adapter_config.json does not say which tokens rows are for",
    "tensor-not-mergeable": "Tensors are of a kind that cannot be merged",
}


def check_adapter(thing: Thing) -> Iterator[Finding]:
    """Everything that is wrong with the adapter in a directory."""
    yield from guarded(thing.path, unfinished(thing.path))
    yield from guarded(thing.path, check_manifest(thing.path))
    yield from guarded(thing.path, _adapter(thing))


def _adapter(thing: Thing) -> Iterator[Finding]:
    path = thing.path
    config = yield from check_config(path)
    files = [path / name for name in ADAPTER_FILES if (path / name).is_file()]
    if not files:
        what = "There are no tensors (adapter_model.safetensors or adapter_model.bin)."
        remedy = "Fetch the missing file, or save the adapter again."
        yield Finding("error", "no-weights", str(path), what, listing(path), remedy)
        return
    if len(files) > 1:
        what = f"There are two files of tensors: {files[0].name} is read, {files[1].name} is not."
        yield Finding("note", "weights-twice", str(path), what, [], "Delete the one that you do not mean.")
    yield from _as_published(thing, files[0])
    source = Readable(files[:1])
    yield from source.problems
    if source.problems:
        return
    if not list(source):
        yield Finding(
            "error",
            "no-tensors",
            str(files[0]),
            f"The file holds no tensors ({files[0].stat().st_size:,} bytes): nothing of the training was saved.",
            listing(files[0]),
            "Take a checkpoint of the run; when you save, leave out a state_dict override, and let PEFT's "
            "save_pretrained pick the tensors once.",
        )
        return
    yield from check_shapes(source, str(files[0]))
    found = yield from _tensors(path, config, source)
    yield from check_against(path, config, source)
    yield from _numbers(thing, found, source)
    yield from _tokenizer(path, found)


def _as_published(thing: Thing, file: Path) -> Iterator[Finding]:
    names = {entry.hub.split("/")[1]: entry for entry in registry().adapters.values()}
    entry = names.get(thing.path.resolve().name) or registry().adapter(thing.path.resolve().name)
    if entry and thing.published is None and file.suffix == ".bin":
        what = f"It has the name of a published adapter, {entry.name}, but another sha256: damaged, or another one."
        remedy = f"Fetch it again from {entry.hub}; if it is your own, give its directory another name."
        lines = [f"{sha256_file(file)}; published: {entry.sha256}"]
        yield Finding("warning", "not-as-published", str(file), what, lines, remedy)


# --- tensors against adapter_config.json


def _tensors(path: Path, config: dict[str, Any], source: Readable) -> Generator[Finding, None, Tensors]:
    """Findings about single tensors; returns those that can be merged."""
    file = next(iter(source.files.values()))
    try:
        adapter = load(path.name, path)
    except (*UNREADABLE, StopIteration):
        rank = next(iter(_ranks(source).values()), 1)  # told already; go on with what the tensors say
        plain = {"r": rank, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}}
        adapter = Adapter(path.name, path, {**config, **plain}, None)
    found = Tensors(adapter, file)
    halves: dict[str, dict[str, str]] = {}
    told: dict[str, list[str]] = {}
    for key in source:
        if 0 in source.meta(key)[0]:
            continue  # told by check_shapes
        try:
            sort_tensor(found, key, halves)
        except UNREADABLE as error:
            told.setdefault(_about(error), []).append(_short(error))
    empty = {module_of(key) for key in source if 0 in source.meta(key)[0]}
    for module, half in halves.items():
        try:
            if module not in empty:
                pair_of(found, module, half)
        except UNREADABLE as error:
            told.setdefault(_about(error), []).append(_short(error))
    for sign, lines in told.items():
        check, remedy = TOLD[sign]
        if not config and check not in ("half-a-pair", "tensor-not-mergeable"):
            continue  # that there is no config was told
        what = f"{WHAT[check]} ({len(lines):,} of the adapter)."
        remedy = remedy or _rank_remedy(source, config)
        yield Finding("error", check, str(file.file), what, some(lines), remedy)
    return found


def _about(error: Exception) -> str:
    return next(sign for sign in TOLD if sign in str(error))


def _short(error: Exception) -> str:
    return re.sub(r"^\S+: ", "", str(error))


def _ranks(source: Readable) -> dict[str, int]:
    """The rank of each module, by its lora_A."""
    found = {}
    for key in source:
        match = LORA.fullmatch(key.removeprefix(PREFIX))
        if match and match[3] == "A" and source.meta(key)[0]:
            found[match[1]] = source.meta(key)[0][0]
    return found


def _rank_remedy(source: Readable, config: dict[str, Any]) -> str:
    ranks = _ranks(source)
    if len(set(ranks.values())) == 1:
        rank = next(iter(ranks.values()))
        if config.get("r") == rank:
            return "Take the entries that say otherwise out of rank_pattern (and alpha_pattern) in adapter_config.json."
        return f'Set "r": {rank} in adapter_config.json (all pairs have it); check lora_alpha too, for alpha / r scales them.'
    return "Write the ranks that differ from r into rank_pattern (a name or pattern of modules to a rank)."


# --- numbers, vocabulary


def _numbers(thing: Thing, found: Tensors, source: Readable) -> Iterator[Finding]:
    rows = {name: key for name in (EMBED, HEAD) for key in [found.matrices.get(name)] if key}
    single = {name: key for name, (_, key) in found.rows.items()}
    numbers, lost = measure(
        source, list(source), [*rows.values(), *single.values()], f"reading {thing.path.name}"
    )
    yield from lost
    lora = {key: one for key, one in numbers.items() if module_of(key)}
    yield from check_numbers({k: o for k, o in numbers.items() if k not in lora}, str(thing.path))
    yield from (f for f in check_numbers(lora, str(thing.path)) if f.check != "zero-tensors")
    yield from _untrained(thing.path, found, lora)
    pieces = None
    with contextlib.suppress(*UNREADABLE):
        pieces = max(pieces_of(thing.path).values()) + 1
    yield from check_rows(
        {n: numbers[k] for n, k in rows.items() if k in numbers}, str(thing.path), None, pieces
    )
    yield from check_rows({n: numbers[k] for n, k in single.items() if k in numbers}, str(thing.path))


def _untrained(path: Path, found: Tensors, lora: dict[str, Measured]) -> Iterator[Finding]:
    """LoRA that adds nothing: B begins as zero, and stays so where nothing trains it."""
    sides = {side: {module_of(key): one for key, one in lora.items() if _side(key) == side} for side in "AB"}
    zero = sorted(name for name, one in sides["B"].items() if one.zero)
    if zero and len(zero) == len(sides["B"]):
        if found.matrices or found.rows:
            what = "All LoRA pairs add nothing (every lora_B is zero); only rows of the vocabulary, or whole matrices, were trained."
            remedy = "A run that goes on from an adapter needs is_trainable (PeftModel.from_pretrained(..., is_trainable=True)), or it trains these alone: train again from the adapter before (init_adapter)."
            yield Finding("warning", "only-vocabulary-trained", str(path), what, some(zero), remedy)
        else:
            what = "The adapter adds nothing: every lora_B is zero, as before the first step."
            remedy = "Take a later checkpoint; if it is the end of a run, its learning rate was 0 or its parameters were frozen."
            yield Finding("warning", "untrained", str(path), what, some(zero), remedy)
    elif zero:
        what = f"{len(zero):,} of {len(sides['B']):,} LoRA pairs add nothing (lora_B is zero)."
        remedy = "Look whether those modules took part in the training; tensors that were not gathered (ZeRO-3) look the same."
        yield Finding("warning", "zero-pairs", str(path), what, some(zero), remedy)
    dead = sorted(name for name, one in sides["A"].items() if one.zero)
    if dead:
        what = f"{len(dead):,} of {len(sides['A']):,} LoRA pairs add nothing (lora_A is zero, which no training begins with)."
        remedy = "Save again: stage3_gather_16bit_weights_on_model_save: true, or zero_to_fp32.py of the checkpoint."
        yield Finding("error", "zero-tensors", str(path), what, some(dead), remedy)


def _side(key: str) -> str:
    """ "B" for the half that begins as zero, "A" for the other; of an embedding PEFT begins with a zero A."""
    match = LORA.fullmatch(key.removeprefix(PREFIX))
    if match and match[2]:
        return {"A": "B", "B": "A"}[match[3]]
    return match[3] if match else ""


def _tokenizer(path: Path, found: Tensors) -> Iterator[Finding]:
    """The rows of the vocabulary and the tokenizer beside the adapter."""
    sizes = {name: found.matrix(name)[0][0] for name in (EMBED, HEAD) if name in found.matrices}
    if len(set(sizes.values())) > 1:
        lines = [f"{name}: {size:,} rows" for name, size in sizes.items()]
        what = "The input and the output matrix of the adapter are of different sizes."
        yield Finding("error", "vocab-size-differs", str(path), what, lines, TRAIN)
    yield from check_pieces(path, max(sizes.values(), default=None), "the adapter")
    try:
        pieces = max(pieces_of(path).values()) + 1
    except UNREADABLE:
        return
    beyond = {name: max(ids) for name, (ids, _) in found.rows.items() if ids and max(ids) >= pieces}
    if beyond:
        lines = [
            f"{name}: up to id {last:,}; the tokenizer has {pieces:,} pieces" for name, last in beyond.items()
        ]
        what = "trainable_token_indices go beyond the pieces of the tokenizer beside the adapter."
        remedy = "Put the tokenizer that the adapter was trained with there."
        yield Finding("error", "token-ids-beyond", str(path), what, lines, remedy)
    yield from _own(path, pieces)


def _own(path: Path, pieces: int) -> Iterator[Finding]:
    """Whether the tokenizer beside the adapter is the one that the manifest says it was trained with."""
    manifest = manifest_of(path)
    record = manifest.inputs.get("tokenizer") if manifest else None
    if manifest is None or not record or not record["sha256"]:
        return
    files = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
    if record["sha256"] in map(sha256_file, files):
        return
    remedy = f"Copy the tokenizer of {record['path']} there."
    lines = [f"pieces: {pieces:,}; rows it was trained with: {manifest.vocab_size}"]
    with contextlib.suppress(*UNREADABLE):  # the same pieces in other bytes
        if pieces_of(Path(record["path"])) == pieces_of(path):
            return
    what = "The tokenizer beside the adapter is not the one that it was trained with (its manifest has another sha256)."
    yield Finding("error", "tokenizer-not-its-own", str(path), what, lines, remedy)
