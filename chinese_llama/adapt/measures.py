"""The stage `eval`: measure the models of a workspace, let base and result answer, write the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from chinese_llama import __version__
from chinese_llama.adapt import check, subjects
from chinese_llama.adapt.made import made_from
from chinese_llama.adapt.plan import REMEMBERED, REPORT
from chinese_llama.adapt.subjects import BASE, CONTROL, Measured
from chinese_llama.artifacts import (
    Keep,
    Manifest,
    identity,
    input_record,
    now,
    read_manifest,
    stands,
    write_manifest,
)
from chinese_llama.directories import new_directory, write_text
from chinese_llama.errors import Interrupted, UserError
from chinese_llama.evaluate.answers import How, answer_file, read_answers, read_prompts, right
from chinese_llama.evaluate.compare import broken
from chinese_llama.evaluate.models import check_subject
from chinese_llama.evaluate.report.page import html
from chinese_llama.evaluate.report.twin import markdown
from chinese_llama.evaluate.run import compared, measure, speeds
from chinese_llama.progress import say
from chinese_llama.workspace import Workspace

Told = dict[str, Any]


def evaluated(space: Workspace, force: bool, keep: Keep = True) -> Manifest:
    """Write the report of the models that are there; one that stands is kept. Measured figures are remembered beside
    it, so that only what is new is measured. Raises UserError."""
    output = space.path(space.settings.eval.output)
    sets, found = subjects.texts(space), subjects.subjects(space)
    manifest = _manifest(space, found, sets)
    if stands(output, manifest, force, keep):
        return read_manifest(output) or manifest
    check.limits(space, sets)
    for item in found:
        check_subject(item.subject)
    figures = {}
    for item in found:
        say(f"measuring: {item.label}")
        asked = subjects.request(space, item.whole, sets)
        figures[item.subject.name] = measure(item.subject, asked, output.with_name(REMEMBERED))
    if space.settings.eval.speed and sets:
        whole = [item.subject for item in found if item.whole]
        decoded = speeds(whole, sets, output.with_name(REMEMBERED))
        for subject, one in zip(whole, decoded, strict=True):
            figures[subject.name]["speed"] = one
    told = {
        "title": space.settings.title or f"Adaptation of {Path(space.base()).name}",
        "created": now(),
        "tool": f"chinese_llama {__version__}",
        "stages": [_stage(item, figures[item.subject.name]) for item in found],
        "comparisons": _comparisons(space, figures),
        **made_from(space, found, manifest),
        **_answers(space, found, output.with_name(REMEMBERED)),
    }
    manifest.metrics = {"stages": [{"name": s["name"], "texts": s["texts"]} for s in told["stages"]]}
    with new_directory(output, force, manifest.places()) as partial:
        write_text(partial / REPORT, json.dumps(told, ensure_ascii=False, indent=1) + "\n")
        write_text(partial / "report.md", markdown(told))
        write_text(partial / "report.html", html(told))
        write_manifest(partial, manifest)
    return manifest


def _manifest(space: Workspace, found: list[Measured], sets: dict[str, Path]) -> Manifest:
    section = space.settings.eval
    places = {item.subject.name: item.subject.directory for item in found if not item.subject.adapters}
    places |= {a.name: a.path for item in found for a in item.subject.adapters}
    places |= {f"text:{name}": file for name, file in sets.items()}
    for name in ("prompts", "wikitext"):
        if file := getattr(section, name):
            places[name] = space.path(file)
    places |= {
        f"choices:{e}": space.path(p) for e, p in section.choices.items() if p and space.path(p).exists()
    }
    settings = {name: value for name, value in dataclasses.asdict(section).items() if name != "output"}
    settings["title"] = space.settings.title
    inputs = {role: input_record(place) for role, place in places.items()}
    inputs |= {  # figures depend on more than the weights
        f"tokenizer or config of {item.subject.name}": {
            "path": str(item.subject.directory),
            "sha256": item.subject.digest(),
        }
        for item in found
    }
    return Manifest("report", "adapt", inputs, settings)


def _stage(item: Measured, figures: Told) -> Told:
    told = {key: figures[key] for key in ("texts", "choices", "wikitext", "device", "dtype")}
    return {"name": item.subject.name, "label": item.label, "speed": figures.get("speed"), **told}


def _comparisons(space: Workspace, figures: dict[str, Told]) -> list[Told]:
    """The result and what pretraining gave against the base, and against the control."""
    stages = [name for name in figures if name not in (BASE, subjects.EXTENDED, CONTROL)]
    if not stages:
        return []
    result = stages[-1]
    pairs = [(result, BASE)]
    if CONTROL in figures:
        pairs += [(CONTROL, BASE), (stages[0], CONTROL)]
    limits = space.settings.eval.max_regression
    return [
        _comparison(figures, stage, below, limits if (stage, below) == pairs[0] else {})
        for stage, below in pairs
    ]


def _comparison(figures: dict[str, Told], stage: str, baseline: str, limits: dict[str, float]) -> Told:
    sets = compared(figures[stage], figures[baseline])
    over = broken(sets, limits)
    return {
        "stage": stage,
        "baseline": baseline,
        "texts": sets,
        "limits": limits,
        "broken": list(over),
        "sentences": list(over.values()),
    }


def _answers(space: Workspace, found: list[Measured], below: Path) -> Told:
    """What base and result say to the prompts: some of the answers, and how many hold the right word. All are in a
    directory below `below`, for `rate` and `judge`."""
    file = space.settings.eval.prompts
    if not file:
        return {"notes": []}
    try:
        return {**_answered(space, found, space.path(file), below), "notes": []}
    except Interrupted:
        raise
    except UserError as error:  # the figures are there: a prompt that does not fit must not cost the report
        say(f"Warning: the prompts are not in the report: {error}")
        return {"notes": [f"The prompts were not answered: {error}"]}


def _answered(space: Workspace, found: list[Measured], file: Path, below: Path) -> Told:
    prompts, how = read_prompts(file), How(space.settings.eval.max_new_tokens)
    asked = dict(zip("AB", [item.subject for item in found if item.whole], strict=False))
    parts = [identity(file), str(how), *(subject.digest() for subject in asked.values())]
    output = below / f"answers-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"
    answer_file(file, {label: subject.place for label, subject in asked.items()}, output, how)
    said, _, _ = read_answers(output)
    rows = list(zip(said, prompts, strict=True))
    names = {label: subject.name for label, subject in asked.items()}
    shares = {name: right([one.answers[label] for one in said], prompts) for label, name in names.items()}
    count = min(space.settings.eval.samples, len(rows))
    shown = [rows[i * len(rows) // count] for i in range(count)]
    samples = [
        {
            "prompt": o.prompt,
            "keyword": p.keyword,
            "answers": {names[k]: text for k, text in o.answers.items()},
        }
        for o, p in shown
    ]
    told = {name: share for name, share in shares.items() if share}
    return {"samples": samples, "right": told, "answers": str(output)}
