"""What is wrong with an adapter_config.json, by itself and against the tensors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from chinese_llama.doctor.finding import Finding, listing, some
from chinese_llama.doctor.raw import json_object
from chinese_llama.doctor.tensors import Readable
from chinese_llama.doctor.things import manifest_of
from chinese_llama.errors import BadFile
from chinese_llama.hub import is_hub_id
from chinese_llama.merging.adapter import check_mergeable, load
from chinese_llama.model.adapters import LORA, PREFIX, SAVED, TOKENS

LAYERS = re.compile(r"\.layers\.(\d+)\.")
USUAL = 32.0  # alpha / r is between this and its inverse, wherever people publish adapters
TRAIN = "Copy adapter_config.json and adapter_model.* again from one save; if there is no other, train the adapter again."


def check_config(path: Path) -> Generator[Finding, None, dict[str, Any]]:
    """Findings about adapter_config.json; returns what it holds."""
    file = path / "adapter_config.json"
    if not file.is_file():
        what = "There is no adapter_config.json: rank, alpha and targets are not known."
        remedy = "Fetch it from where the adapter comes from, or write it as it was trained (peft_type, r, lora_alpha, target_modules)."
        yield Finding("error", "adapter-config-missing", str(path), what, listing(path), remedy)
        return {}
    found: list[Finding] = []
    config = json_object(file, found)
    yield from found
    if found:
        return {}
    if config.get("peft_type") != "LORA":
        what = f"It is an adapter of type {config.get('peft_type')}; only LORA adapters can be merged."
        remedy = "Use it with PEFT as it is, or set peft_type to LORA if that is what it is."
        yield Finding(
            "error", "not-lora", str(file), what, [f"peft_type: {config.get('peft_type')!r}"], remedy
        )
        return config
    yield from _fields(file, config)
    yield from _trained_as(path, config)
    try:
        check_mergeable(load(path.name, path))
    except BadFile as error:
        said = str(error).removeprefix(f"{file}: ")
        if "cannot be merged" in said or "initialised with" in said:
            remedy = "Use it with PEFT as it is, or convert it to plain LoRA."
            yield Finding(
                "warning",
                "not-mergeable",
                str(file),
                f"To be merged, {said}",
                _said(config, f"init_lora_weights {said}"),
                remedy,
            )
        elif said != str(error) and "manifest" not in said:
            remedy = "Write the values that the adapter was trained with."
            yield Finding(
                "error",
                "adapter-config-wrong",
                str(file),
                f"In adapter_config.json, {said}",
                _said(config, said),
                remedy,
            )
    return config


def _said(config: dict[str, Any], told: str) -> list[str]:
    """The fields that a sentence speaks of, as they are."""
    lines = [f"{name}: {value!r}"[:200] for name, value in config.items() if re.search(rf"\b{name}\b", told)]
    return lines or ["adapter_config.json: " + ", ".join(map(str, config))[:200]]


def _fields(file: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """What adapter_config.json leaves out, which PEFT fills in with something else than what was trained."""
    lost = [name for name in ("r", "lora_alpha") if name not in config]
    if lost:
        what = f"adapter_config.json does not say {' or '.join(lost)}; PEFT then takes 8."
        remedy = "Write the value that the adapter was trained with."
        yield Finding(
            "warning",
            "rank-or-alpha-missing",
            str(file),
            what,
            [f"{name}: not said" for name in lost],
            remedy,
        )
    if config.get("lora_alpha") == 0:
        what = "lora_alpha is 0: the adapter adds nothing."
        remedy = "Write the alpha that it was trained with (often 2 or 4 times r)."
        yield Finding("error", "alpha-zero", str(file), what, _said(config, what), remedy)
    yield from _alpha(file, config)
    base = config.get("base_model_name_or_path")
    if not base:
        what = "adapter_config.json does not name the base (base_model_name_or_path)."
        remedy = "Write the directory or the hub id of the model that it was trained on."
        yield Finding(
            "warning", "base-not-named", str(file), what, [f"base_model_name_or_path: {base!r}"], remedy
        )
    elif not is_hub_id(str(base)) and not Path(str(base)).exists():
        what = f"The base that adapter_config.json names, {base}, is not here."
        remedy = "Give the base to the tools yourself (--base), or write where it lies here."
        yield Finding("note", "base-not-here", str(file), what, [], remedy)


def _alpha(file: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """An alpha that nobody trains with. The tensors do not tell it: only its size can."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and isinstance(alpha, (int, float)) and rank > 0 and alpha > 0):
        return
    times = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if not 1 / USUAL <= times <= USUAL:
        what = f"lora_alpha {alpha:g} with r {rank} multiplies what was trained by {times:,.4g}; usual is 1 to 4."
        remedy = "Write the lora_alpha that it was trained with: the tensors do not tell it, the training's settings do."
        yield Finding("warning", "alpha-unusual", str(file), what, [f"alpha / r = {times:,.4g}"], remedy)


def _trained_as(path: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """Rank and alpha against the settings of the training in the manifest."""
    manifest = manifest_of(path)
    settings = manifest.settings if manifest else {}
    for key in ("r", "lora_alpha"):
        then = settings.get("lora_r" if key == "r" else key)
        if then is not None and key in config and config[key] != then:
            what = f"adapter_config.json says {key} {config[key]}, and it was trained with {then} (its manifest)."
            remedy = f'Set "{key}": {then} in adapter_config.json.'
            lines = [f"adapter_config.json: {config[key]}", f"chinese_llama.json: {then}"]
            yield Finding(
                "error", "rank-or-alpha-changed", str(path / "adapter_config.json"), what, lines, remedy
            )


# --- against the tensors


def module_of(key: str) -> str:
    """The module that a LoRA tensor is for, "" for other tensors."""
    match = LORA.fullmatch(key.removeprefix(PREFIX))
    return match[1] if match else ""


def check_against(path: Path, config: dict[str, Any], source: Readable) -> Iterator[Finding]:
    """What adapter_config.json lists and the file does not have, and the other way round."""
    file = str(path / "adapter_config.json")
    modules = {name for key in source if (name := module_of(key))}
    saved = {
        match[1]
        for key in source
        if (match := SAVED.fullmatch(key.removeprefix(PREFIX)))
        and "lora_" not in key
        and ".original_module." not in key  # PEFT saves what was there before, too, of rows that were grown
    }
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        yield from _pattern(file, targets, modules)
    if isinstance(targets, list):
        yield from _targets(file, [str(target) for target in targets], modules, config)
    lost = [name for name in _names(config.get("modules_to_save")) if not any(map(_ends(name), saved))]
    if lost:
        what = f"modules_to_save names {', '.join(lost)}, and the file has no such matrix: what was trained of it is lost."
        lines = some(sorted(saved)) or ["the file holds LoRA pairs only"]
        remedy = "Take a checkpoint of the run that has it (pytorch_model.bin of the checkpoint), and save the adapter from that."
        yield Finding("error", "saved-module-missing", file, what, lines, remedy)
    named = [*_names(config.get("modules_to_save")), "embed_tokens", "lm_head"]
    if config.get("trainable_token_indices") and not any(map(TOKENS.fullmatch, source)):
        what = "adapter_config.json lists trainable_token_indices, and the file has no rows for them."
        yield Finding("error", "saved-module-missing", file, what, _said(config, what), TRAIN)
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
