"""What lies beside merged weights: tokenizer, config.json, generation_config.json, model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import read_manifest
from chinese_llama.convert.params import KEPT
from chinese_llama.directories import write_text
from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.merging.plan import Adapter, Step
from chinese_llama.model.resize import copy_other_files, copy_tokenizer
from chinese_llama.model.shards import Model, Weights, read_json
from chinese_llama.vocab.proto import read_model

SPECIAL = ("bos_token", "eos_token", "pad_token")
MOST_PADDING = 4096  # rows; DeepSeek's 100,015 pieces are on 102,400


def tokenizer_of(base: Path, adapters: Sequence[Adapter]) -> Path | None:
    """Where the result's tokenizer lies: beside the last adapter that brings one, else beside the base."""
    own = base if any((base / name).is_file() for name in ("tokenizer.model", "tokenizer.json")) else None
    return next((adapter.tokenizer for adapter in reversed(adapters) if adapter.tokenizer), own)


def pieces_of(tokenizer: Path) -> dict[str, int]:
    """The ids of all pieces of the tokenizer in a directory, added tokens among them. Raises BadFile."""
    if (tokenizer / "tokenizer.json").is_file():
        content = read_json(tokenizer / "tokenizer.json")
        try:
            known = content["model"]["vocab"]
            vocabulary = (
                {row[0]: i for i, row in enumerate(known)} if isinstance(known, list) else dict(known)
            )
            vocabulary |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadFile(tokenizer / "tokenizer.json", "is no tokenizer: it has no vocabulary.") from error
        return vocabulary
    return {p.piece: i for i, p in enumerate(read_model(tokenizer / "tokenizer.model").pieces)}


def check_tokenizer(tokenizer: Path, rows: int, what: str, padded: int | None = None) -> int:
    """The number of pieces of a tokenizer that belongs to a vocabulary of `rows` rows (of `what`), which
    `padded` pieces are known to be on. Raises DoesNotFit where it does not: 49,953 pieces on 49,954 rows run,
    and babble."""
    known = pieces_of(tokenizer)
    added = tokenizer / "added_tokens.json"
    more = [name for name in (read_json(added) if added.is_file() else {}) if name not in known]
    if more:
        raise DoesNotFit(
            f"{added} adds {more[0]!r}, which {tokenizer}/tokenizer.model does not have, and there is no tokenizer.json "
            "with both; put the tokenizer that the adapter was trained with there, as tokenizer.json."
        )
    pieces = max(known.values(), default=-1) + 1
    likely = rows % 8 == 0 and rows - pieces < MOST_PADDING  # rows are rounded up in eights at least
    if pieces > rows or (pieces < rows and pieces != padded and not likely):
        raise DoesNotFit(
            f"The tokenizer in {tokenizer} has {pieces:,} pieces, {what} {rows:,} rows: it is the tokenizer of "
            "something else; put the one that belongs to these rows in its place."
        )
    return pieces


def write_belongings(
    base: Path, source: Model, tokenizer: Path | None, rows: int, dtype: str | None, directory: Path
) -> None:
    """Write everything but weights, card and manifest into `directory`, for a base in `base`."""
    if isinstance(source, Weights):
        copy_other_files(base, directory)
    if tokenizer:
        copy_tokenizer(tokenizer, directory)
    ids = _special_ids(directory)
    config = {**source.config(), "vocab_size": rows}
    config |= _agreeing(config, ids)
    if dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
    file = directory / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    settings |= _agreeing(settings, ids | _ends(directory, tokenizer))
    if settings:
        write_text(file, json.dumps(settings, indent=2) + "\n")


def kept_settings(source: Model, directory: Path) -> dict[str, Any]:
    """What Meta's form cannot say of a merged model in `directory`, for the way back (see `MetaWeights.config`)."""
    config = source.config() | _special_ids(directory)
    return {name: config[name] for name in KEPT if config.get(name) is not None}


def _special_ids(directory: Path) -> dict[str, int]:
    """bos_token_id, eos_token_id, pad_token_id of the tokenizer in `directory`."""
    file = directory / "tokenizer_config.json"
    names = read_json(file) if file.is_file() else {}
    pieces = pieces_of(directory) if names else {}
    found = {}
    for role in SPECIAL:
        name = names.get(role)
        name = name.get("content") if isinstance(name, dict) else name
        if name in pieces:
            found[f"{role}_id"] = pieces[name]
    return found


def _agreeing(settings: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    """The ids, but a list of several (Llama 3's and Qwen's eos) as it is, where they are among them."""
    found = dict(ids)
    for name, wanted in ids.items():
        several = settings.get(name)
        if isinstance(several, list) and {*(wanted if isinstance(wanted, list) else [wanted])} <= {*several}:
            found[name] = several
    return found


def _ends(directory: Path, tokenizer: Path | None) -> dict[str, Any]:
    """Which tokens end an answer of a model with a chat template, for other programs; as the manifest beside
    the `tokenizer` says, else found by rendering the template, for which transformers is needed."""
    template = directory / "chat_template.jinja"
    if not template.is_file():
        return {}
    manifest = read_manifest(tokenizer) if tokenizer and tokenizer.is_dir() else None
    ends = manifest.metrics.get("stop_ids") if manifest else None
    if ends is None:
        from chinese_llama.data.templates import stop_ids
        from chinese_llama.model.load import load_tokenizer

        try:
            ends = stop_ids(load_tokenizer(directory), template.read_text(encoding="utf-8"))
        except UserError:  # not one of ours; what the tokenizer and the base say then stays
            return {}
    return {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def card(base: Path, steps: Sequence[Step], figures: str) -> str:
    """The model card (README.md)."""
    lines = [f"# {base.name} + {' + '.join(a.name for step in steps for a in step.adapters)}", ""]
    lines += ["Merged by `chinese-llama merge` from, in this order:", "", f"- base `{base}`"]
    for step in steps:
        together = f", combined by {step.method}" if len(step.adapters) > 1 else ""
        for adapter in step.adapters:
            weight = f", weight {adapter.weight:g}" if adapter.weight != 1 else ""
            rank = f"r={adapter.config.get('r')}, lora_alpha={adapter.config.get('lora_alpha')}"
            lines.append(f"- adapter `{adapter.name}` ({rank}{weight}{together})")
    return "\n".join([*lines, "", figures, "", "Hashes: `chinese_llama.json`.", ""])
