"""The stages of a workspace: which it has, what each reads, and whether its result stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chinese_llama import stages
from chinese_llama.adapt import control, launch
from chinese_llama.adapt.packed import packed
from chinese_llama.artifacts import Asked
from chinese_llama.errors import DoesNotFit, UserError, nearest
from chinese_llama.workspace import Workspace

Make = Callable[[dict[str, Any], bool], Any]  # ({"keep": ...}, force)
STANDS, MISSING, STALE = "stands", "missing", "stale"
REPORT, REMEMBERED = "report.json", "measured"  # in the directory of `eval`, and beside it
UNFINISHED, BLOCKED, OPEN = "unfinished", "blocked", "open"


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """A section of the workspace file: what it writes, and the stages before it whose results it `reads`. It can be
    asked whether its result stands once it is `askable`: what that depends on need not be made for it."""

    name: str
    output: Path
    reads: tuple[str, ...]
    make: Make
    askable: Callable[[], bool] = _always

    @property
    def occupied(self) -> bool:
        """Whether there is anything where it writes."""
        return self.output.is_dir() and any(self.output.iterdir())

    @property
    def begun(self) -> bool:
        """Whether a result is there, or a training that did not end."""
        return self.occupied or self.output.with_name(self.output.name + ".run").is_dir()


@dataclass(frozen=True)
class State:
    """Whether a stage's result stands, is missing, stale (and why), unfinished (and where), or blocked by another run
    (and which); open where that depends on what is made first."""

    kind: str
    why: str = ""


def stages_of(space: Workspace) -> list[Stage]:
    """The stages that the workspace has, in their order."""
    s = space.settings
    found: list[Stage] = []

    def add(
        name: str, output: Path, reads: Iterable[str], make: Make, askable: Callable[[], bool] = _always
    ) -> None:
        there = {stage.name for stage in found}
        found.append(Stage(name, output, tuple(r for r in reads if r in there), make, askable))

    def made(stage: Callable[..., Any]) -> Make:
        return lambda given, force: stage(space, given, force)

    train_vocab = space.path(s.train_vocab.output)
    if (s.train_vocab.corpus is not None or train_vocab.is_dir()) and not s.extend_vocab.chinese_sp:
        add("train_vocab", train_vocab, (), made(stages.trained_vocab))
    add("extend_vocab", space.path(s.extend_vocab.output), ("train_vocab",), made(stages.extended_tokenizer))
    add("extend_model", space.path(s.extend_model.output), ("extend_vocab",), made(stages.extended_model))
    if s.control is not None:
        make = trained(space, "pt_lora", lambda: control.argv(space))
        if control.counts(space):  # in the extended model's tokens
            add("control", control.output(space), ("extend_model",), make, lambda: control.counted(space))
        else:
            add("control", control.output(space), (), make)
    base = ["extend_model"]
    for name in ("pt_lora", "sft_lora"):
        section = getattr(s, name)
        if section.get("data"):
            reads = () if section.get("model_name_or_path") else base
            below = _makers(space, found, section.get("adapters") or [])
            add(name, space.path(section["output_dir"]), [*reads, *below], trained(space, name))
    merged = _makers(space, found, s.merge.loras)
    if s.merge.loras:
        add("merge", space.path(s.merge.output), [*base, *merged], made(_merged))
    texts = () if s.eval.text else ("pt_lora",)  # what it holds out
    add(
        "eval",
        space.path(s.eval.output),
        (*base, *texts, *merged, "control", "merge"),
        made(_measured),
        lambda: bool(s.eval.text) or not s.pt_lora.get("eval_split") or packed(space, []),
    )
    return found


def _makers(space: Workspace, found: list[Stage], items: list[str]) -> list[str]:
    """The stages that make some of the adapters in a list."""
    places = [space.adapter_place(item) for item in items]
    return [stage.name for stage in found if str(stage.output) in places]


def _merged(space: Workspace, given: dict[str, Any], force: bool) -> Any:
    from chinese_llama.merging.stage import merged_model, planned
    from chinese_llama.merging.stream import Options, Work

    if given.get("keep") != "ask":  # `force` is to replace an output here, not to overrule a lineage
        found, base, _, _ = planned(space, {})
        try:
            Work(base, found.steps, Options())
        except DoesNotFit as error:
            told = str(error).replace("--force merges", "chinese-llama merge --force merges")
            raise DoesNotFit(told) from error
    return merged_model(space, {"resume": True, **given}, force)


def _measured(space: Workspace, given: dict[str, Any], force: bool) -> Any:
    from chinese_llama.adapt.measures import evaluated

    return evaluated(space, force, given.get("keep", True))


def trained(space: Workspace, name: str, argv: Callable[[], list[str]] = list) -> Make:
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
        return State(asked.state, f"made {asked.why}" if asked.state == STALE else asked.why)
    raise AssertionError(f"{stage.name} did not answer")


def states(found: list[Stage]) -> dict[str, State]:
    """The state of every stage; where one before it is to be made, its own follows from that. Nothing is written."""
    told: dict[str, State] = {}
    for stage in found:
        before = next((name for name in stage.reads if told[name].kind != STANDS), None)
        if before is not None:
            told[stage.name] = State(OPEN, f"{before} is made first") if stage.begun else State(MISSING)
        elif not stage.askable():
            told[stage.name] = State(OPEN, "its data is packed first") if stage.begun else State(MISSING)
        else:
            told[stage.name] = state_of(stage)
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
