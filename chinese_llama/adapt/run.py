"""`adapt`: make what is missing or stale, stage by stage, and end with the report."""

from __future__ import annotations

from pathlib import Path

from chinese_llama.adapt import plan
from chinese_llama.adapt.plan import STANDS, Stage, State
from chinese_llama.errors import UserError
from chinese_llama.hub import is_hub_id
from chinese_llama.model.load import quiet_libraries
from chinese_llama.progress import Stopwatch, say
from chinese_llama.workspace import Workspace


def adapt(
    space: Workspace, only: str | None = None, start: str | None = None, force: bool = False
) -> tuple[list[str], str]:
    """Run the stages of the workspace that are missing or stale (with `force`: all of them), or `only` one, or
    those from `start` on; return the sentences of limits that the result breaks, and the report for a terminal.

    Raises UserError before anything is made where a setting or an input of any stage is wrong.
    """
    watch = Stopwatch()
    todo = _todo(space, only, start)
    for number, stage in enumerate(todo, 1):
        _run(stage, force, f"[{number}/{len(todo)}] {stage.name}")
    say(f"All stages stand after {watch.seconds():,.0f} s." if len(todo) > 1 else "")
    return ending(todo[-1].output) if todo[-1].name == "eval" else ([], "")


def planned(space: Workspace, only: str | None = None, start: str | None = None, force: bool = False) -> str:
    """What `adapt` would do, and what it needs. Raises UserError as it does."""
    from chinese_llama.adapt.cost import table

    todo = _todo(space, only, start)
    told = plan.states(plan.stages_of(space))
    if force:
        told |= {
            stage.name: State(plan.STALE, "--force") for stage in todo if told[stage.name].kind == STANDS
        }
    return table(space, todo, told)


def _todo(space: Workspace, only: str | None, start: str | None) -> list[Stage]:
    quiet_libraries()
    found = plan.stages_of(space)
    todo = plan.chosen(found, only, start)
    check(space)
    _check_below(found, todo)
    return todo


def _run(stage: Stage, force: bool, title: str) -> None:
    state = plan.state_of(stage)
    if state.kind == STANDS and not force:
        say(f"{title}: {stage.output} stands")
        return
    say(f"{title}: {stage.output}{_because(state, force)}")
    watch = Stopwatch()
    occupied = stage.output.is_dir() and any(stage.output.iterdir())
    stage.make({"keep": True}, occupied)
    say(f"{title}: made in {watch.seconds():,.0f} s")


def _because(state: State, force: bool) -> str:
    if state.kind == plan.UNFINISHED:
        return f", going on from {state.why}"
    if state.kind == plan.STALE:
        return f", made again: it was {state.why}"
    return ", made again" if state.kind == STANDS and force else ""


def _check_below(found: list[Stage], todo: list[Stage]) -> None:
    """With --only and --from: what the first ones read has to be there."""
    chosen = {stage.name for stage in todo}
    for stage in todo:
        for name in stage.reads:
            below = next(other for other in found if other.name == name)
            if name not in chosen and not below.output.is_dir():
                raise UserError(
                    f"{stage.name} reads {below.output}, which {name} has not made yet; begin with --from {name}."
                )


def check(space: Workspace) -> None:
    """Raise UserError for what any stage would trip over: settings, files, names. Nothing is made."""
    from chinese_llama.adapt import launch
    from chinese_llama.adapt.subjects import check_settings
    from chinese_llama.train.fields import checked
    from chinese_llama.train.jobs import JOBS

    base = space.base()
    if not is_hub_id(base) and not Path(base).is_dir():
        raise UserError(f"{space.file}: base: {base}: no such directory.")
    launch.launch_file(space)
    for name, (fields, _) in JOBS.items():
        if getattr(space.settings, name).get("data"):
            defaults = launch.recipe(name, space).DEFAULTS
            checked(name, fields, defaults, ["--workspace", str(space.file)])
    check_settings(space)


def ending(output: Path) -> tuple[list[str], str]:
    """The sentences of a report on limits (eval.max_regression) that the result breaks, and all of it as text."""
    from chinese_llama.adapt.measures import read_told
    from chinese_llama.evaluate.report.terminal import text

    told = read_told(output)
    over = [sentence for part in told["comparisons"] for sentence in part["sentences"]]
    lines = [text(told), f"Report: {output / 'report.html'} (and .md)"]
    if told.get("answers"):
        lines.append(f"All answers: {told['answers']} (chinese-llama rate, chinese-llama judge)")
    return over, "\n".join(lines)
