"""The fields of the recipes, and where their values come from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from chinese_llama import stages, workspace
from chinese_llama.config import load_yaml, parse_fields, typed
from chinese_llama.data.formats import corpus_files
from chinese_llama.data.mixture import sources
from chinese_llama.errors import UserError, nearest
from chinese_llama.hub import local

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
EMBEDDINGS = ("new-rows", "full", "frozen")
DEFAULTS = {  # of TrainingArguments, for both recipes
    "per_device_train_batch_size": 8,
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,
    "disable_tqdm": True,
    "ddp_timeout": 86_400,  # seconds; the first process packs while the others wait
}
NUMBERS = ("int", "float", "<class 'int'>", "<class 'float'>")
NOT_TAKEN = {
    "resume_from_checkpoint": "the same command goes on by itself",
    "eval_strategy": "measure the result with chinese-llama eval",
    "do_eval": "measure the result with chinese-llama eval",
    "push_to_hub": "upload the finished directory instead",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Fields:
    """Fields of both recipes; `TrainingArguments` has the others.

    `embeddings`: which rows of the vocabulary train: those of the new pieces, all, or none.
    `adapters`: baked into the base before training, in order. `dtype`: of the frozen weights; auto
    is bfloat16 on a GPU that has it, else float32. `force`: replace an output that is there.
    """

    model_name_or_path: str = ""
    tokenizer_name_or_path: str | None = None  # default: the one beside the model
    data: Any = None  # a path, a list of paths, or a list of {path, weight}
    output_dir: str = ""
    lora_r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    embeddings: str = "new-rows"
    adapters: list[str] = field(default_factory=list)
    dtype: str = "auto"
    force: bool = False


@dataclass
class PretrainingFields(Fields):
    block_size: int = 512


@dataclass
class TuningFields(Fields):
    template: str = "chinese-alpaca"
    max_seq_length: int = 512


F = TypeVar("F", bound=Fields)


@dataclass
class Recipe(Generic[F]):
    """A resolved recipe: our fields, TrainingArguments' fields, and the workspace it was run in.

    `keep`: the output is the workspace's own, so one that stands is kept.
    """

    name: str
    fields: F
    training: dict[str, Any]
    workspace: workspace.Workspace | None
    keep: bool


def resolve(name: str, cls: type[F], defaults: dict[str, Any], argv: Sequence[str]) -> Recipe[F]:
    """The recipe `name`, with its own `defaults`, from `--config FILE --field value ...` and the workspace.

    Without --config, the workspace's section is the configuration; with it, the workspace only
    fills in the places (model and adapters below it, data, output) that are left out. Raises UserError.
    """
    file, given = parse_fields(argv)
    found = workspace.find()
    where = str(file) if file else str(found.file) if found else "command line"
    section = _section(found, name)
    values = {**(load_yaml(file) if file else section), **given}
    keep = "output_dir" not in values if file else "output_dir" not in given
    places = ["data", "output_dir"]
    if not values.get("model_name_or_path"):
        found = workspace.required(name, "--model_name_or_path")
        places.append("adapters")
    elif "model_name_or_path" in given and "adapters" not in given and not file:
        values.pop("adapters", None)  # the workspace's adapters belong to the workspace's model
    for place in places:
        if place not in values and place in section:
            values[place] = section[place]
    for place in ("data", "output_dir"):
        if not values.get(place):
            raise UserError(
                f"{name}: --{place} is missing; give it, or set {name}.{place} in {workspace.FILE}."
            )
    ours = {f.name for f in dataclasses.fields(cls)}
    fields = typed(cls, {key: value for key, value in values.items() if key in ours}, where)
    _check(fields, where)
    training = {**DEFAULTS, **defaults, **{key: value for key, value in values.items() if key not in ours}}
    for key, value in training.items():
        if value is False and key.endswith("_strategy"):
            training[key] = "no"  # what YAML makes of `save_strategy: no`
    _check_training(name, training, fields)
    for source in sources(fields.data):
        corpus_files(source.path)
    if not fields.model_name_or_path and found:
        fields.model_name_or_path = str(_base_for_training(found))
    for place in ("model_name_or_path", "tokenizer_name_or_path"):
        if getattr(fields, place):
            setattr(fields, place, str(local(getattr(fields, place))))
    return Recipe(name, fields, training, found, keep and found is not None)


def _section(found: workspace.Workspace | None, name: str) -> dict[str, Any]:
    """The workspace's section of a recipe, its paths made whole."""
    if found is None:
        return {}
    section = dict(getattr(found.settings, name))
    for place in ("model_name_or_path", "tokenizer_name_or_path", "data"):
        if section.get(place) is not None:
            section[place] = found.paths(section[place])
    section["output_dir"] = str(found.path(section["output_dir"]))
    if "adapters" in section:
        adapters = section["adapters"] or []
        section["adapters"] = [found.item(a) for a in ([adapters] if isinstance(adapters, str) else adapters)]
    return section


def _check(fields: Fields, where: str) -> None:
    for name, known in (("embeddings", EMBEDDINGS), ("dtype", DTYPES)):
        value = getattr(fields, name)
        if value not in known:
            raise UserError(
                f"{where}: {name}: {value!r} is none of {', '.join(known)}{nearest(value, known)}."
            )
    length = getattr(fields, "block_size", None) or getattr(fields, "max_seq_length", None)
    for name, number in (("lora_r", fields.lora_r), ("block_size or max_seq_length", length)):
        if number is None or number < 1:
            raise UserError(f"{where}: {name} must be at least 1.")


def _base_for_training(found: workspace.Workspace) -> Path:
    """The workspace's extended model, made now if it is missing; not by many processes at once."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return stages.base_for_training(found)
    path = found.path(found.settings.extend_model.output)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; make it with `chinese-llama extend-model` first.")
    return path


def _check_training(recipe: str, training: dict[str, Any], fields: Fields) -> None:
    """Raise UserError for a name that TrainingArguments lacks, or that a recipe does not take."""
    from transformers import TrainingArguments

    kinds = {f.name: str(f.type) for f in dataclasses.fields(TrainingArguments) if f.init}
    ours = [f.name for f in dataclasses.fields(fields)]
    for name, value in training.items():
        if name not in kinds:
            hint = nearest(name, [*kinds, *ours])
            raise UserError(f"{recipe}: {name!r} is no field of this recipe or TrainingArguments{hint}.")
        if name in NOT_TAKEN and value not in (False, None, "no"):
            raise UserError(f"{recipe}: {name} is not taken: {NOT_TAKEN[name]}.")
        if kinds[name] in NUMBERS and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{recipe}: {name}: {value!r} is not a number.")


def training_arguments(recipe: Recipe[Any], directory: Path) -> Any:
    """transformers' TrainingArguments for a run that works in `directory`.

    Raises UserError for a value that transformers refuses.
    """
    from transformers import TrainingArguments

    try:
        arguments = TrainingArguments(**recipe.training, output_dir=str(directory))
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"{recipe.name}: {str(error).strip().splitlines()[0]}") from error
    if arguments.n_gpu > 1:  # one process trains on one GPU; several GPUs want several processes
        arguments._n_gpu = 1
    return arguments
