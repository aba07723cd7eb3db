"""What `eval` measures: which models, on which texts and exams, against which baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chinese_llama import workspace as workspaces
from chinese_llama.errors import UserError, nearest
from chinese_llama.evaluate.models import Subject
from chinese_llama.evaluate.run import Request
from chinese_llama.merging.plan import parse_list, resolve
from chinese_llama.workspace import Workspace

Given = dict[str, Any]


@dataclass
class Asked:
    """What a command line asks for: the subjects, one of which is compared with if `baseline` says so (it is not
    among them), by how much the bits per byte of a text may rise over its, and whether decoding is timed."""

    subjects: list[Subject]
    request: Request
    baseline: Subject | None = None
    limits: dict[str, float] = field(default_factory=dict)
    speed: bool = False


def evaluation(space: Workspace | None, given: Given) -> Asked:
    """What the options of `eval` and the workspace ask for. Raises UserError, before anything is read."""
    _check_given(space, given)
    request, own = _request(space, given)
    subjects = _subjects(space, given)
    limits = _limits(given.get("max_regression", ()))
    if own and not limits and space:
        limits = _checked(
            {n: float(v) for n, v in space.settings.eval.max_regression.items()}, str(space.file)
        )
    for name in limits:
        if name not in request.texts:
            known = ", ".join(request.texts) or "none"
            raise UserError(
                f"--max-regression {name}: no text of that name{nearest(name, request.texts)}; measured are {known}."
            )
    baseline = _baseline(space, given, subjects, limits)
    if baseline:
        _name_apart(subjects, baseline)
    return Asked(subjects, request, baseline, limits if baseline else {}, given.get("speed", False))


def _check_given(space: Workspace | None, given: Given) -> None:
    """Without a workspace, say at once what is missing; and refuse what has no meaning."""
    if "base" in given and "loras" not in given:
        raise UserError("--base is what the adapters of --loras are put on; for a plain model give --model.")
    if space is None:
        missing = ["--model"] if not {"model", "loras"} & set(given) else []
        missing += ["--base"] if "loras" in given and "base" not in given else []
        missing += ["--text"] if not {"text", "choices", "wikitext"} & set(given) else []
        if missing:
            workspaces.required("eval", " and ".join(missing))


def _request(space: Workspace | None, given: Given) -> tuple[Request, bool]:
    """What is measured, and whether the workspace says so."""
    ours = space.settings.eval if space else workspaces.Eval()
    request = Request(
        stride=given.get("stride", ours.stride),
        window=given.get("window", ours.window),
        shots=given.get("shots", ours.shots),
    )
    own = space is not None and not {"text", "choices", "wikitext"} & set(given)
    if space and own:
        request.texts = {name: space.path(file) for name, file in ours.text.items()}
        request.choices = {exam: space.place(place) for exam, place in ours.choices.items()}
        request.wikitext = space.path(ours.wikitext) if ours.wikitext else None
        if not (request.texts or request.choices or request.wikitext):
            raise UserError(
                f"{space.file} names no texts, and pretraining holds none out (pt_lora.eval_split); add eval.text, or give "
                "--text NAME=FILE."
            )
    else:
        request.texts = {
            name: Path(file).expanduser()
            for name, file in _pairs("--text", given.get("text", ()), "NAME=FILE")
        }
        exams = [
            item if "=" in item else f"{item}={ours.choices.get(item, '')}"
            for item in given.get("choices", ())
        ]
        request.choices = dict(_pairs("--choices", exams, "EXAM=DIRECTORY"))
        request.wikitext = given.get("wikitext")
    _check_twice(request.texts)
    if given.get("speed") and not request.texts:
        raise UserError("--speed decodes the beginning of a text; give --text NAME=FILE too.")
    return request, own


def _pairs(option: str, items: Sequence[str], form: str) -> Iterable[tuple[str, str]]:
    """(name, value) of each NAME=VALUE. Raises UserError for another form, or a name given twice."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} {item}: write {form}.")
        if name in found:
            raise UserError(f"{option} {item}: {name!r} is given twice; give each a name of its own.")
        found[name] = value
    return found.items()


def _check_twice(texts: dict[str, Path]) -> None:
    """Raise UserError for a file under two names."""
    seen: dict[Path, str] = {}
    for name, path in texts.items():
        other = seen.setdefault(path.expanduser().resolve(), name)
        if other != name:
            raise UserError(f"The texts {other!r} and {name!r} are the same file ({path}); give it once.")


def _subjects(space: Workspace | None, given: Given) -> list[Subject]:
    subjects = []
    if "model" in given:
        subjects.append(_plain(given["model"]))
    if "loras" in given:
        subjects.append(_unmerged(space, given))
    if subjects or space is None:
        return subjects
    merged = space.path(space.settings.merge.output)
    return [Subject("merged", str(merged)) if merged.is_dir() else Subject("base", space.base())]


def _plain(place: str) -> Subject:
    return Subject(Path(place).resolve().name, place)


def _name_apart(subjects: list[Subject], baseline: Subject) -> None:
    """Call models by their whole places where the last part is the same; a model may be its own baseline."""
    for one in subjects:
        if one.name == baseline.name:
            one.name, baseline.name = one.place, baseline.place
        if one.name == baseline.name:
            baseline.name += " (baseline)"


def _unmerged(space: Workspace | None, given: Given) -> Subject:
    adapters = [resolve(item, space) for item in parse_list(given["loras"])]
    place = given.get("base") or str(_extended(space or workspaces.required("eval", "--base")))
    return Subject(" + ".join([Path(place).name, *(a.name for a in adapters)]), place, adapters)


def _extended(space: Workspace) -> Path:
    place = space.path(space.settings.extend_model.output)
    if not place.is_dir():
        raise UserError(f"{place} does not exist; make it with chinese-llama extend-model, or give --base.")
    return place


def _baseline(
    space: Workspace | None, given: Given, subjects: list[Subject], limits: dict[str, float]
) -> Subject | None:
    """What is compared with: --baseline, else the workspace's base where nothing is given, or a limit needs one."""
    if "baseline" in given:
        return _plain(given["baseline"])
    bare = not {"model", "loras"} & set(given)
    if bare and subjects[0].name == "base":  # there is nothing yet to compare with it
        if "max_regression" in given:
            raise UserError(
                "--max-regression compares with the base, and nothing is merged yet; give --model."
            )
        return None
    if space and space.settings.base and (bare or limits):
        return Subject("base", space.base())
    if limits:
        raise UserError("--max-regression needs a model to compare with; give --baseline DIR.")
    return None


def _limits(items: Sequence[str]) -> dict[str, float]:
    """{name: share} of `--max-regression NAME=SHARE`."""
    found = {}
    for name, value in _pairs("--max-regression", items, "NAME=SHARE, for example en=0.02"):
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
    return _checked(found, "--max-regression")


def _checked(limits: dict[str, float], where: str) -> dict[str, float]:
    for name, limit in limits.items():
        if not (math.isfinite(limit) and limit >= 0):
            raise UserError(f"{where}: {name}: a limit is a share of 0 or more; 0.02 is 2 %.")
    return limits
