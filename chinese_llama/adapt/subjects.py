"""What the stage `eval` looks at: the models of a workspace, stage by stage, and the texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chinese_llama.adapt import control
from chinese_llama.evaluate.models import Subject
from chinese_llama.evaluate.run import Request
from chinese_llama.hub import local
from chinese_llama.merging.plan import resolve
from chinese_llama.workspace import Workspace

BASE, EXTENDED, CONTROL, MERGED = "base", "extended", "control", "merged"


@dataclass(frozen=True)
class Measured:
    """A model of the way; `whole`: also measured by what takes long (multiple choice, speed)."""

    subject: Subject
    label: str
    whole: bool = False


def subjects(space: Workspace) -> list[Measured]:
    """The models that are there: base, extended, control, each adapter on those below it, unmerged, and merged."""
    s = space.settings
    base, extended = local(space.base()), space.path(s.extend_model.output)
    found = [Measured(Subject(BASE, str(base)), BASE, whole=True)]
    if extended.is_dir():
        found.append(Measured(Subject(EXTENDED, str(extended)), "new rows, untrained"))
    if s.control is not None and control.output(space).is_dir():
        adapter = resolve(f"{CONTROL}={control.output(space)}", space)
        found.append(Measured(Subject(CONTROL, str(base), [adapter]), "control, without new pieces"))
    adapters = [resolve(space.item(item), space) for item in s.merge.loras]
    below = str(extended if extended.is_dir() else base)
    for count, adapter in enumerate(adapters, 1):
        found.append(Measured(Subject(adapter.name, below, adapters[:count]), f"after {adapter.name}"))
    if adapters and (merged := space.path(s.merge.output)).is_dir():
        found.append(Measured(Subject(MERGED, str(merged)), MERGED, whole=True))
    return found


def texts(space: Workspace) -> dict[str, Path]:
    """{name: file} of what is measured: eval.text, else what the pretraining holds out; {} where there is neither."""
    named = space.settings.eval.text
    if named or not (space.settings.pt_lora.get("data") and space.settings.pt_lora.get("eval_split")):
        return {name: space.path(file) for name, file in named.items()}
    from chinese_llama.train.jobs import prepare_ahead

    return prepare_ahead("pt_lora", ["--workspace", str(space.file)]).held_out()


def exams(space: Workspace) -> dict[str, str]:
    """{exam: place} of the multiple choice that is asked for."""
    return {
        exam: space.place(place) if place else place for exam, place in space.settings.eval.choices.items()
    }


def request(space: Workspace, whole: bool, sets: dict[str, Path]) -> Request:
    """What is measured of a model."""
    section = space.settings.eval
    made = Request(sets, section.stride, section.window)
    if whole:
        made.choices = exams(space)
        made.shots = section.shots
        made.wikitext = space.path(section.wikitext) if section.wikitext else None
    return made
