"""What a recipe's data depends on: the job that `prepare` does ahead, and the recipes do when it is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chinese_llama.data.mixture import names, sources
from chinese_llama.data.prepare import Job, Prepared, prepare
from chinese_llama.data.templates import find_template, fit_template
from chinese_llama.errors import UserError
from chinese_llama.train.fields import Fields, PretrainingFields, Recipe, TuningFields, resolve
from chinese_llama.workspace import find


def pretraining_job(recipe: Recipe[PretrainingFields]) -> Job:
    """Documents, packed into blocks."""
    fields = recipe.fields
    return Job(
        kind="pretraining",
        sources=tuple(sources(fields.data)),
        tokenizer=Path(fields.tokenizer),
        block_size=fields.block_size,
        eval_split=fields.eval_split,
    )


def tuning_job(recipe: Recipe[TuningFields]) -> Job:
    """Conversations, as the template writes them, packed whole."""
    from chinese_llama.model.load import load_tokenizer

    fields = recipe.fields
    return Job(
        kind="instructions",
        sources=tuple(sources(fields.data)),
        tokenizer=Path(fields.tokenizer),
        block_size=fields.max_seq_length,
        template=fit_template(find_template(fields.template), load_tokenizer(fields.tokenizer)),
        too_long=fields.too_long,
        bad_records=fields.bad_records,
    )


JOBS: dict[str, tuple[type, Callable[..., Job]]] = {
    "pt_lora": (PretrainingFields, pretraining_job),
    "sft_lora": (TuningFields, tuning_job),
}


def prepared_root(fields: Fields) -> Path:
    """Where packed data is kept: beside the output, unless told otherwise."""
    return Path(fields.prepared_dir or Path(fields.output_dir).parent / "prepared")


def named_sources(prepared: Prepared) -> list[dict[str, Any]]:
    """The figures of each source, with its name and weight."""
    found = zip(names(prepared.sources), prepared.sources, prepared.manifest.metrics["sources"], strict=True)
    return [{"name": name, "weight": source.weight, **figures} for name, source, figures in found]


def prepare_ahead(name: str, argv: Sequence[str]) -> Prepared:
    """Prepare the data of the recipe `name` as the recipe itself would, given the same words.

    Without a model, a tokenizer and a place for the data are enough. Raises UserError.
    """
    if name not in JOBS:
        raise UserError(f"prepare {name!r}: the recipes are {', '.join(JOBS)}.")
    from chinese_llama.model.load import load_tokenizer, quiet_libraries

    fields, job = JOBS[name]
    quiet_libraries()
    recipe: Recipe[Any] = resolve(name, fields, {}, _filled(argv))
    return prepare(job(recipe), prepared_root(recipe.fields), load_tokenizer(recipe.fields.tokenizer))


def _filled(argv: Sequence[str]) -> list[str]:
    """`argv` with what only training needs filled in from what was given."""
    given = {word.partition("=")[0].replace("-", "_"): number for number, word in enumerate(argv)}
    words = list(argv)
    if not {"__config", "__prepared_dir", "__output_dir", "__workspace"} & set(given) and find() is None:
        raise UserError("prepare: say where the data goes with --prepared-dir DIRECTORY.")
    for needed, stand_in in (
        ("model_name_or_path", "tokenizer_name_or_path"),
        ("output_dir", "prepared_dir"),
    ):
        found = given.get(f"__{stand_in}")
        if f"__{needed}" not in given and found is not None:
            value = argv[found].partition("=")[2] or "".join(argv[found + 1 : found + 2])
            words += [f"--{needed}", value]
    return words
