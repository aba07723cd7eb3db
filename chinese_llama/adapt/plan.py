"""The stages of a workspace: which it has, what each reads, and whether its result stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chinese_llama import stages
from chinese_llama.adapt import launch
from chinese_llama.adapt.control import control_argv
from chinese_llama.artifacts import Asked
from chinese_llama.errors import UserError, nearest
from chinese_llama.workspace import Workspace

Make = Callable[[dict[str, Any], bool], Any]  # ({"keep": ...}, force)
STANDS, MISSING, STALE, UNFINISHED = "stands", "missing", "stale", "unfinished"


@dataclass(frozen=True)
class Stage:
    """A section of the workspace file: what it writes, and the stages before it whose results it `reads`."""

    name: str
    output: Path
    reads: tuple[str, ...]
    make: Make


@dataclass(frozen=True)
class State:
    """Whether a stage's result stands, is missing, stale (and why), or unfinished (and where)."""

    kind: str
    why: str = ""


def stages_of(space: Workspace) -> list[Stage]:
    """The stages that the workspace has, in their order."""
    s = space.settings
    found: list[Stage] = []

    def add(name: str, output: str, reads: Iterable[str], make: Make) -> None:
        there = {stage.name for stage in found}
        found.append(Stage(name, space.path(output), tuple(r for r in reads if r in there), make))

    def made(stage: Callable[..., Any]) -> Make:
        return lambda given, force: stage(space, given, force)

    own = s.train_vocab.corpus is not None or space.path(s.train_vocab.output).is_dir()
    if own and not s.extend_vocab.chinese_sp:
        add("train_vocab", s.train_vocab.output, (), made(stages.trained_vocab))
    add("extend_vocab", s.extend_vocab.output, ("train_vocab",), made(stages.extended_tokenizer))
    add("extend_model", s.extend_model.output, ("extend_vocab",), made(stages.extended_model))
    if s.control is not None:
        output = s.control.get("output_dir") or "work/control"
        reads = ("extend_model",) if s.pt_lora.get("max_steps") else ()  # its tokenizer, to count the steps
        add("control", output, reads, trained(space, "pt_lora", control_argv(space, output)))
    below: list[str] = ["extend_model"]
    for name in ("pt_lora", "sft_lora"):
        section = getattr(s, name)
        if section.get("data"):
            above = () if section.get("model_name_or_path") else below
            add(name, section["output_dir"], above, trained(space, name, list))
            below.append(name)
    if s.merge.loras:
        add("merge", s.merge.output, below, made(_merged))
    add("eval", s.eval.output, (*below, "control", "merge"), made(_measured))
    return found


def _merged(space: Workspace, given: dict[str, Any], force: bool) -> Any:
    from chinese_llama.merging.stage import merged_model

    return merged_model(space, {"resume": True, **given}, force)


def _measured(space: Workspace, given: dict[str, Any], force: bool) -> Any:
    from chinese_llama.adapt.measures import evaluated

    return evaluated(space, force, given.get("keep", True))


def trained(space: Workspace, name: str, argv: Callable[[], list[str]]) -> Make:
    """A recipe as a stage; `argv` are words beyond the workspace's section, found when it is run."""

    def make(given: dict[str, Any], force: bool) -> None:
        words = argv()
        if given.get("keep") != "ask":
            launch.train(space, name, [*words, *(["--force", "true"] if force else [])])
            return
        from chinese_llama.train.fields import Recipe, resolve
        from chinese_llama.train.jobs import JOBS
        from chinese_llama.train.session import run

        fields, job = JOBS[name]
        defaults = launch.recipe(name, space).DEFAULTS
        recipe: Recipe[Any] = resolve(name, fields, defaults, ["--workspace", str(space.file), *words])
        recipe.keep = "ask"
        run(recipe, job(recipe))

    return make


def state_of(stage: Stage) -> State:
    """Whether the result of a stage stands, now that those before it do. Raises UserError."""
    try:
        stage.make({"keep": "ask"}, False)
    except Asked as asked:
        if asked.state != STANDS and (checkpoint := _checkpoint(stage)):
            return State(UNFINISHED, checkpoint)
        return State(asked.state, f"made {asked.why}" if asked.why else "")
    raise AssertionError(f"{stage.name} did not answer")


def _checkpoint(stage: Stage) -> str:
    """The name of the checkpoint that a training goes on from, or ''."""
    directory = stage.output.with_name(stage.output.name + ".run")
    if not directory.is_dir():
        return ""
    from chinese_llama.train.trainer import last_checkpoint

    return Path(last_checkpoint(directory) or "").name


def states(found: list[Stage]) -> dict[str, State]:
    """The state of every stage; where one before it is to be made, its own follows from that."""
    told: dict[str, State] = {}
    for stage in found:
        before = next((name for name in stage.reads if told[name].kind != STANDS), None)
        if before is None:
            told[stage.name] = state_of(stage)
        else:
            there = stage.output.is_dir() and any(stage.output.iterdir())
            told[stage.name] = State(STALE, f"{before} is made first") if there else State(MISSING)
    return told


def chosen(found: list[Stage], only: str | None, start: str | None) -> list[Stage]:
    """The stages that are to be looked at: all, one, or those from one on. Raises UserError."""
    names = [stage.name for stage in found]
    for option, given in (("--only", only), ("--from", start)):
        if given is not None and given.replace("-", "_") not in names:
            raise UserError(
                f"{option} {given}: this workspace has no such stage{nearest(given, names)}; it has {', '.join(names)}."
            )
    if only is not None and start is not None:
        raise UserError("--only and --from exclude each other.")
    if only is not None:
        return [stage for stage in found if stage.name == only.replace("-", "_")]
    return found[names.index(start.replace("-", "_")) if start else 0 :]
