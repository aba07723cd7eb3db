"""The course of a run: the model, the data, the trainer, the steps, the adapter."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, set_seed

from chinese_llama.artifacts import Manifest
from chinese_llama.data.mixture import names
from chinese_llama.data.prepare import Job, Prepared, prepare
from chinese_llama.data.templates import stop_ids
from chinese_llama.errors import Interrupted, UserError
from chinese_llama.merging.plan import Adapter
from chinese_llama.model.attention import use_packed
from chinese_llama.model.load import load_tokenizer
from chinese_llama.model.lora import trainable_groups
from chinese_llama.model.shards import read_json
from chinese_llama.progress import say
from chinese_llama.train import dry
from chinese_llama.train.build import build
from chinese_llama.train.callbacks import Bar, JsonLog, StopOnSignal
from chinese_llama.train.checkpoints import last_checkpoint
from chinese_llama.train.collate import Collator
from chinese_llama.train.evaluation import Evaluation, prepare_texts
from chinese_llama.train.fields import Recipe, training_arguments
from chinese_llama.train.jobs import named_sources, prepared_root
from chinese_llama.train.log import LOG
from chinese_llama.train.saving import remember_start, save
from chinese_llama.train.trainer import VocabularyTrainer


def course(
    recipe: Recipe[Any], job: Job, adapters: list[Adapter], manifest: Manifest, directory: Path
) -> None:
    """Train, and save the adapter; `directory` is where the run works. A dry run ends after a step.

    Raises UserError; Interrupted when stopped.
    """
    fields = recipe.fields
    arguments = training_arguments(recipe, directory)
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(fields.tokenizer)
    model = build(recipe, adapters, tokenizer, arguments)
    with arguments.main_process_first(desc="packing"):
        prepared = prepare(job, prepared_root(fields), tokenizer)
    bounds = use_packed(model, arguments.device, fields.dtype)
    trainer, evaluation, stop = _trainer(recipe, model, tokenizer, arguments, prepared, bounds)
    if fields.dry_run:
        dry.run(recipe, trainer, prepared)
        return
    if trainer.is_world_process_zero():  # under FSDP2 the others have no weights yet
        remember_start(model, directory)
    _train(trainer, evaluation, stop, directory, recipe.name)
    manifest.metrics = _metrics(trainer, prepared, model, fields.length)
    if template := manifest.settings.get("chat_template"):
        manifest.metrics["stop_ids"] = stop_ids(tokenizer, template)
    save(trainer, recipe, manifest, directory)
    if trainer.is_world_process_zero():
        shutil.rmtree(directory, ignore_errors=True)
        made = manifest.metrics
        losses = f", loss {made['first_loss']:.3f} -> {made['last_loss']:.3f}" if made["first_loss"] else ""
        print(f"{fields.output_dir}: {made['steps']:,} steps{losses}.", flush=True)


def _trainer(
    recipe: Recipe[Any], model: Any, tokenizer: Any, arguments: Any, prepared: Prepared, bounds: bool
) -> tuple[VocabularyTrainer, Evaluation, StopOnSignal]:
    """The trainer with its callbacks; trackers write beside the output, where they outlive the run."""
    fields = recipe.fields
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    sources = prepared.manifest.metrics["sources"]
    characters = sum(s["characters"] for s in sources) / max(sum(s["tokens"] for s in sources), 1)
    log = JsonLog(Path(arguments.output_dir) / LOG, fields.length, characters)
    across = getattr(fields, "cross_document_attention", False)
    boards = "TENSORBOARD_LOGGING_DIR"
    ours = os.environ.setdefault(boards, kept := f"{fields.output_dir}.tensorboard") == kept
    try:
        trainer = VocabularyTrainer(
            fields,
            names(prepared.sources),
            model=model,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=prepared.dataset(arguments.data_seed or arguments.seed),
            data_collator=Collator(fields.length, tokenizer.eos_token_id, across, bounds),
            callbacks=[log, Bar(recipe.name)],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{recipe.name}: {str(error).strip().splitlines()[0]}") from error
    finally:
        if ours:
            del os.environ[boards]
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    files = prepared.held_out()
    if both := set(files) & set(fields.eval_text):
        raise UserError(
            f"eval_text: {both.pop()!r} is the name of a source whose documents are held out; take another."
        )
    files |= {name: Path(file) for name, file in fields.eval_text.items()}
    texts = prepare_texts(tokenizer, files, fields.length)
    evaluation = Evaluation(trainer, texts, fields.max_regression, fields.on_regression == "stop", log)
    trainer.add_callback(stop := StopOnSignal())  # before the first measuring
    trainer.add_callback(evaluation)
    return trainer, evaluation, stop


def _train(
    trainer: VocabularyTrainer, evaluation: Evaluation, stop: StopOnSignal, directory: Path, name: str
) -> None:
    with trainer.args.main_process_first(desc="looking for checkpoints"):
        checkpoint = last_checkpoint(directory)
    if checkpoint:
        say(f"{name}: going on from {checkpoint}")
        _check_forgetting(
            evaluation, read_json(Path(checkpoint) / "trainer_state.json")["log_history"], directory
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.check()
    step, last = trainer.state.global_step, trainer.state.max_steps
    if stop.stopped and step < last:
        raise Interrupted(
            f"Stopped after step {step} of {last}; the checkpoint is in {directory}. The same command goes on."
        )
    _check_forgetting(evaluation, trainer.state.log_history, directory)


def _check_forgetting(evaluation: Evaluation, history: list[dict[str, Any]], directory: Path) -> None:
    sentence = evaluation.regression(history)
    if evaluation.stop and sentence:
        raise UserError(
            f"Stopped: {sentence} The checkpoint is in {directory}; the same command with another "
            "max_regression, or on_regression: warn, goes on."
        )


def _metrics(trainer: Any, prepared: Prepared, model: Any, length: int) -> dict[str, Any]:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    measured = [entry for entry in history if any(key.startswith("eval/") for key in entry)]
    trainable, total = model.get_nb_trainable_parameters()
    args = trainer.args
    blocks = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "steps": trainer.state.global_step,
        "tokens_per_step": blocks * length,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "trainable_parameters": trainable,
        "parameters": total,
        "groups": trainable_groups(model),
        "sources": named_sources(prepared),
        "measured": {key: value for key, value in (measured or [{}])[-1].items() if key.startswith("eval/")},
    }
