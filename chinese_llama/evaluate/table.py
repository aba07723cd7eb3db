"""What `eval` prints: tables of 80 columns for each text and exam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chinese_llama.evaluate.compare import FEW, LEVEL
from chinese_llama.terminal import columns

WIDE = 80  # columns of a terminal
WIDTH = 16  # of a name
SURE = f"{100 * LEVEL:.0f} %"
TITLES = (
    ["", "chars/", "bits per", SURE, "bits per", "perplexity", "context"],
    ["", "token", "character", "interval", "byte", "per token", "tokens"],
)


def aligned(rows: Sequence[Sequence[str]], wide: int = WIDE) -> list[str]:
    """Rows of cells, titles too, as lines: the first of each to the left, the others to the right, two columns
    apart. Those that do not fit into `wide` columns go below, beside the first ones again."""
    widths = [max(columns(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    start = end = 1
    while end < len(widths):
        used = widths[0]
        while end < len(widths) and (end == start or used + 2 + widths[end] <= wide):
            used += 2 + widths[end]
            end += 1
        lines += [""] if lines else []
        for row in rows:
            cells = "".join(" " * (2 + widths[i] - columns(row[i])) + row[i] for i in range(start, end))
            lines.append((row[0] + " " * (widths[0] - columns(row[0])) + cells).rstrip())
        start = end
    return lines


def told(measured: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> str:
    """The figures of models (see `run.measure`), the baseline first, and of their comparisons with it."""
    names = _short([m["name"] for m in measured])
    parts = [_legend(measured, names)]
    called = {m["name"]: name for m, name in zip(measured, names, strict=True)}
    measured = [{**m, "name": called[m["name"]]} for m in measured]
    comparisons = [{**c, "stage": called[c["stage"]], "baseline": called[c["baseline"]]} for c in comparisons]
    for name in measured[0]["texts"]:
        parts.append(_text(name, measured, [c for c in comparisons if name in c["texts"]]))
    if measured[0]["texts"]:
        parts.append(_windows(measured))
    parts += [_choices(index, measured) for index in range(len(measured[0]["choices"]))]
    if measured[0]["wikitext"]:
        parts.append(_wikitext(measured))
    if measured[0]["speed"]:
        parts.append(_speed(measured))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _short(names: Sequence[str]) -> list[str]:
    """Names that fit their column, letters where those would be alike."""
    short = [_cut(name) for name in names]
    return short if len(set(short)) == len(short) else [chr(ord("A") + i) for i in range(len(short))]


def _legend(measured: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Which model a name stands for, where it is not the model's place itself."""
    if all(name == m["model"] for name, m in zip(names, measured, strict=True)):
        return []
    pad = max(map(columns, names)) + 2
    return [
        " + ".join([name + " " * (pad - columns(name)) + m["model"], *m["loras"]])
        for name, m in zip(names, measured, strict=True)
    ]


