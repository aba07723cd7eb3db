"""One training run, in the order in which it happens: what it is made from, the data, the model, the steps,
the adapter.

A run works in `<output_dir>.run` (checkpoints, log). The same command given again goes on from the last
checkpoint; the adapter appears in `output_dir` whole, when training is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, set_seed

from chinese_llama.artifacts import (
    Asked,
    Manifest,
    identity,
    input_record,
    read_manifest,
    sha256_file,
    stands,
    state_of,
)
from chinese_llama.data.mixture import names
from chinese_llama.data.prepare import Job, Prepared, prepare, source_digest
from chinese_llama.data.templates import stop_ids
from chinese_llama.directories import alone_in, check_apart, check_output, empty, write_text
from chinese_llama.errors import Interrupted, UserError
from chinese_llama.merging.plan import Adapter, resolve
from chinese_llama.model.load import load_tokenizer, resolve_dtype
from chinese_llama.model.lora import trainable_groups
from chinese_llama.model.shards import read_json
from chinese_llama.progress import say
from chinese_llama.train import dry
from chinese_llama.train.build import adopt, build, check_length
from chinese_llama.train.callbacks import LOG, Bar, JsonLog, StopOnSignal
from chinese_llama.train.collate import Collator
from chinese_llama.train.evaluation import Evaluation, prepare_texts
from chinese_llama.train.fields import NEUTRAL, Recipe, training_arguments
from chinese_llama.train.jobs import named_sources, prepared_root
from chinese_llama.train.saving import remember_start, save
from chinese_llama.train.trainer import VocabularyTrainer, last_checkpoint, sealed_checkpoint

RECORD = "run.json"  # in the directory where a run works: what it is


def run(recipe: Recipe[Any], job: Job) -> Manifest:
    """Train the recipe on the data of `job` and write its adapter; return the adapter's manifest.

    Raises UserError; Interrupted when stopped.
    """
    fields = recipe.fields
    output = Path(os.path.abspath(fields.output_dir))
    adapters = [resolve(name, recipe.workspace) for name in fields.adapters]
    check_length(Path(fields.model_name_or_path), fields.length)
    adopt(fields)
    _settle_dtype(recipe)
    manifest = _manifest(recipe, job, adapters)
    if fields.dry_run:
        recipe.training["report_to"] = "none"
        (root := prepared_root(fields)).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".dry-run-") as place:
            _run(recipe, job, adapters, manifest, Path(place))
        return manifest
    if recipe.keep == "ask":
        raise Asked(*_state(output, manifest))
    check_apart(output, manifest.places())
    if recipe.keep and stands(output, manifest, fields.force):
        say(f"{recipe.name}: {output} stands; --force trains it again.")
        return read_manifest(output) or manifest
    check_output(output, fields.force)
    with _run_directory(output, manifest, fields.force) as directory:
        _run(recipe, job, adapters, manifest, directory)
    return manifest


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _run(recipe: Recipe[Any], job: Job, adapters: list[Adapter], manifest: Manifest, directory: Path) -> None:
    fields = recipe.fields
    arguments = training_arguments(recipe, directory)
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(fields.tokenizer)
    model = build(recipe, adapters, tokenizer, arguments)
    with arguments.main_process_first(desc="packing"):
        prepared = prepare(job, prepared_root(fields), tokenizer)
    trainer, evaluation, stop = _trainer(recipe, model, tokenizer, arguments, prepared)
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


def _settle_dtype(recipe: Recipe[Any]) -> None:
    """Make `dtype` definite; a step in half precision runs under autocast, for what trains is float32."""
    fields, training = recipe.fields, recipe.training
    if fields.dtype == "auto":
        asked = "float16" if training.get("fp16") else "bfloat16" if training.get("bf16") else None
        fields.dtype = asked or ("float32" if training.get("use_cpu") else resolve_dtype("auto"))
    switch = {"bfloat16": "bf16", "float16": "fp16"}.get(fields.dtype)
    if switch and not (training.get("bf16") or training.get("fp16")):
        training[switch] = True


def _manifest(recipe: Recipe[Any], job: Job, adapters: list[Adapter]) -> Manifest:
    fields = recipe.fields
    inputs = {"base": input_record(Path(fields.model_name_or_path))}
    tokenizer = Path(fields.tokenizer)
    inputs["tokenizer"] = {"path": str(tokenizer), "sha256": _tokenizer_digest(tokenizer)}
    if fields.init_adapter:
        inputs["adapter"] = input_record(Path(fields.init_adapter))
    for number, adapter in enumerate(adapters):
        inputs[f"parent:{number}"] = {"path": str(adapter.path), "sha256": identity(adapter.path)}
    for number, source in enumerate(job.sources):
        inputs[f"data:{number}"] = {"path": str(source.path), "sha256": source_digest(source)}
    places = (
        "model_name_or_path",
        "tokenizer_name_or_path",
        "init_adapter",
        "data",
        "output_dir",
        "adapters",
    )
    settings = {**dataclasses.asdict(fields), **recipe.training}
    settings = {key: value for key, value in settings.items() if key not in (*places, *NEUTRAL)}
    settings["weights"] = [source.weight for source in job.sources]
    if job.template:
        settings["chat_template"] = job.template
        settings["formats"] = [source.format for source in job.sources]
    return Manifest("adapter", recipe.name, inputs, settings)


def _tokenizer_digest(directory: Path) -> str:
    files = [directory / name for name in ("tokenizer.model", "tokenizer.json")]
    found = [sha256_file(file) for file in files if file.is_file()]
    return found[0] if found else ""


def _state(output: Path, manifest: Manifest) -> tuple[str, str]:
    """As `state_of`; also "unfinished", with the name of the checkpoint that the run goes on from, and "blocked", where
    another run was left unfinished."""
    state, why = state_of(output, manifest)
    checkpoint = sealed_checkpoint(directory := _run_place(output))
    if state == "stands" or not checkpoint:
        return state, why
    with contextlib.suppress(OSError, ValueError):
        then = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        if {**then, "processes": 0} == {**json.loads(_described(manifest)), "processes": 0}:
            return "unfinished", checkpoint
    return "blocked", f"{directory} holds an unfinished run with other inputs or settings"


def _run_place(output: Path) -> Path:
    return output.with_name(output.name + ".run")


def _described(manifest: Manifest) -> str:
    """What a run and its continuation have in common."""
    what = {
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "inputs": {r: v["sha256"] for r, v in manifest.inputs.items()},
        "settings": manifest.settings,
    }
    return json.dumps(what, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _run_directory(output: Path, manifest: Manifest, force: bool) -> Iterator[Path]:
    """`<output>.run`, new or of the same run, for this process alone; without a checkpoint it does not outlive a
    failure. Another run that was left there is removed if it has no checkpoint or `force` says so; else raises
    UserError."""
    directory = _run_place(output)
    if not _is_first_process():
        yield directory
        return
    text = _described(manifest)
    record = directory / RECORD
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror}); give a writable output."
        ) from error
    with alone_in(directory):
        if not (record.is_file() and record.read_text(encoding="utf-8") == text):
            if last_checkpoint(directory) and not force:
                raise UserError(
                    f"{directory} holds an unfinished run with other inputs, settings or processes; finish that one with "
                    "the same command, or start anew with --force true."
                )
            empty(directory)
        write_text(record, text)
        try:
            yield directory
        except BaseException:
            if not last_checkpoint(directory):
                shutil.rmtree(directory, ignore_errors=True)  # nothing to go on from
            raise


def _trainer(
    recipe: Recipe[Any], model: Any, tokenizer: Any, arguments: Any, prepared: Prepared
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
            data_collator=Collator(fields.length, tokenizer.eos_token_id, across),
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
