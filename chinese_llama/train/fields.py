"""The fields of the recipes, and where their values come from."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from chinese_llama import stages, workspace
from chinese_llama.artifacts import Keep
from chinese_llama.config import load_yaml, parse_fields, parse_value, typed
from chinese_llama.data.mixture import sources
from chinese_llama.errors import UserError, nearest
from chinese_llama.hub import local

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
CHOICES = {
    "embeddings": ("new-rows", "full", "frozen"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": ("none", "nf4", "int8"),
    "on_regression": ("warn", "stop"),
    "too_long": ("drop", "truncate"),
    "bad_records": ("stop", "skip"),
}
DEFAULTS = {  # of TrainingArguments, for both recipes
    "per_device_train_batch_size": 8,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # we stop instead
    "save_steps": 200,
    "eval_steps": 200,
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,
    "disable_tqdm": True,
    "ddp_find_unused_parameters": False,
    "ddp_broadcast_buffers": False,  # frozen ones, the same everywhere
    "ddp_timeout": 86_400,  # seconds; the first process packs while the others wait
}
NUMBERS = ("int", "float")
NOT_TAKEN = {
    "save_only_model": "a run could not be resumed exactly",
    "ignore_data_skip": "a run could not be resumed exactly",
    "load_best_model_at_end": "give max_regression, or take a checkpoint",
    "eval_on_start": "give eval_text or eval_split; they are measured before the first step",
    "remove_unused_columns": "the data has just what is needed",
    "resume_from_checkpoint": "the same command goes on by itself",
    "eval_strategy": "give eval_text or eval_split; they are measured every eval_steps",
    "do_eval": "give eval_text or eval_split; they are measured every eval_steps",
    "hub_token": "a key does not belong into settings, which are kept with the result",
    "push_to_hub": "upload the finished directory instead",
}
LEAST = {  # of TrainingArguments' numbers, where less makes no sense
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "num_train_epochs": 0,
    "warmup_steps": 0,
}
# What Liger must not put in the place of chinese_llama.model.lean's.
LEANER = dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy", "rms_norm", "swiglu"), False)
# What may change between a run and its continuation, and does not make another adapter.
NEUTRAL = (
    "logging_steps", "per_device_eval_batch_size", "save_steps", "save_total_limit", "eval_steps", "eval_text", "report_to", "run_name", "force", "dry_run",
    "prepared_dir", "keep", "max_regression", "on_regression", "dataloader_num_workers", "dataloader_pin_memory",
    "logging_nan_inf_filter", "disable_tqdm", "ddp_timeout", "remove_unused_columns", "ddp_broadcast_buffers",
)  # fmt: skip


@dataclass
class Fields(ABC):
    """Fields of both recipes; `TrainingArguments` has the others.

    `embeddings`: which rows of the vocabulary train: those of the new pieces, all, or none; they have a
    learning rate of their own (`embedding_learning_rate`), and for the first `rows_only_steps` they train
    alone. `adapters`: baked into the base before training, in order. `init_adapter`: go on training this
    adapter, whose own settings then hold. `dtype`: of the frozen weights; auto is bfloat16 on a GPU that
    has it, else float32. `eval_text`: {name: file} of texts that are measured at the first step, every
    `eval_steps` and at the last; `max_regression`: {name: share} by which the bits per byte of a text may
    rise over the first figure. `prepared_dir`: where packed data is kept. `keep`: do nothing if the output was
    made from the same inputs with the same settings (a workspace's own is kept anyway); `force`: replace an
    output that is there.
    """

    model_name_or_path: str = ""
    tokenizer_name_or_path: str | None = None  # default: the one beside the model
    data: Any = None  # a path, a list of paths, or a list of {path, weight}
    output_dir: str = ""
    lora_r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: float | None = None
    embeddings: str = "new-rows"
    embedding_learning_rate: float | None = None  # default: learning_rate
    rows_only_steps: int = 0
    adapters: list[str] = field(default_factory=list)
    init_adapter: str | None = None
    quantization: str = "none"
    dtype: str = "auto"
    eval_text: Any = None
    max_regression: Any = None
    on_regression: str = "warn"
    prepared_dir: str | None = None  # default: `prepared` beside the output
    dry_run: bool = False
    keep: bool = False
    force: bool = False

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of a block."""

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer lies: as given, else beside the adapter that goes on, else beside the model."""
        beside = self.init_adapter and (Path(self.init_adapter) / "tokenizer_config.json").is_file()
        return (
            self.tokenizer_name_or_path or (self.init_adapter if beside else None) or self.model_name_or_path
        )


@dataclass
class PretrainingFields(Fields):
    """`eval_split`: share of the documents that is held out, by hash of the text, and measured like
    `eval_text`. `cross_document_attention`: let the documents of a block see each other."""

    block_size: int = 512
    eval_split: float = 0.0
    cross_document_attention: bool = False

    @property
    def length(self) -> int:
        return self.block_size


@dataclass
class TuningFields(Fields):
    """`template`: a name, or a .jinja file. `too_long`: a conversation that does not fit is cut back to
    whole turns, and if none fits dropped, or its answer truncated. `bad_records`: a malformed record stops
    the run, or is skipped and counted."""

    template: str = "chinese-alpaca"
    max_seq_length: int = 512
    too_long: str = "drop"
    bad_records: str = "stop"

    @property
    def length(self) -> int:
        return self.max_seq_length


F = TypeVar("F", bound=Fields)


@dataclass
class Recipe(Generic[F]):
    """A resolved recipe: our fields, TrainingArguments' fields, and the workspace it was run in.

    `keep`: an output that stands is kept, such as the workspace's own.
    """

    name: str
    fields: F
    training: dict[str, Any]
    workspace: workspace.Workspace | None
    keep: Keep


def resolve(name: str, cls: type[F], defaults: dict[str, Any], argv: Sequence[str]) -> Recipe[F]:
    """The recipe `name` as `checked` reads it, its base made if the workspace lacks it, hub ids fetched."""
    recipe = checked(name, cls, defaults, argv)
    fields, found = recipe.fields, recipe.workspace
    if not fields.model_name_or_path and found:
        fields.model_name_or_path = str(_base_for_training(found))
    for place in ("model_name_or_path", "tokenizer_name_or_path", "init_adapter"):
        if getattr(fields, place):
            setattr(fields, place, str(local(getattr(fields, place))))
    return recipe


def checked(name: str, cls: type[F], defaults: dict[str, Any], argv: Sequence[str]) -> Recipe[F]:
    """The recipe `name`, with its own `defaults`, from `--config FILE --field value ...` and the workspace: the
    nearest one, or that of `--workspace FILE`. Nothing is made.

    Without --config, the workspace's section is the configuration; with it, the workspace only
    fills in the places (model and adapters below it, data, output) that are left out. Raises UserError.
    """
    file, given = parse_fields(argv)
    named = given.pop("workspace", None)
    found = workspace.Workspace(Path(str(named))) if named else workspace.find()
    where = str(file) if file else str(found.file) if found else "command line"
    section = _section(found, name)
    values = {**(load_yaml(file) if file else section), **given}
    keep = "output_dir" not in values if file else "output_dir" not in given
    places = ["data", "output_dir"]
    if not values.get("model_name_or_path"):
        found = found or workspace.required(name, "--model_name_or_path")
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
    training.setdefault("per_device_eval_batch_size", training["per_device_train_batch_size"])
    for key, value in training.items():
        if value is False and key.endswith("_strategy"):
            training[key] = "no"  # what YAML makes of `save_strategy: no`
    _check_training(name, training, fields)
    for source in sources(fields.data):
        source.list_files()  # complain about the data before anything is made or loaded
    return Recipe(name, fields, training, found, fields.keep or (keep and found is not None))


def _section(found: workspace.Workspace | None, name: str) -> dict[str, Any]:
    """The workspace's section of a recipe, its paths made whole."""
    if found is None:
        return {}
    section = dict(getattr(found.settings, name))
    for place in ("model_name_or_path", "tokenizer_name_or_path", "data", "prepared_dir"):
        if section.get(place) is not None:
            section[place] = found.paths(section[place])
    for place in ("init_adapter", "template"):
        if section.get(place) is not None and found.path(section[place]).exists():
            section[place] = str(found.path(section[place]))
    section["output_dir"] = str(found.path(section["output_dir"]))
    texts = section.get("eval_text", found.settings.eval.text)
    if isinstance(texts, dict):
        section["eval_text"] = {set_: str(found.path(file)) for set_, file in texts.items()}
    if "adapters" in section:
        adapters = section["adapters"] or []
        section["adapters"] = [found.item(a) for a in ([adapters] if isinstance(adapters, str) else adapters)]
    return section


def _check(fields: Fields, where: str) -> None:
    for name, known in CHOICES.items():
        value = getattr(fields, name, known[0])
        if value not in known:
            raise UserError(
                f"{where}: {name}: {value!r} is none of {', '.join(known)}{nearest(value, known)}."
            )
    length = "block_size" if isinstance(fields, PretrainingFields) else "max_seq_length"
    for name, least in (("lora_r", 1), (length, 2)):
        if getattr(fields, name) < least:
            raise UserError(f"{where}: {name} must be at least {least}.")
    for name in (
        "lora_alpha",
        "lora_dropout",
        "rows_only_steps",
        "embedding_learning_rate",
        "loraplus_lr_ratio",
    ):
        if not 0 <= (getattr(fields, name) or 0) < math.inf:
            raise UserError(f"{where}: {name} must be a finite number, and not negative.")
    if fields.use_dora and fields.quantization == "int8":
        raise UserError(f"{where}: use_dora does not go with quantization: int8; take nf4 or none.")
    if fields.embeddings == "frozen" and (fields.rows_only_steps or fields.embedding_learning_rate):
        raise UserError(f"{where}: embeddings: frozen trains no rows; leave the settings for rows out.")
    fields.eval_text = {
        name: str(file) for name, file in _pairs(fields.eval_text, "eval_text", where).items()
    }
    for name in fields.eval_text:
        if not name or "/" in name:
            raise UserError(f"{where}: eval_text: {name!r} is no name for a text: it must have no slash.")
    limits = _pairs(fields.max_regression, "max_regression", where)
    for name, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit < math.inf:
            raise UserError(f"{where}: max_regression: {name}: {limit!r} is not a share such as 0.02.")
    fields.max_regression = limits


def _pairs(value: Any, name: str, where: str) -> dict[str, Any]:
    """{name: value} from a mapping, or from `name=value` words as a command line has them."""
    if value is None or isinstance(value, dict):
        return {str(key): item for key, item in (value or {}).items()}
    found: dict[str, Any] = {}
    for item in value if isinstance(value, list) else [value]:
        key, equals, text = str(item).partition("=")
        if not (key and equals and text):
            raise UserError(f"{where}: {name}: {item!r}: write NAME=VALUE.")
        found[key] = parse_value(name, text)
    return found


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
    kinds = settings_of_transformers()
    ours = [f.name for f in dataclasses.fields(fields)]
    for name, value in training.items():
        if name not in kinds:
            hint = nearest(name, [*kinds, *ours])
            raise UserError(f"{recipe}: {name!r} is no field of this recipe or TrainingArguments{hint}.")
        if name in NOT_TAKEN and value not in (False, None, "no"):
            raise UserError(f"{recipe}: {name} is not taken: {NOT_TAKEN[name]}.")
        if kinds[name] in NUMBERS and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{recipe}: {name}: {value!r} is not a number.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{recipe}: {name}: {value} is not a finite number.")
        if name in LEAST and value < LEAST[name]:
            raise UserError(f"{recipe}: {name}: {value} is less than {LEAST[name]}.")


@functools.cache
def settings_of_transformers() -> dict[str, str]:
    """Names and types of what TrainingArguments takes, read from its source: to import it takes seconds."""
    package = importlib.util.find_spec("transformers")
    assert package and package.origin
    tree = ast.parse((Path(package.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    (body,) = (
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            options = (
                {k.arg: k.value for k in node.value.keywords} if isinstance(node.value, ast.Call) else {}
            )
            if not isinstance(given := options.get("init"), ast.Constant) or given.value:
                found[node.target.id] = ast.unparse(node.annotation)
    return found


def training_arguments(recipe: Recipe[Any], directory: Path) -> Any:
    """transformers' TrainingArguments for a run that works in `directory`.

    Raises UserError for a value that transformers refuses.
    """
    from transformers import TrainingArguments
    from transformers.utils import is_liger_kernel_available

    training = dict(recipe.training)
    if training.get("use_liger_kernel") and not is_liger_kernel_available():
        raise UserError(f"{recipe.name}: use_liger_kernel needs liger-kernel: pip install liger-kernel.")
    try:
        training["accelerator_config"] = _beside(training.get("accelerator_config"))
        if training.get("use_liger_kernel"):
            training["liger_kernel_config"] = {**(training.get("liger_kernel_config") or {}), **LEANER}
        arguments = TrainingArguments(**training, output_dir=str(directory))
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{recipe.name}: {str(error).strip().splitlines()[0]}") from error
    if arguments.n_gpu > 1:  # one process trains on one GPU; several GPUs want several processes
        arguments._n_gpu = 1
    if arguments.accelerator_config.dispatch_batches:
        raise UserError(f"{recipe.name}: dispatch_batches is not taken: every process reads its own rows.")
    _check_activation(recipe.name, arguments)
    return arguments


def _check_activation(recipe: str, arguments: Any) -> None:
    """Raise UserError for settings of activation checkpointing that would fail in the first step."""
    given = getattr(arguments, "activation_checkpointing_kwargs", None) or {}
    if not isinstance(given, dict):
        raise UserError(f"{recipe}: activation_checkpointing_kwargs: {given!r} is no mapping.")
    every = given.get("every_n_layers", 1)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise UserError(f"{recipe}: every_n_layers: {every!r} is not a number of layers, 1 or more.")
    if given.get("offload") and arguments.device.type == "cpu":
        raise UserError(f"{recipe}: offload needs a GPU, whose activations are kept by the CPU.")


def _beside(given: Any) -> Any:
    """accelerate's settings as `given`; unless they say otherwise, batches go to the GPU while it works."""
    return given if isinstance(given, str) else {"non_blocking": True, **(given or {})}
