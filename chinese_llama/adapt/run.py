"""`adapt`: make what is missing or stale, stage by stage, and end with the report."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from chinese_llama.adapt import plan
from chinese_llama.adapt.plan import STANDS, Stage, State
from chinese_llama.adapt.settled import settle, settled
from chinese_llama.directories import alone_in
from chinese_llama.errors import BadFile, UserError
from chinese_llama.hub import is_hub_id
from chinese_llama.merging.adapter import read_object
from chinese_llama.progress import Stopwatch, say
from chinese_llama.workspace import Workspace


def adapt(
    space: Workspace, only: str | None = None, start: str | None = None, force: bool = False
) -> tuple[list[str], str]:
    """Run the stages of the workspace that are missing or stale (with `force`: all of them), or `only` one, or
    those from `start` on; return the sentences of limits that the result breaks, and the report for a terminal.

    Raises UserError before anything is made where a setting or an input of any stage is wrong, and where another
    process runs stages of this file.
    """
    watch = Stopwatch()
    found = plan.stages_of(space)
    todo = plan.chosen(found, only, start)
    known = not force and settled(space, found)
    if not known:
        _check(space, found, todo)
    with contextlib.nullcontext() if known else alone_in(space.file):
        for number, stage in enumerate(todo, 1):
            _run(stage, force, f"[{number}/{len(todo)}] {stage.name}", space, known)
        if not known and len(todo) == len(found):
            settle(space, plan.stages_of(space))
    if len(todo) > 1:
        say(f"All stages stand after {watch.seconds():,.0f} s.")
    return ending(todo[-1].output) if todo[-1].name == "eval" else ([], "")


def planned(space: Workspace, only: str | None = None, start: str | None = None, force: bool = False) -> str:
    """What `adapt` would do, and what it needs. Raises UserError as it does, and for a base that is still to be fetched.
    Nothing is written."""
    from chinese_llama.adapt.cost import table

    _on_disk(space.base())
    found = plan.stages_of(space)
    todo = plan.chosen(found, only, start)
    _check(space, found, todo)
    told = plan.states(found)
    if force:
        told |= {s.name: State(plan.STALE, "--force") for s in todo if told[s.name].kind == STANDS}
    return table(space, todo, told)


def _on_disk(base: str) -> None:
    if not is_hub_id(base):
        return
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(base, local_files_only=True)
    except Exception as error:  # the hub's errors have no common base
        raise UserError(
            f"{base} is not on this disk yet, and a plan fetches nothing; get it first: hf download {base}."
        ) from error


def _check(space: Workspace, found: list[Stage], todo: list[Stage]) -> None:
    """Raise UserError for what one of the stages would trip over."""
    from chinese_llama.adapt import check
    from chinese_llama.model.load import quiet_libraries

    quiet_libraries()
    check.check(space, found)
    check.below(found, todo)


def _run(stage: Stage, force: bool, title: str, space: Workspace, known: bool) -> None:
    """Make a stage that does not stand; all are `known` to stand, or it is asked."""
    state = State(STANDS) if known else plan.state_of(stage) if stage.begun else State(plan.MISSING)
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
    from chinese_llama.evaluate.report.terminal import text

    told = _read(output / plan.REPORT)
    over = [sentence for part in told["comparisons"] for sentence in part["sentences"]]
    lines = [text(told), f"Report: {output / 'report.html'} (and .md)"]
    if told.get("answers") and Path(told["answers"]).is_dir():
        lines.append(f"All answers: {told['answers']} (chinese-llama rate, chinese-llama judge)")
    return over, "\n".join(lines)


def _read(file: Path) -> dict[str, Any]:
    """What a report was written from. Raises BadFile where it is damaged."""
    told = read_object(file)
    if not isinstance(told.get("comparisons"), list):
        raise BadFile(file, "is no report of this tool; chinese-llama adapt --only eval --force makes it.")
    return told
