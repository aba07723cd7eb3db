"""The stages, texts and comparisons that are in `told`, found once for all three forms of a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chinese_llama.evaluate.report.values import (
    Measure,
    clean,
    cut,
    items,
    mapping,
    measure,
    number,
    one_line,
    records,
)

LANGUAGES = {"zh": "Chinese", "en": "English", "ja": "Japanese", "ko": "Korean"}
LONGEST = 60  # columns of a name
CHINESE = ("zh", "cn", "chinese", "中")


@dataclass(frozen=True)
class Stage:
    """A model that was measured. `kind` is base, stage, final (what the work was for) or control."""

    name: str
    label: str
    kind: str
    told: dict[str, Any]

    def figures(self, text: str) -> dict[str, Any]:
        return mapping(mapping(self.told.get("texts")).get(text))

    def bits(self, text: str, unit: str) -> Measure | None:
        """Bits per `unit` (character, byte) of a text, with its interval."""
        figures = self.figures(text)
        key = f"bits_per_{unit}"
        return measure(figures.get(key), mapping(figures.get("interval")).get(key))

    def tokens_per_character(self, text: str) -> float | None:
        held = number(self.figures(text).get("characters_per_token"))
        return 1 / held if held and held > 0 else None

    def speed(self, key: str = "characters_per_second") -> float | None:
        return number(mapping(self.told.get("speed")).get(key))

    def exams(self) -> dict[str, dict[str, Any]]:
        """Name of a multiple-choice exam ('ceval', 'cmmlu (2)' where one was taken twice) -> its figures."""
        found: dict[str, dict[str, Any]] = {}
        for exam in records(self.told.get("choices")):
            name = one_line(exam.get("exam")) or "exam"
            again = sum(key.split(" (")[0] == name for key in found)
            found[f"{name} ({again + 1})" if again else name] = exam
        return found


@dataclass(frozen=True)
class Change:
    """Relative change of the bits of a text; negative is better."""

    difference: Measure | None
    verdict: str
    limit: float | None
    broken: bool

    @property
    def kind(self) -> str:
        """good, bad or '': worse within a limit that was allowed is neither."""
        if self.broken or (self.verdict == "worse" and self.limit is None):
            return "bad"
        return "good" if self.verdict == "better" else ""


@dataclass(frozen=True)
class Comparison:
    stage: Stage
    baseline: Stage
    texts: dict[str, Change]


@dataclass(frozen=True)
class View:
    """`told` in order: what is not there is empty."""

    told: dict[str, Any]
    stages: list[Stage]
    texts: list[str]  # names, in the order of the stages
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def base(self) -> Stage | None:
        return self._of("base")

    @property
    def final(self) -> Stage | None:
        return self._of("final")

    @property
    def controls(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.kind == "control"]

    @property
    def chinese(self) -> str | None:
        """The text that the work was for: the one with a Chinese name, else the first of three bytes a character."""
        named = [text for text in self.texts if text.lower().startswith(CHINESE)]
        return next(
            iter([*named, *(text for text in self.texts if self.bytes_per_character(text) > 2)]), None
        )

    def bytes_per_character(self, text: str) -> float:
        """1.0 where it is not known."""
        for stage in self.stages:
            figures = stage.figures(text)
            for over, under in (("bits_per_character", "bits_per_byte"), ("bytes", "characters")):
                above, below = number(figures.get(over)), number(figures.get(under))
                if above and below and below > 0:
                    return above / below
        return 1.0

    def by_character(self, text: str) -> bool:
        """Whether bits per character say something that bits per byte do not."""
        return text == self.chinese or self.bytes_per_character(text) > 1.2

    def measured(self, text: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.figures(text)]

    def comparison(self, stage: Stage | None) -> Comparison | None:
        """What a stage was compared with: the base where it was, else the first baseline."""
        found = [one for one in self.comparisons if stage and one.stage == stage]
        return next(iter(sorted(found, key=lambda one: one.baseline.kind != "base")), None)

    def samples(self) -> list[dict[str, Any]]:
        return [sample for sample in records(self.told.get("samples")) if mapping(sample.get("answers"))]

    def stage(self, name: str) -> Stage:
        """The stage of a name; one that was not measured gets it as its label."""
        name = clean(name)
        found = (one for one in self.stages if one.name == name)
        return next(found, Stage(name, _label(name), "stage", {}))

    def _of(self, kind: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.kind == kind), None)


def view(told: dict[str, Any]) -> View:
    """Read `told` (the schema of `report.json`); parts of another type than expected count as missing."""
    told = mapping(told)
    found = records(told.get("stages"))
    names: list[str] = []
    for index, stage in enumerate(found, 1):
        name = clean(stage.get("name")) or f"stage {index}"
        names.append(f"{name} ({index})" if name in names else name)
    kinds = _kinds(names)
    stages = [
        Stage(name, _label(stage.get("label")) or _label(name), kind, stage)
        for name, kind, stage in zip(names, kinds, found, strict=True)
    ]
    texts = list(dict.fromkeys(text for stage in stages for text in mapping(stage.told.get("texts"))))
    seen = View(told, stages, [text for text in texts if any(stage.figures(text) for stage in stages)])
    compared = [_comparison(seen, one) for one in records(told.get("comparisons"))]
    return View(told, stages, seen.texts, [one for one in compared if one.texts])


def _kinds(names: list[str]) -> list[str]:
    """base: that name, else the first; final: 'merged', else the last; both of those that are no control."""
    own = [index for index, name in enumerate(names) if not name.lower().startswith("control")]
    kinds = ["stage" if index in own else "control" for index in range(len(names))]
    if own:
        kinds[next((index for index in own if names[index] == "base"), own[0])] = "base"
        rest = [index for index in own if kinds[index] == "stage"]
        if rest:
            kinds[next((index for index in rest if names[index] == "merged"), rest[-1])] = "final"
    return kinds


def _comparison(seen: View, told: dict[str, Any]) -> Comparison:
    limits = mapping(told.get("limits"))
    broken = [str(name) for name in items(told.get("broken"))]
    texts = {
        name: Change(
            measure(change.get("difference"), change.get("interval")),
            one_line(change.get("verdict")),
            number(limits.get(name)),
            name in broken,
        )
        for name, change in ((name, mapping(value)) for name, value in mapping(told.get("texts")).items())
    }
    baseline = seen.stage(told["baseline"]) if told.get("baseline") else seen.base
    return Comparison(
        seen.stage(told.get("stage", "")), baseline or Stage("", "the baseline", "base", {}), texts
    )


def text_label(text: str) -> str:
    """'Chinese (zh)' for the usual short names, else the name."""
    name = _label(text)
    return f"{LANGUAGES[name]} ({name})" if name in LANGUAGES else name or "(no name)"


def _label(name: object) -> str:
    return cut(one_line(name), LONGEST)
