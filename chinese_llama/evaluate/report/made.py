"""The sections on what was made and from what: vocabulary, speed, answers, artifacts, settings."""

from __future__ import annotations

import json
from typing import Any

from chinese_llama.evaluate.report.blocks import Answer, Block, Cell, Evidence, Sample, Section, Table, Terms
from chinese_llama.evaluate.report.dots import Axis, Mark, Row, dots
from chinese_llama.evaluate.report.measured import by_stage, stage_cell
from chinese_llama.evaluate.report.values import (
    Measure,
    clean,
    count,
    fixed,
    items,
    mapping,
    measure,
    number,
    one_line,
    records,
    shares,
)
from chinese_llama.evaluate.report.view import View

SHORT = 12  # characters of a hash
WRITTEN = 200_000  # characters of all answers together; longer ones are cut, evenly
TOKENS = (
    "Tokens per character",
    "how many steps the model takes to write a character: fewer is faster, and more text fits into its window.",
)


def vocabulary(view: View) -> Section | None:
    told = mapping(view.told.get("vocabulary"))
    if not told:
        return None
    rows = _scripts(told)
    blocks: list[Block] = [sentence] if (sentence := _sizes(told)) else []
    if rows:
        blocks.append(_script_evidence(rows))
    if rows and one_line(told.get("measured_on")):
        blocks.append(f"Measured on: {one_line(told['measured_on'])}.")
    return Section("Vocabulary", [*blocks, Terms([TOKENS])]) if blocks else None


def _sizes(told: dict[str, Any]) -> str:
    base, size, added = (count(told.get(key)) for key in ("base_size", "size", "added"))
    said = f"{base} pieces of the base" if base else ""
    said += f" + {added} new ones" if added and said else f"{added} new pieces" if added else ""
    said += f" = {size} pieces" if size and said else f"{size} pieces" if size else ""
    policy = one_line(told.get("policy"))
    return f"{said}.{f' Policy: {policy}.' if policy else ''}" if said else ""


def _scripts(told: dict[str, Any]) -> list[tuple[str, float | None, float | None, str]]:
    """(script, tokens per character under the base, under the new vocabulary, characters)."""
    found = []
    for script, value in mapping(told.get("scripts")).items():
        item = mapping(value)
        characters = number(item.get("characters"))
        base, new = number(item.get("base_tokens")), number(item.get("tokens"))
        if characters and characters > 0 and (base or new):
            per = [tokens / characters if tokens else None for tokens in (base, new)]
            found.append((one_line(script), per[0], per[1], count(characters)))
    return found


def _script_evidence(found: list[tuple[str, float | None, float | None, str]]) -> Evidence:
    rows, cells = [], []
    for script, base, new, characters in found:
        both = ((base, "base", "base"), (new, "final", "extended"))
        marks = [
            Mark(Measure(value), kind, f"{script}, {who}: {fixed(value)} tokens per character")
            for value, kind, who in both
            if value is not None
        ]
        rows.append(Row(script, marks, fixed(new if new is not None else base)))
        cells.append([script, fixed(base), fixed(new), characters])
    gains = [(base / new, script) for script, base, new, _ in found if base and new]
    title = "Tokens per character by script"
    if gains and max(gains)[0] > 1.05:
        times, script = max(gains)
        title = f"{script}: {fixed(times, 1)} times fewer tokens than the base's vocabulary takes"
    legend = [
        (kind, label)
        for kind, label, at in (("base", "base", 1), ("final", "extended", 2))
        if any(one[at] is not None for one in found)
    ]
    axis = Axis("tokens per character", zero=True, joined=True)
    described = "Tokens per character by script, under the base's vocabulary and under the extended one."
    plot = dots(title, described, rows, axis, legend=legend)
    return Evidence([plot], [Table(["script", "base", "extended", "characters"], cells)])


def speed(view: View) -> Section | None:
    rows = by_stage(view, lambda stage: measure(stage.speed()), lambda one: fixed(one.value, 1))
    if not rows:
        return None
    first, last = (stage.speed() if stage else None for stage in (view.base, view.final))
    title = "Characters per second by stage"
    if first and last and view.final and view.base:
        title = f"{view.final.label} writes {fixed(last / first)} times the characters per second of {view.base.label}"
    described = "Characters per second in decoding, one token at a time, by stage."
    plot = dots(title, described, rows, Axis("characters per second", zero=True, stems=True))
    head = ["stage", "characters per second", "tokens per second", "characters per token"]
    cells: list[list[Cell | str]] = []
    for stage in view.stages:
        values = [stage.speed(key.replace(" ", "_")) for key in head[1:]]
        if any(value is not None for value in values):
            cells.append([stage_cell(stage), fixed(values[0], 1), fixed(values[1], 1), fixed(values[2])])
    used = [mapping(stage.told.get("speed")) for stage in view.stages]
    said = {one_line(one.get(key)) for one in used for key in ("device", "dtype")} - {""}
    names = sorted({one_line(one.get("text")) for one in used} - {""})
    note = f"The same text{f' ({names[0]})' if names else ''}, token by token with a cache, as in greedy decoding"
    note += f"; on {', '.join(sorted(said))}." if said else "."
    return Section("Decoding speed", [Evidence([plot], [Table(head, cells, note=note)])])


