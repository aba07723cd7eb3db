"""The stage `merge` as a workspace or a command line runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chinese_llama import workspace as workspaces
from chinese_llama.artifacts import Manifest, hash_ahead
from chinese_llama.errors import UserError, nearest
from chinese_llama.hub import local
from chinese_llama.merging.plan import (
    DTYPES,
    FORMATS,
    Plan,
    find_plan,
    parse_list,
    parse_weights,
    plan_of,
    read_plan,
)
from chinese_llama.workspace import Workspace

Given = dict[str, Any]


def merged_model(space: Workspace | None, given: Given, force: bool) -> tuple[Path, Manifest]:
    """Run `merge` with the options `given` and those of the plan or the workspace for the others."""
    plan, base, output, keep = planned(space, given)
    keep = given.get("keep", keep)
    hash_ahead([base, *(adapter.path for adapter in plan.adapters)])  # while torch is imported
    from chinese_llama.merging.stream import merge

    return output, merge(base, plan.steps, output, _options(plan, given, force), keep)


def described(space: Workspace | None, given: Given, force: bool) -> str:
    """What `merge` would do, and what it would cost."""
    plan, base, output, _ = planned(space, given)
    from chinese_llama.merging.cost import cost
    from chinese_llama.merging.describe import describe
    from chinese_llama.merging.stream import Work

    work = Work(base, plan.steps, _options(plan, given, force))
    total, contents = cost(work)
    return describe(plan, base, output, total, contents, work.forced)


def planned(space: Workspace | None, given: Given) -> tuple[Plan, Path, Path, bool]:
    """The plan, its base and its output, and whether an output that stands is kept (the workspace's own is)."""
    if "plan" in given and ("loras" in given or "weights" in given):
        raise UserError("--plan says which adapters and weights; leave out --loras and --weights.")
    _check_given(space, given)
    if "plan" in given:
        plan = read_plan(find_plan(given["plan"]), space)
    else:
        own = ",".join(map(space.item, space.settings.merge.loras)) if space else ""
        weights = parse_weights(given["weights"]) if "weights" in given else None
        plan = plan_of(parse_list(given.get("loras", own)), weights, space)
    plan.dtype = _known("--dtype", given.get("dtype"), DTYPES) or plan.dtype
    plan.format = _known("--format", given.get("format"), FORMATS) or plan.format
    if given.get("resume") and plan.format == "meta":
        raise UserError(
            "--resume is for --format hf: Meta's files are all finished at the end; leave it out."
        )
    base = _base(space, given.get("base") or plan.base)
    output = given.get("output") or plan.output
    if output is not None:
        return plan, base, Path(output), False
    space = _needed(space, "--output")
    return plan, base, space.path(space.settings.merge.output), True


def _check_given(space: Workspace | None, given: Given) -> None:
    """Without a workspace, everything must be said; say at once what is missing."""
    if space is None and "plan" not in given:
        missing = [f"--{name}" for name in ("base", "loras", "output") if name not in given]
        if missing:
            workspaces.required("merge", " and ".join(missing))


def _needed(space: Workspace | None, option: str) -> Workspace:
    return space if space is not None else workspaces.required("merge", option)


def _base(space: Workspace | None, place: str | Path | None) -> Path:
    if place is not None:
        found = local(place)
        if not found.is_dir():
            raise UserError(f"{found}: no such directory (--base).")
        return found
    space = _needed(space, "--base")
    base = space.path(space.settings.extend_model.output)
    if not base.is_dir():
        raise UserError(f"{base} does not exist; make it with chinese-llama extend-model, or give --base.")
    return base


def _known(option: str, value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise UserError(f"{option} {value!r}{nearest(value, known)}; one of {', '.join(known)}.")
    return value


def _options(plan: Plan, given: Given, force: bool) -> Any:
    from chinese_llama.merging.stream import Options

    kept = {name: given[name] for name in ("workers", "verify", "resume") if name in given}
    return Options(dtype=plan.dtype, format=plan.format or "hf", force=force, **kept)
