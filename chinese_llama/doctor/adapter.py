"""What is wrong with an adapter: its adapter_config.json, its tensors against that, its numbers, its tokenizer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import ADAPTER_FILES, sha256_file
from chinese_llama.doctor.finding import Finding, guarded, some
from chinese_llama.doctor.model import check_manifest, check_pieces
from chinese_llama.doctor.tensors import Measured, Readable, check_numbers, check_rows, check_shapes, measure
from chinese_llama.doctor.things import UNREADABLE, Thing, manifest_of
from chinese_llama.errors import BadFile
from chinese_llama.hub import is_hub_id
from chinese_llama.merging.adapter import Adapter, check_mergeable, load, read_object
from chinese_llama.merging.belongings import pieces_of
from chinese_llama.merging.registry import registry
from chinese_llama.model.adapters import LORA, PREFIX, SAVED, TOKENS, Tensors, pair_of, sort_tensor
from chinese_llama.model.shards import EMBED, HEAD

LAYERS = re.compile(r"\.layers\.(\d+)\.")
TRAIN = "Train the adapter again; adapter_config.json and adapter_model must come from one save."
# what the sentences of reading the tensors are about -> the check, and what to do
TOLD = {
    "are not of rank": ("rank-differs", ""),
    "only one half": ("half-a-pair", "Fetch or save the adapter again: a tensor of it was lost."),
    "magnitude": ("dora-differs", "Set use_dora in adapter_config.json as the adapter was trained."),
    "which token ids": ("token-ids-missing", "Put trainable_token_indices, as trained, into adapter_config.json."),
    "": ("tensor-not-mergeable", "Save the adapter again with PEFT's save_pretrained, as plain LoRA."),
}  # fmt: skip


def check_adapter(thing: Thing) -> Iterator[Finding]:
    """Everything that is wrong with the adapter in a directory."""
    yield from guarded(thing.path, check_manifest(thing.path))
    yield from guarded(thing.path, _adapter(thing))


def _adapter(thing: Thing) -> Iterator[Finding]:
    path = thing.path
    config = yield from _config(path)
    files = [path / name for name in ADAPTER_FILES if (path / name).is_file()]
    if not files:
        what = "There are no tensors (adapter_model.safetensors or adapter_model.bin)."
        remedy = "Fetch the missing file, or save the adapter again."
        yield Finding("error", "no-weights", str(path), what, [], remedy)
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
            [],
            "Take a checkpoint of the run; when you save, leave out a state_dict override, and let PEFT's "
            "save_pretrained pick the tensors once.",
        )
        return
    yield from check_shapes(source, str(files[0]))
    found = yield from _tensors(path, config, source)
    yield from _against_config(path, config, source)
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


# --- adapter_config.json


def _config(path: Path) -> Generator[Finding, None, dict[str, Any]]:
    """Findings about adapter_config.json; returns what it holds."""
    file = path / "adapter_config.json"
    if not file.is_file():
        what = "There is no adapter_config.json: rank, alpha and targets are not known."
        remedy = "Fetch it from where the adapter comes from, or write it as it was trained (peft_type, r, lora_alpha, target_modules)."
        yield Finding("error", "adapter-config-missing", str(path), what, [], remedy)
        return {}
    try:
        config = read_object(file)
    except (BadFile, ValueError) as error:
        remedy = "Fetch it again, or mend it at the place that is named."
        yield Finding("error", "adapter-config-damaged", str(file), str(error), [], remedy)
        return {}
    if config.get("peft_type") != "LORA":
        what = f"It is an adapter of type {config.get('peft_type')}; only LORA adapters can be merged."
        remedy = "Use it with PEFT as it is, or set peft_type to LORA if that is what it is."
        yield Finding("error", "not-lora", str(file), what, [], remedy)
        return config
    yield from _fields(file, config)
    yield from _trained_as(path, config)
    try:
        check_mergeable(load(path.name, path))
    except BadFile as error:
        said = str(error).removeprefix(f"{file}: ")
        if "cannot be merged" in said or "initialised with" in said:
            remedy = "Use it with PEFT as it is, or convert it to plain LoRA."
            yield Finding("warning", "not-mergeable", str(file), f"To be merged, {said}", [], remedy)
        elif said != str(error) and "manifest" not in said:
            remedy = "Write the values that the adapter was trained with."
            yield Finding("error", "adapter-config-wrong", str(file), said[0].upper() + said[1:], [], remedy)
    return config


def _fields(file: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """What adapter_config.json leaves out, which PEFT fills in with something else than what was trained."""
    lost = [name for name in ("r", "lora_alpha") if name not in config]
    if lost:
        what = f"adapter_config.json does not say {' or '.join(lost)}; PEFT then takes 8."
        remedy = "Write the value that the adapter was trained with."
        yield Finding("warning", "rank-or-alpha-missing", str(file), what, [], remedy)
    if config.get("lora_alpha") == 0:
        what = "lora_alpha is 0: the adapter adds nothing."
        remedy = "Write the alpha that it was trained with (often 2 or 4 times r)."
        yield Finding("error", "alpha-zero", str(file), what, [], remedy)
    base = config.get("base_model_name_or_path")
    if not base:
        what = "adapter_config.json does not name the base (base_model_name_or_path)."
        remedy = "Write the directory or the hub id of the model that it was trained on."
        yield Finding("warning", "base-not-named", str(file), what, [], remedy)
    elif not is_hub_id(str(base)) and not Path(str(base)).exists():
        what = f"The base that adapter_config.json names, {base}, is not here."
        remedy = "Give the base to the tools yourself (--base), or write where it lies here."
        yield Finding("note", "base-not-here", str(file), what, [], remedy)


def _trained_as(path: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """Rank and alpha against the settings of the training in the manifest."""
    manifest = manifest_of(path)
    settings = manifest.settings if manifest else {}
    for key in ("r", "lora_alpha"):
        then = settings.get("lora_r" if key == "r" else key)
        if then is not None and key in config and config[key] != then:
            what = f"adapter_config.json says {key} {config[key]}, and it was trained with {then} (its manifest)."
            remedy = f'Set "{key}": {then} in adapter_config.json.'
            yield Finding(
                "error", "rank-or-alpha-changed", str(path / "adapter_config.json"), what, [], remedy
            )


# --- tensors against adapter_config.json


def _tensors(path: Path, config: dict[str, Any], source: Readable) -> Generator[Finding, None, Tensors]:
    """Findings about single tensors; returns those that can be merged."""
    file = next(iter(source.files.values()))
    try:
        adapter = load(path.name, path)
    except (*UNREADABLE, StopIteration):
        rank = next(iter(_ranks(source).values()), 1)  # told already; go on with what the tensors say
        adapter = Adapter(path.name, path, {**config, "r": rank, "lora_alpha": 1}, None)
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
    empty = {_module(key) for key in source if 0 in source.meta(key)[0]}
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
        what = f"{len(lines):,} tensors do not agree with adapter_config.json, or cannot be merged."
        yield Finding("error", check, str(file.file), what, some(lines), remedy or _rank_remedy(source))
    return found


def _about(error: Exception) -> str:
    return next(sign for sign in TOLD if sign in str(error))


def _short(error: Exception) -> str:
    return re.sub(r"^\S+: ", "", str(error))


def _module(key: str) -> str:
    match = LORA.fullmatch(key.removeprefix(PREFIX))
    return match[1] if match else ""


def _ranks(source: Readable) -> dict[str, int]:
    """The rank of each module, by its lora_A."""
    found = {}
    for key in source:
        match = LORA.fullmatch(key.removeprefix(PREFIX))
        if match and match[3] == "A" and source.meta(key)[0]:
            found[match[1]] = source.meta(key)[0][0]
    return found


def _rank_remedy(source: Readable) -> str:
    ranks = _ranks(source)
    if len(set(ranks.values())) == 1:
        rank = next(iter(ranks.values()))
        return f'Set "r": {rank} in adapter_config.json (all pairs have it); check lora_alpha too, for alpha / r scales them.'
    return "Write the ranks that differ from r into rank_pattern (a name or pattern of modules to a rank)."


def _against_config(path: Path, config: dict[str, Any], source: Readable) -> Iterator[Finding]:
    """What adapter_config.json lists and the file does not have, and the other way round."""
    file = str(path / "adapter_config.json")
    modules = {name for key in source if (name := _module(key))}
    saved = {
        match[1]
        for key in source
        if (match := SAVED.fullmatch(key.removeprefix(PREFIX))) and "lora_" not in key
    }
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        yield from _pattern(file, targets, modules)
    if isinstance(targets, list):
        yield from _targets(file, [str(target) for target in targets], modules, config)
    lost = [name for name in _names(config.get("modules_to_save")) if not any(map(_ends(name), saved))]
    if lost:
        what = f"modules_to_save names {', '.join(lost)}, and the file has no such matrix: what was trained of it is lost."
        remedy = "Take a checkpoint of the run that has it (pytorch_model.bin of the checkpoint), and save the adapter from that."
        yield Finding("error", "saved-module-missing", file, what, some(sorted(saved)), remedy)
    named = [*_names(config.get("modules_to_save")), "embed_tokens", "lm_head"]
    if config.get("trainable_token_indices") and not any(map(TOKENS.fullmatch, source)):
        what = "adapter_config.json lists trainable_token_indices, and the file has no rows for them."
        yield Finding("error", "saved-module-missing", file, what, [], TRAIN)
    more = sorted(name for name in saved if not any(_ends(one)(name) for one in named))
    if more:
        what = f"The file holds {len(more):,} whole weights besides LoRA that modules_to_save does not name."
        remedy = "It may be a whole checkpoint under the name of an adapter: save the adapter alone (save_pretrained)."
        yield Finding("warning", "whole-weights-inside", file, what, some(more), remedy)
    both = [config.get("rank_pattern"), config.get("alpha_pattern")]
    patterns = [str(pattern) for each in both if isinstance(each, dict) for pattern in each]
    idle = [p for p in dict.fromkeys(patterns) if modules and not any(_fits(p, name) for name in modules)]
    if idle:
        what = "rank_pattern or alpha_pattern has patterns that no module of the adapter matches."
        remedy = "Write the names as target_modules has them; the values do not hold for anything now."
        yield Finding("warning", "pattern-without-module", file, what, some(idle), remedy)


def _names(listed: Any) -> list[str]:
    return [str(name) for name in listed] if isinstance(listed, list) else []


def _ends(module: str) -> Callable[[str], bool]:
    """Whether a name is that of a module given by the end of its name."""
    return lambda name: f".{name}".endswith(f".{module}")


def _fits(pattern: str, module: str) -> bool:
    with contextlib.suppress(re.error):
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    return True  # told as a damaged config


def _pattern(file: str, pattern: str, modules: set[str]) -> Iterator[Finding]:
    with contextlib.suppress(re.error):
        if modules and not any(re.fullmatch(pattern, name) for name in modules):
            what = f"target_modules, {pattern!r}, matches none of the modules that the file has tensors for."
            remedy = 'Write the modules that were trained; a plain name goes into a list: ["q_proj"].'
            yield Finding("error", "target-without-tensors", file, what, some(sorted(modules)), remedy)


def _targets(file: str, targets: list[str], modules: set[str], config: dict[str, Any]) -> Iterator[Finding]:
    lost = [target for target in targets if not any(map(_ends(target), modules))]
    some_layers = any(config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    layers = {match[1] for name in modules if (match := LAYERS.search(name))}
    if not some_layers:
        for target in [one for one in targets if one not in lost and not re.search(r"(^|\.)\d+\.", one)]:
            here = {m[1] for name in modules if _ends(target)(name) and (m := LAYERS.search(name))}
            lost += [f"{target} of layer {layer}" for layer in sorted(layers - here, key=int) if here]
    if lost:
        what = "The file has no tensors for modules that target_modules lists; it is not whole, or of another save."
        yield Finding("error", "target-without-tensors", file, what, some(lost), TRAIN)
    if targets:
        more = sorted(name for name in modules if not any(_ends(target)(name) for target in targets))
        if more:
            what = f"The file has tensors for {len(more):,} modules that target_modules does not list; PEFT leaves them out without a word."
            remedy = f"Add {', '.join(sorted({name.rpartition('.')[2] for name in more}))} to target_modules."
            yield Finding("error", "tensors-without-target", file, what, some(more), remedy)


# --- numbers, vocabulary


def _numbers(thing: Thing, found: Tensors, source: Readable) -> Iterator[Finding]:
    rows = {name: key for name in (EMBED, HEAD) for key in [found.matrices.get(name)] if key}
    single = {name: key for name, (_, key) in found.rows.items()}
    numbers, lost = measure(
        source, list(source), [*rows.values(), *single.values()], f"reading {thing.path.name}"
    )
    yield from lost
    lora = {key: one for key, one in numbers.items() if _module(key)}
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
    sides = {side: {_module(key): one for key, one in lora.items() if _side(key) == side} for side in "AB"}
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
    match = LORA.fullmatch(key.removeprefix(PREFIX))
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
