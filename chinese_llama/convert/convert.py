"""The command `convert`: a model's directory in Meta's form or in Hugging Face's, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import (
    Keep,
    Manifest,
    hash_ahead,
    input_record,
    read_manifest,
    stands,
    write_manifest,
)
from chinese_llama.convert.meta import MetaWeights, is_meta, open_model
from chinese_llama.convert.params import KEPT
from chinese_llama.convert.write import ByMeta, save_meta, shard_count
from chinese_llama.directories import check_output, check_space, new_directory, write_text
from chinese_llama.errors import DoesNotFit, UserError, nearest
from chinese_llama.model.resize import copy_tokenizer
from chinese_llama.model.shards import Hashes, Model, Weights, save_shards
from chinese_llama.model.tensors import nbytes
from chinese_llama.progress import say
from chinese_llama.vocab.proto import read_model

COMMAND = "convert"
NAMES = {"hf": "Hugging Face's", "meta": "Meta's"}


def convert(
    source: Path,
    output: Path,
    to: str,
    origin: str | None = None,
    shards: int | None = None,
    context: int | None = None,
    force: bool = False,
) -> Manifest:
    """`to_hf` or `to_meta`, by `to` ("hf", "meta"); `origin` is what `source` must be, if given. Raises UserError
    for another form, and for options that belong to the other direction."""
    for option, value in (("--from", origin), ("--to", to)):
        if value is not None and value not in NAMES:
            raise UserError(f"{option} {value!r}{nearest(value, NAMES)}; one of {', '.join(NAMES)}.")
    found = "meta" if is_meta(source) else "hf"
    if origin and origin != found:
        raise UserError(f"{source} is not in {NAMES[origin]} form, but in {NAMES[found]}: --from {found}.")
    if to == "hf" and found == "hf":
        Weights(source)  # or it is no model at all
        raise UserError(f"{source} is in {NAMES[found]} form already.")
    if to == "hf" and shards:
        raise UserError("--shards is for --to meta.")
    if to == "meta" and context:
        raise UserError("--context is for --to hf; Meta's form does not say it.")
    return to_hf(source, output, context, force) if to == "hf" else to_meta(source, output, shards, force)


def to_hf(
    source: Path, output: Path, context: int | None = None, force: bool = False, keep: Keep = False
) -> Manifest:
    """Write the checkpoint of Meta's in `source` to `output` as a Hugging Face model; return its manifest.

    `context` is the `max_position_embeddings` to say (None: as published). The manifest keeps what only
    Meta's form has, so that `to_meta` makes the same files of it, or of what is merged from it.

    Raises BadFile and DoesNotFit for what is in `source`, UserError where there is no space.
    """
    if context is not None and context < 1:
        raise UserError(f"--context {context}: must be at least 1.")
    model = MetaWeights(source, context)
    config, tokenizer = model.config(), model.tokenizer
    settings = {"to": "hf", "context": config["max_position_embeddings"], "meta": model.layout()}

    def write(target: Path) -> Hashes:
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(target / "generation_config.json", json.dumps(ids, indent=2) + "\n")
        return save_shards(model, target, "converting")

    return _converted(source, output, tokenizer, settings, model, write, force, keep)


def to_meta(
    source: Path, output: Path, shards: int | None = None, force: bool = False, keep: Keep = False
) -> Manifest:
    """Write the model in `source` to `output` in Meta's form; return its manifest.

    `shards` defaults to what the checkpoint had that the model came from, or the published one of its
    size. A checkpoint in Meta's form can be given too: it is divided anew.

    Raises BadFile and DoesNotFit for what is in `source`, UserError where there is no space.
    """
    model = open_model(source)
    like, tokenizer = layout_of(source, model), _tokenizer(source, model)
    named, config = ByMeta(model, like), model.config()
    count = shard_count(named, shards, like)
    kept = {name: config[name] for name in KEPT if config.get(name) is not None}
    settings = {"to": "meta", "shards": count, "hf": kept}

    def write(target: Path) -> Hashes:
        return save_meta(model, target, count, like=like)

    return _converted(source, output, tokenizer, settings, named, write, force, keep)


def _converted(
    source: Path,
    output: Path,
    tokenizer: Path | None,
    settings: dict[str, Any],
    model: Model,
    write: Callable[[Path], Hashes],
    force: bool,
    keep: Keep,
) -> Manifest:
    """Make `output` of what `write` writes and the tokenizer; `source` is hashed meanwhile."""
    if keep:
        wanted = _manifest(source, tokenizer, settings, model)
        if stands(output, wanted, force, keep):
            return read_manifest(output) or wanted
    check_output(output, force)
    check_space(output, _bytes(model))
    hash_ahead([source])
    with new_directory(output, force, [source]) as partial:
        if tokenizer:
            copy_tokenizer(tokenizer, partial)
        else:
            say(f"{source} has no tokenizer.model; the weights are converted without a tokenizer.")
        known = write(partial)
        return write_manifest(partial, _manifest(source, tokenizer, settings, model), known)


def layout_of(source: Path, model: Model) -> dict[str, Any] | None:
    """The layout of the checkpoint in Meta's form that a model came from (see `MetaWeights.layout`): its
    own, or what its manifest keeps; None where there was none."""
    if isinstance(model, MetaWeights):
        return model.layout()
    manifest = read_manifest(source)
    return manifest.settings.get("meta") if manifest else None


def _manifest(source: Path, tokenizer: Path | None, settings: dict[str, Any], model: Model) -> Manifest:
    inputs = {"base": input_record(source)}
    if tokenizer and tokenizer.parent.resolve() != Path(source).resolve():
        inputs["tokenizer"] = input_record(tokenizer)
    rows = model.config()["vocab_size"]
    return Manifest(
        "model",
        COMMAND,
        inputs=inputs,
        settings=settings,
        vocab_size=len(read_model(tokenizer).pieces) if tokenizer else rows,
        metrics={"rows": rows, "tensors": len(list(model)), "bytes": _bytes(model)},
    )


def _bytes(model: Model) -> int:
    return sum(nbytes(*model.meta(name)) for name in model)


def _tokenizer(source: Path, model: Model) -> Path | None:
    """tokenizer.model of a model that is to be written in Meta's form, which knows no other tokenizers."""
    if isinstance(model, MetaWeights):
        return model.tokenizer
    if (source / "tokenizer.model").is_file():
        return source / "tokenizer.model"
    if (source / "tokenizer.json").is_file():
        raise DoesNotFit(
            f"{source} has no tokenizer.model; Meta's code reads no tokenizer.json, put it there."
        )
    return None