def _text(name: str, measured: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> list[str]:
    first = measured[0]["texts"][name]
    rows = [_figures(m["name"], m["texts"][name]) for m in measured]
    return [
        f"{name}: {_count(first['documents'])}, {first['characters']:,} characters, {first['bytes']:,} bytes",
        *aligned([*TITLES, *rows]),
        *_changes(name, comparisons),
        *_remarks(name, measured),
    ]


def _figures(model: str, found: Mapping[str, Any]) -> list[str]:
    interval = found["interval"]["bits_per_character"]
    return [
        model,
        f"{found['characters_per_token']:.3f}",
        _bits(found["bits_per_character"]),
        "-".join(map(_bits, interval)) if interval else "",
        _bits(found["bits_per_byte"]),
        f"{found['perplexity']:.2f}" if found["perplexity"] < 1e6 else f"{found['perplexity']:.1e}",
        f"{found['context']:,.0f}",
    ]


def _changes(name: str, comparisons: Sequence[dict[str, Any]]) -> list[str]:
    """How the bits of models differ from the baseline's, and whether that keeps to a limit."""
    if not comparisons:
        return []
    limit = any(name in c["limits"] for c in comparisons)
    rows = [["", "change", f"{SURE} interval", "verdict", *(["limit"] if limit else [])]]
    for c in comparisons:
        found, ends = c["texts"][name], c["texts"][name]["interval"]
        row = [c["stage"], f"{_percent(found['difference'])} %"]
        row += [" to ".join(map(_percent, ends)) if ends else "", found["verdict"]]
        if limit:
            row.append(f"{'over' if name in c['broken'] else 'within'} {100 * c['limits'][name]:.3g} %")
        rows.append(row)
    return [f"Bits against {comparisons[0]['baseline']}:", *aligned(rows)]


def _remarks(name: str, measured: Sequence[dict[str, Any]]) -> list[str]:
    """What to think of when comparing."""
    lines = []
    for model in measured:
        found = model["texts"][name]
        if found["unknown"]:
            lines.append(
                f"{model['name']}: {found['unknown']:,} of {found['tokens']:,} tokens are unknown; what they hide costs "
                "no bits."
            )
    documents = measured[0]["texts"][name]["documents"]
    if 1 < documents < FEW:
        lines.append(f"Only {_count(documents)}: intervals are narrower than they should be.")
    return lines


def _windows(measured: Sequence[dict[str, Any]]) -> list[str]:
    """In which windows the models saw the texts: the same for all texts."""
    seen: dict[str, list[str]] = {}
    for model in measured:
        found = next(iter(model["texts"].values()))
        said = f"Windows of {found['window']:,} tokens, stride {found['stride']:,}"
        seen.setdefault(said, []).append(model["name"])
    lines = [
        f"{said} ({', '.join(models)})." if len(seen) > 1 else f"{said}." for said, models in seen.items()
    ]
    return [*lines, "Context: how many tokens are seen before one that is scored, on average."]


def _percent(share: float) -> str:
    """A share in percent with about three digits: a column's width."""
    decimals = 2 if abs(share) < 0.01 else 1 if abs(share) < 0.9995 else 0
    return f"{100 * share:+.{decimals}f}"


def _bits(value: float) -> str:
    return f"{value:.3f}" if value < 9.9995 else f"{value:.2f}" if value < 1e6 else f"{value:.1e}"


def _choices(index: int, measured: Sequence[dict[str, Any]]) -> list[str]:
    """An exam: the average over subjects, and the categories; a column for each model."""
    exams = [model["choices"][index] for model in measured]
    first = exams[0]
    rows = [["", *(model["name"] for model in measured)]]
    rows.append(["average", *(_share(exam["average"]) for exam in exams)])
    rows += [[part, *(_share(exam["categories"][part]) for exam in exams)] for part in first["categories"]]
    title = (
        f"{first['exam']}, {first['shots']}-shot, {first['questions']:,} questions: % right, standard error"
    )
    return [title, *aligned(rows)]


def _share(share: dict[str, Any]) -> str:
    error = f" +- {100 * share['stderr']:.1f}" if share["stderr"] is not None else ""
    return f"{100 * share['accuracy']:.1f}{error}"


def _wikitext(measured: Sequence[dict[str, Any]]) -> list[str]:
    rows = [["", "per word", "per byte"]]
    for model in measured:
        found = model["wikitext"]
        rows.append([model["name"], f"{found['word_perplexity']:.2f}", f"{found['byte_perplexity']:.3f}"])
    return ["WikiText: perplexity", *aligned(rows)]


def _speed(measured: Sequence[dict[str, Any]]) -> list[str]:
    first = measured[0]["speed"]
    rows = [["", "characters/s", "tokens/s", f"times {measured[0]['name']}"][: 3 + (len(measured) > 1)]]
    for model in measured:
        speed = model["speed"]
        times = speed["characters_per_second"] / first["characters_per_second"]
        row = [f"{speed['characters_per_second']:,.1f}", f"{speed['tokens_per_second']:,.1f}", f"{times:.2f}"]
        rows.append([model["name"], *row][: len(rows[0])])
    return [
        f"Decoding {first['characters']:,} characters of {first['text']} on {first['device']} in {first['dtype']} "
        f"({first['repeats']} runs)",
        *aligned(rows),
    ]


def _count(documents: int) -> str:
    return f"{documents:,} document{'' if documents == 1 else 's'}"


def _cut(name: str) -> str:
    """A name that fits its column: the end of a path tells more than its beginning."""
    if columns(name) <= WIDTH:
        return name
    while columns(name) > WIDTH - 2:
        name = name[1:]
    return f"..{name}"
