"""`adapt`: make what is missing or stale, stage by stage, and end with the report."""

from __future__ import annotations

from pathlib import Path

from chinese_llama.adapt import check, plan
from chinese_llama.adapt.plan import STANDS, Stage, State
from chinese_llama.errors import UserError
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
    _, todo = _stages(space, only, start)
    for number, stage in enumerate(todo, 1):
        _run(stage, force, f"[{number}/{len(todo)}] {stage.name}", space)
    if len(todo) > 1:
        say(f"All stages stand after {watch.seconds():,.0f} s.")
    return ending(todo[-1].output) if todo[-1].name == "eval" else ([], "")


def planned(space: Workspace, only: str | None = None, start: str | None = None, force: bool = False) -> str:
    """What `adapt` would do, and what it needs. Raises UserError as it does. Nothing is written."""
    from chinese_llama.adapt.cost import table

    found, todo = _stages(space, only, start)
    told = plan.states(found)
    if force:
        told |= {s.name: State(plan.STALE, "--force") for s in todo if told[s.name].kind == STANDS}
    return table(space, todo, told)


def _stages(space: Workspace, only: str | None, start: str | None) -> tuple[list[Stage], list[Stage]]:
    """All stages of the workspace, and those that are to be looked at."""
    quiet_libraries()
    found = plan.stages_of(space)
    todo = plan.chosen(found, only, start)
    check.check(space, found)
    check.below(found, todo)
    return found, todo


def _run(stage: Stage, force: bool, title: str, space: Workspace) -> None:
    state = plan.state_of(stage)
    shown = space.shown(stage.output)
    if state.kind == STANDS and not force:
        say(f"{title}: {shown} stands")
        return
    if state.kind == plan.BLOCKED and not force:
        raise UserError(
            f"{stage.name}: {state.why}; give those back to finish it, or start anew: chinese-llama adapt --only "
            f"{stage.name} --force."
        )
    say(f"{title}: {shown}{_because(state, force)}")
    watch = Stopwatch()
    stage.make({"keep": True}, force or stage.occupied)
    say(f"{title}: made in {watch.seconds():,.0f} s")


def _because(state: State, force: bool) -> str:
    if state.kind == plan.UNFINISHED:
        return f", going on from {state.why}"
    if state.kind == plan.STALE:
        return f", made again: it was {state.why}"
    return ", made again" if state.kind == STANDS and force else ""


def ending(output: Path) -> tuple[list[str], str]:
    """The sentences of a report on limits (eval.max_regression) that the result breaks, and all of it as text."""
    from chinese_llama.adapt.measures import read_told
    from chinese_llama.evaluate.report.terminal import text

    told = read_told(output)
    over = [sentence for part in told["comparisons"] for sentence in part["sentences"]]
    lines = [text(told), f"Report: {output / 'report.html'} (and .md)"]
    if told.get("answers") and Path(told["answers"]).is_dir():
        lines.append(f"All answers: {told['answers']} (chinese-llama rate, chinese-llama judge)")
    return over, "\n".join(lines)
