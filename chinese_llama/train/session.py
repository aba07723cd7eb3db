"""One training run: the model and its LoRA, the trainer, stopping and resuming, saving the adapter.

A run works in `<output_dir>.run` (checkpoints, packed data, log). The same command given again goes
on from the last checkpoint; the adapter appears in `output_dir` whole, when training is over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint

from chinese_llama.artifacts import (
    Manifest,
    identity,
    input_record,
    read_manifest,
    sha256_file,
    stands,
    write_manifest,
)
from chinese_llama.data.formats import corpus_files
from chinese_llama.data.mixture import Source, dataset, sources
from chinese_llama.directories import check_apart, check_output, new_directory, write_text
from chinese_llama.errors import DoesNotFit, Interrupted, UserError
from chinese_llama.merging.plan import Adapter, check_lineage, resolve
from chinese_llama.model.adapters import bake, merged_changes, read_tensors
from chinese_llama.model.load import check_pair, first_new_id, load_model, load_tokenizer, resolve_dtype
from chinese_llama.model.lora import add_lora, lora_config
from chinese_llama.model.resize import copy_tokenizer, save_chat_template
from chinese_llama.model.shards import EMBED, Weights
from chinese_llama.progress import say
from chinese_llama.train.callbacks import LOG, Bar, JsonLog, StopOnSignal
from chinese_llama.train.fields import Recipe, training_arguments

Blocks = Callable[[Any, Path], Iterable[dict[str, list[int]]]]


class VocabularyTrainer(Trainer):
    """The Trainer, without weight decay on rows of the vocabulary: a piece that a batch does not
    hold would shrink."""

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        matrices = ("trainable_tokens", "embed_tokens", "lm_head")
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not any(matrix in name for matrix in matrices)]


def run(recipe: Recipe[Any], length: int, blocks: Blocks, settings: dict[str, Any]) -> Manifest:
    """Train the recipe and write its adapter; return the adapter's manifest.

    `length` is the block size in tokens; `blocks(tokenizer, path)` packs one source; `settings` are
    the template and the like, for the manifest. Raises UserError; Interrupted when stopped.
    """
    fields = recipe.fields
    output = Path(fields.output_dir)
    adapters = [resolve(name, recipe.workspace) for name in fields.adapters]
    found = sources(fields.data)
    _settle_dtype(recipe)
    manifest = _manifest(recipe, found, adapters, settings)
    check_apart(output, manifest.places())
    if recipe.keep and stands(output, manifest, fields.force):
        say(f"{recipe.name}: {output} stands; --force trains it again.")
        return read_manifest(output) or manifest
    check_output(output, fields.force)
    directory = _run_directory(output, manifest, fields.force)
    try:
        _run(recipe, adapters, found, manifest, directory, length, blocks)
    except BaseException:
        if not _last_checkpoint(directory):
            shutil.rmtree(directory, ignore_errors=True)  # nothing to go on from
        raise
    return manifest


def _run(
    recipe: Recipe[Any],
    adapters: list[Adapter],
    found: list[Source],
    manifest: Manifest,
    directory: Path,
    length: int,
    blocks: Blocks,
) -> None:
    arguments = training_arguments(recipe, directory)
    set_seed(arguments.seed)
    tokenizer, model = _model(recipe, adapters, length)
    with arguments.main_process_first(desc="packing"):
        say(f"{recipe.name}: packing {', '.join(str(source.path) for source in found)}")
        packed = _Packer(tokenizer, blocks)
        data = dataset(found, packed, directory / "data", arguments.data_seed or arguments.seed)
    log = JsonLog(directory / LOG, length)
    trainer = _trainer(recipe.name, model, arguments, data, log)
    _train(trainer, directory, recipe.name)
    manifest.metrics = _metrics(trainer, data, length, model)
    if trainer.is_world_process_zero():
        _save(trainer, model, recipe, manifest, directory)
        shutil.rmtree(directory, ignore_errors=True)
        made = manifest.metrics
        losses = f"loss {made['first_loss']:.3f} -> {made['last_loss']:.3f}" if made["first_loss"] else "done"
        print(f"{recipe.fields.output_dir}: {made['steps']:,} steps, {losses}.", flush=True)


def _settle_dtype(recipe: Recipe[Any]) -> None:
    """Make `dtype` definite; a step in half precision runs under autocast, for what trains is float32."""
    fields, training = recipe.fields, recipe.training
    if fields.dtype == "auto":
        asked = "float16" if training.get("fp16") else "bfloat16" if training.get("bf16") else None
        fields.dtype = asked or ("float32" if training.get("use_cpu") else resolve_dtype("auto"))
    switch = {"bfloat16": "bf16", "float16": "fp16"}.get(fields.dtype)
    if switch and not (training.get("bf16") or training.get("fp16")):
        training[switch] = True


class _Packer:
    """`blocks` bound to a tokenizer; hashing it for the data cache does not look inside."""

    def __init__(self, tokenizer: Any, blocks: Blocks) -> None:
        self.tokenizer, self.blocks = tokenizer, blocks

    def __call__(self, path: Path) -> Iterable[dict[str, list[int]]]:
        return self.blocks(self.tokenizer, path)


def _manifest(
    recipe: Recipe[Any], found: list[Source], adapters: list[Adapter], settings: dict[str, Any]
) -> Manifest:
    fields = recipe.fields
    base = Path(fields.model_name_or_path)
    tokenizer = Path(fields.tokenizer_name_or_path or fields.model_name_or_path)
    inputs = {"base": input_record(base)}
    inputs["tokenizer"] = {"path": str(tokenizer), "sha256": _tokenizer_digest(tokenizer)}
    for number, adapter in enumerate(adapters):
        inputs[f"parent:{number}"] = {"path": str(adapter.path), "sha256": identity(adapter.path)}
    for number, source in enumerate(found):
        inputs[f"data:{number}"] = {"path": str(source.path), "sha256": _data_digest(source.path)}
    places = ("model_name_or_path", "tokenizer_name_or_path", "data", "output_dir", "adapters", "force")
    ours = {k: v for k, v in dataclasses.asdict(fields).items() if k not in places}
    weights = {"weights": [source.weight for source in found]}
    return Manifest("adapter", recipe.name, inputs, {**ours, **weights, **recipe.training, **settings})


def _tokenizer_digest(directory: Path) -> str:
    files = [directory / name for name in ("tokenizer.model", "tokenizer.json")]
    found = [sha256_file(file) for file in files if file.is_file()]
    return found[0] if found else ""


def _data_digest(path: Path) -> str:
    lines = "".join(f"{file.name} {sha256_file(file)}\n" for file in corpus_files(path))
    return hashlib.sha256(lines.encode()).hexdigest()


def _run_directory(output: Path, manifest: Manifest, force: bool) -> Path:
    """`<output>.run`, new or of the same run. Another run that was left there is removed if it has no
    checkpoint or `force` says so; else raises UserError."""
    directory = output.with_name(output.name + ".run")
    what = {"inputs": {r: v["sha256"] for r, v in manifest.inputs.items()}, "settings": manifest.settings}
    text = json.dumps(what, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    record = directory / "run.json"
    if directory.is_dir() and not (record.is_file() and record.read_text(encoding="utf-8") == text):
        if _last_checkpoint(directory) and not force:
            raise UserError(
                f"{directory} holds an unfinished run with other inputs or settings; finish that one with "
                "the same command, or start anew with --force true."
            )
        shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror}); give a writable output."
        ) from error
    write_text(record, text)
    return directory


def _last_checkpoint(directory: Path) -> str | None:
    """The newest complete checkpoint: the trainer writes its state last. Cut ones are removed."""
    while directory.is_dir() and (found := get_last_checkpoint(str(directory))):
        if (Path(found) / "trainer_state.json").is_file():
            return found
        shutil.rmtree(found)
    return None


def _model(recipe: Recipe[Any], adapters: list[Adapter], length: int) -> tuple[Any, Any]:
    """The tokenizer, and the base with `adapters` baked in and a fresh LoRA on top."""
    fields = recipe.fields
    place = fields.model_name_or_path
    tokenizer = load_tokenizer(fields.tokenizer_name_or_path or place)
    pairs = [(adapter, read_tensors(adapter)) for adapter in adapters]
    if pairs:
        check_lineage(Path(place), adapters)
        changes = merged_changes(source := Weights(Path(place)), pairs)
        if EMBED in changes and changes[EMBED].shape != source.meta(EMBED)[0]:
            raise DoesNotFit(
                f"The adapters below bring {changes[EMBED].shape[0]:,} vocabulary rows, {place} has "
                f"{source.meta(EMBED)[0][0]:,}; merge them first (chinese-llama merge) and train on the result."
            )
    model = load_model(place, fields.dtype)
    check_pair(model, tokenizer, place)
    limit = model.config.max_position_embeddings
    if length > limit:
        raise DoesNotFit(f"A block of {length} tokens is longer than the model's limit of {limit}.")
    bake(model, pairs)
    model.config.use_cache = False
    first = first_new_id(place, fields.tokenizer_name_or_path or place)
    new_ids = list(range(first, len(tokenizer))) if first is not None else []
    config = lora_config(
        model,
        fields.lora_r,
        fields.lora_alpha,
        fields.lora_dropout,
        fields.lora_target_modules,
        fields.embeddings,
        new_ids,
    )
    return tokenizer, add_lora(model, config)


def _trainer(name: str, model: Any, arguments: Any, data: Any, log: JsonLog) -> Trainer:
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    try:
        trainer = VocabularyTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=default_data_collator,
            callbacks=[log, Bar(name)],
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"{name}: {str(error).strip().splitlines()[0]}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _train(trainer: Trainer, directory: Path, name: str) -> None:
    stop = StopOnSignal()
    trainer.add_callback(stop)
    checkpoint = _last_checkpoint(directory)
    if checkpoint:
        say(f"{name}: going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    step, last = trainer.state.global_step, trainer.state.max_steps
    if stop.stopped and step < last:
        raise Interrupted(
            f"Stopped after step {step} of {last}; the checkpoint is in {directory}. The same command goes on."
        )


def _metrics(trainer: Trainer, data: Any, length: int, model: Any) -> dict[str, Any]:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "steps": trainer.state.global_step,
        "blocks": len(data),
        "block_size": length,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "trainable_parameters": trainable,
        "parameters": total,
    }


def _save(trainer: Trainer, model: Any, recipe: Recipe[Any], manifest: Manifest, directory: Path) -> None:
    fields = recipe.fields
    output = Path(fields.output_dir)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(f"{name} is no longer finite; lower learning_rate, or train in float32.")
    with new_directory(output, fields.force, manifest.places()) as partial:
        model.save_pretrained(str(partial), save_embedding_layers=False)
        copy_tokenizer(Path(fields.tokenizer_name_or_path or fields.model_name_or_path), partial)
        if template := manifest.settings.get("chat_template"):
            save_chat_template(partial, template)
        if (directory / LOG).is_file():
            shutil.copyfile(directory / LOG, partial / LOG)
        manifest.vocab_size = model.get_base_model().config.vocab_size
        write_text(partial / "README.md", _card(recipe, manifest))
        write_manifest(partial, manifest)


def _card(recipe: Recipe[Any], manifest: Manifest) -> str:
    metrics = manifest.metrics
    losses = f"loss {metrics['first_loss']} -> {metrics['last_loss']}"
    below = ", ".join(recipe.fields.adapters) or "none"
    lines = [
        "---",
        "library_name: peft",
        "---",
        f"# {Path(recipe.fields.output_dir).name}",
        "",
        f"LoRA adapter made by `{recipe.name}` of chinese_llama.",
        "",
        f"- base: `{recipe.fields.model_name_or_path}`, adapters below: {below}",
        f"- {metrics['steps']} steps of blocks of {metrics['block_size']} tokens, {losses}",
        f"- {metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters trained",
        "",
        "Settings and hashes of everything that it was made from: `chinese_llama.json`.",
        "",
    ]
    return "\n".join(lines)
