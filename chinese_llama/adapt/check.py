"""What any stage of a workspace would trip over, told before the first one runs. Nothing is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

from chinese_llama.adapt import control, launch
from chinese_llama.adapt.plan import Stage
from chinese_llama.adapt.subjects import BASE, CONTROL, EXTENDED, MERGED, exams
from chinese_llama.artifacts import read_manifest
from chinese_llama.config import load_yaml
from chinese_llama.data.formats import as_paths, documents, texts
from chinese_llama.data.mixture import names, sources
from chinese_llama.directories import whole_path
from chinese_llama.errors import OutputExists, UserError, nearest
from chinese_llama.evaluate.models import Subject, check_subject
from chinese_llama.merging.plan import resolve
from chinese_llama.workspace import Workspace

TAKEN = (BASE, EXTENDED, CONTROL, MERGED)  # what the report calls models that are no adapter's


def check(space: Workspace, found: list[Stage]) -> None:
    """Raise UserError for a setting, a file or a name that one of the stages `found` could not work with."""
    check_subject(base := _base(space))
    _outputs(space, found)
    if file := launch.launch_file(space):
        told = load_yaml(file)
        if told.get("distributed_type") == "MULTI_CPU" and told.get("num_processes") not in (None, 1):
            raise UserError(
                f"{file}: MULTI_CPU starts one process without MPI, not {told['num_processes']}; take "
                "recipes/launch/cpu_2.yaml."
            )
    _vocabulary(space, found)
    for name in ("pt_lora", "sft_lora", CONTROL):  # what the control takes from pt_lora is told as pt_lora's
        if name in (stage.name for stage in found):
            _training(space, name, base)
    _adapters(space, found)
    _eval(space, base)


def below(found: list[Stage], todo: list[Stage]) -> None:
    """With --only and --from: raise UserError where what the first ones read is not there."""
    chosen = {stage.name for stage in todo}
    for stage in todo:
        for name in stage.reads:
            other = next(other for other in found if other.name == name)
            if name not in chosen and not other.output.is_dir():
                raise UserError(
                    f"{stage.name} reads {other.output}, which {name} has not made yet; begin with --from {name}."
                )


def limits(space: Workspace, known: Iterable[str]) -> None:
    """Raise UserError for an eval.max_regression that is no share, or of a text that is not among `known`."""
    known, where = list(known), f"{space.file}: eval.max_regression"
    for name, limit in space.settings.eval.max_regression.items():
        if not 0 <= limit < math.inf:
            raise UserError(f"{where}: {name}: {limit} is no share of 0 or more; 0.02 is 2 %.")
        if name not in known:
            what = f"measured are {', '.join(known)}" if known else "none is measured: add eval.text"
            raise UserError(f"{where}: no text is named {name!r}{nearest(name, known)}; {what}.")


def _base(space: Workspace) -> Subject:
    from chinese_llama.hub import is_hub_id

    base = space.base()
    if not is_hub_id(base) and not Path(base).is_dir():
        raise UserError(f"{space.file}: base: {base}: no such directory.")
    return Subject(BASE, base)


def _outputs(space: Workspace, found: list[Stage]) -> None:
    """Each stage has a directory of its own, which holds nothing that this tool has not made."""
    for one, other in combinations(found, 2):
        a, b = whole_path(one.output), whole_path(other.output)
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise UserError(
                f"{space.file}: {one.name} writes {one.output} and {other.name} {other.output}; give each a "
                "directory of its own, none in another."
            )
    for stage in found:
        taken = stage.output.exists() and not stage.output.is_dir()
        if taken or (stage.occupied and read_manifest(stage.output) is None):
            raise OutputExists(
                f"{stage.output}, the output of {stage.name}, is there and no result of this tool; move it away, or "
                "give another output."
            )


def _vocabulary(space: Workspace, found: list[Stage]) -> None:
    from chinese_llama.model.resize import DISTILL, METHODS
    from chinese_llama.vocab.merge import POLICIES, SHIPPED, chinese_model
    from chinese_llama.vocab.proto import read_chinese

    s = space.settings
    for where, value, known in (
        ("extend_vocab.policy", s.extend_vocab.policy, POLICIES),
        ("extend_model.init", s.extend_model.init, (*METHODS, DISTILL)),
    ):
        if value not in known:
            raise UserError(
                f"{space.file}: {where}: {value!r} is none of {', '.join(known)}{nearest(value, known)}."
            )
    if s.extend_model.pad_to_multiple_of < 1:
        raise UserError(f"{space.file}: extend_model.pad_to_multiple_of must be at least 1.")
    corpora = [s.extend_vocab.corpus]
    if "train_vocab" in (stage.name for stage in found):
        corpora.append(s.train_vocab.corpus)
    elif (own := s.extend_vocab.chinese_sp) and own not in SHIPPED:
        read_chinese(chinese_model(space.path(own)))
    for path in (path for corpus in corpora if corpus is not None for path in as_paths(space.paths(corpus))):
        next(texts(path))


def _training(space: Workspace, stage: str, base: Subject) -> None:
    from chinese_llama.data.templates import find_template
    from chinese_llama.train.build import check_length
    from chinese_llama.train.fields import Recipe, checked
    from chinese_llama.train.jobs import JOBS

    name = "pt_lora" if stage == CONTROL else stage
    words = control.words(space) if stage == CONTROL else []
    defaults = launch.recipe(name, space).DEFAULTS
    try:
        recipe: Recipe[Any] = checked(name, JOBS[name][0], defaults, ["--workspace", str(space.file), *words])
    except UserError as error:
        if stage != CONTROL:
            raise
        raise UserError(f"control: {error}") from error
    if not recipe.fields.model_name_or_path or stage == CONTROL:
        try:
            check_length(base.directory, recipe.fields.length)
        except UserError as error:
            raise UserError(f"{space.file}: {stage}: {error}") from error
    if name == "sft_lora":
        find_template(recipe.fields.template)


def _adapters(space: Workspace, found: list[Stage]) -> None:
    """Every adapter that a stage takes is there, or made by a stage before it, and has a name of its own."""
    made = {str(stage.output): stage.name for stage in found if stage.name in ("pt_lora", "sft_lora")}
    asked = {"sft_lora.adapters": space.settings.sft_lora["adapters"]} if "sft_lora" in made.values() else {}
    for where, items in {**asked, "merge.loras": space.settings.merge.loras}.items():
        called = []
        for item in items:
            by = made.get(space.adapter_place(item))
            if by and (where, by) != ("sft_lora.adapters", "sft_lora"):
                called.append(item.partition("=")[0])
                continue
            try:
                called.append(resolve(space.item(item), space).name)
            except UserError as error:
                raise UserError(f"{space.file}: {where}: {error}") from error
        for name in called:
            if name in TAKEN or called.count(name) > 1:
                why = "is there twice" if called.count(name) > 1 else "is the name of another model"
                raise UserError(f"{space.file}: {where}: {name!r} {why}; write NAME=DIRECTORY.")
    _order(space, found)


def _order(space: Workspace, found: list[Stage]) -> None:
    """What the tuning builds on is merged before it."""
    tuned = [str(stage.output) for stage in found if stage.name == "sft_lora"]
    merged = [space.adapter_place(item) for item in space.settings.merge.loras]
    for item in space.settings.sft_lora["adapters"] if tuned and tuned[0] in merged else ():
        if space.adapter_place(item) not in merged[: merged.index(tuned[0])]:
            raise UserError(
                f"{space.file}: merge.loras: sft_lora trains on {item} (sft_lora.adapters), so {item} is to be merged "
                "before what it makes."
            )


def _eval(space: Workspace, base: Subject) -> None:
    from chinese_llama.evaluate import choices
    from chinese_llama.evaluate.answers import check_room, read_prompts
    from chinese_llama.evaluate.bits import window_length, window_stride
    from chinese_llama.model.load import load_tokenizer

    section = space.settings.eval
    for name, least in (("samples", 0), ("max_new_tokens", 1), ("shots", 0)):
        if getattr(section, name) < least:
            raise UserError(f"{space.file}: eval.{name}: {getattr(section, name)} is less than {least}.")
    try:
        window_stride(window_length(base.context, section.window), section.stride)
    except UserError as error:
        raise UserError(f"{space.file}: eval: {error}") from error
    for file in section.text.values():
        next(documents(space.path(file)))
    limits(space, section.text or _held_out(space))
    asked = exams(space)
    tokenizer = load_tokenizer(base.tokenizer) if base.tokenizer and (section.prompts or asked) else None
    if section.prompts:
        prompts = read_prompts(questions := space.path(section.prompts))
        if base.context and tokenizer:
            check_room(tokenizer, base.context, prompts, questions)
    for exam, place in asked.items():  # the base's tokenizer has the most tokens for a question
        choices.check_fits(exam, place, section.shots, tokenizer, base.context)
    if section.wikitext:
        choices.check_harness()
        next(documents(space.path(section.wikitext)))


def _held_out(space: Workspace) -> list[str]:
    """Names of what the pretraining may hold out."""
    section = space.settings.pt_lora
    return names(sources(space.paths(section["data"]))) if section.get("eval_split") else []