def rights(view: View) -> list[tuple[str, str, str]]:
    """(stage, '100 of 120', '83 % [76 %, 89 %]') of answers that held their keyword, the final stage first."""
    found = []
    for name, value in mapping(view.told.get("right")).items():
        told, stage = mapping(value), view.stage(name)
        right, asked = number(told.get("right")), number(told.get("questions"))
        part = number(told.get("share"))
        part = right / asked if part is None and right is not None and asked else part
        if right is not None and asked:
            said = shares(measure(part, told.get("interval")))
            found.append((stage.kind != "final", stage.label, f"{count(right)} of {count(asked)}", said))
    return [one[1:] for one in sorted(found, key=lambda one: one[0])]


def answers(view: View) -> Section | None:
    blocks: list[Block] = []
    right = rights(view)
    if right:
        blocks.append("An answer counts as right if it holds the keyword of its question.")
        rows: list[list[Cell | str]] = [list(one) for one in right]
        blocks.append(Table(["answered right", "questions", "share [95 % interval]"], rows))
    blocks += samples(view)
    return Section("Answers", blocks) if blocks else None


def samples(view: View) -> list[Sample]:
    found = view.samples()
    many = sum(len(mapping(sample["answers"])) for sample in found)
    most = max(200, WRITTEN // max(1, many))
    written = []
    for sample in found[: WRITTEN // 200]:
        keyword = clean(sample.get("keyword"))
        given = []
        for name, value in mapping(sample["answers"]).items():
            text, stage = clean(value).strip(), view.stage(name)
            holds = keyword in text if keyword else None
            given.append(Answer(stage.label, stage.kind, _shortened(text, most), holds))
        written.append(Sample(_shortened(clean(sample.get("prompt")), most), keyword, given))
    return written


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def artifacts(view: View) -> Section | None:
    rows: list[list[Cell | str]] = []
    for one in records(view.told.get("artifacts")):
        role, path, made = (one_line(one.get(key)) for key in ("role", "path", "made_by"))
        whole = one_line(one.get("sha256"))
        short = whole if len(whole) <= SHORT + 1 else whole[:SHORT] + "…"
        rows.append(
            [
                role,
                Cell(path, code=True),
                Cell(short, full=whole, code=True),
                count(one.get("vocab_size")),
                made,
            ]
        )
    if not rows:
        return None
    note = "sha256 of each; a pointer on a short one shows the whole, and the Markdown twin has them in full."
    return Section(
        "What was made from what", [Table(["what", "where", "sha256", "pieces", "made by"], rows, 5, note)]
    )


def settings(view: View) -> Section | None:
    blocks: list[Block] = []
    for name, value in mapping(view.told.get("settings")).items():
        pairs = mapping(value) or ({} if value in (None, {}, []) else {"": value})
        rows: list[list[Cell | str]] = [[Cell(one_line(k), code=True), _setting(v)] for k, v in pairs.items()]
        if rows:
            blocks.append(
                Table(["setting", "value"], rows, words=2, folded=f"{one_line(name)} ({len(rows)})")
            )
    return Section("Settings", blocks) if blocks else None


def _setting(value: Any) -> Cell:
    told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return Cell(one_line(told), code=True)


def gaps(view: View) -> list[str]:
    """What was not measured, where a reader may miss it."""
    said = []
    if not view.stages:
        said.append("No stage was measured.")
    if view.stages and not view.controls:
        said.append("No control was run: how much of the gain is due to the new vocabulary is not known.")
    if len(view.stages) > 1 and not view.comparisons:
        said.append("The stages were not compared document by document: small differences may be chance.")
    figures = [stage.bits(text, "byte") for stage in view.stages for text in view.texts]
    if any(figures) and not any(one.half is not None for one in figures if one):
        said.append("No intervals were computed: how much the choice of texts matters is not known.")
    if not any(stage.exams() for stage in view.stages):
        said.append("No multiple-choice exam was taken.")
    if not any(stage.speed() for stage in view.stages):
        said.append("Decoding speed was not measured.")
    if not view.samples() and not rights(view):
        said.append("No questions were asked.")
    return said


def notes(view: View) -> Section | None:
    """What the run said, and what was not measured."""
    own = [said for note in items(view.told.get("notes")) if (said := one_line(note))]
    blocks: list[Block] = [*own]
    if missing := gaps(view):
        blocks.append("Not measured: " + " ".join(missing))
    return Section("Notes", blocks) if blocks else None
