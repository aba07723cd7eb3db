"""One training run: what it is made from, whether that stands already, and the place where it works. What happens in
it is chinese_llama.train.course, whose libraries take seconds to load.

A run works in `<output_dir>.run` (checkpoints, log). The same command given again goes on from the last
checkpoint; the adapter appears in `output_dir` whole, when training is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from chinese_llama.data.prepare import Job, source_digest
from chinese_llama.directories import alone_in, check_apart, check_output, empty, write_text
from chinese_llama.errors import UserError
from chinese_llama.merging.plan import Adapter, resolve
from chinese_llama.model.load import resolve_dtype
from chinese_llama.progress import say
from chinese_llama.train.build import adopt, check_length
from chinese_llama.train.checkpoints import last_checkpoint, sealed_checkpoint
from chinese_llama.train.fields import NEUTRAL, Recipe
from chinese_llama.train.jobs import prepared_root

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
            _go(recipe, job, adapters, manifest, Path(place))
        return manifest
    if recipe.keep == "ask":
        raise Asked(*_state(output, manifest))
    check_apart(output, manifest.places())
    if recipe.keep and stands(output, manifest, fields.force):
        say(f"{recipe.name}: {output} stands; --force trains it again.")
        return read_manifest(output) or manifest
    check_output(output, fields.force)
    with _run_directory(output, manifest, fields.force) as directory:
        _go(recipe, job, adapters, manifest, directory)
    return manifest


def _go(*run: Any) -> None:
    from chinese_llama.train.course import course

    course(*run)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


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
