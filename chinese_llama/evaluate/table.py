"""What `eval` prints: a table for each text and exam, models below each other, in at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chinese_llama.evaluate.compare import FEW, LEVEL
from chinese_llama.evaluate.report.values import columns

WIDTH = 16  # of a name
COLUMNS = (  # title in two lines, width, key, form
    (("chars/", "token"), 8, "characters_per_token", ".3f"),
    (("bits per", "character"), 10, "bits_per_character", ".3f"),
    (("bits per", "byte"), 9, "bits_per_byte", ".3f"),
    (("perplexity", "per token"), 11, "perplexity", ".2f"),
)
CHANGE = 25
SHARE = 14  # of an exam's category


def told(measured: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> str:
    """The figures of models (see `run.measure`), the baseline first, and of their comparisons with it."""
    parts = [_legend(measured)]
    for name in measured[0]["texts"]:
        compared = {c["stage"]: c["texts"][name] for c in comparisons if name in c["texts"]}
        parts.append(_text(name, measured, compared))
    parts += [_choices(index, measured) for index in range(len(measured[0]["choices"]))]
    if measured[0]["wikitext"]:
        parts.append(_rows("WikiText", [(m["name"], f"{m['wikitext']['word_perplexity']:.2f} per word, "
            f"{m['wikitext']['byte_perplexity']:.3f} per byte (perplexity)") for m in measured]))  # fmt: skip
    if measured[0]["speed"]:
        parts.append(_speed(measured))
    return "\n\n".join(part for part in parts if part)


def _legend(measured: Sequence[dict[str, Any]]) -> str:
    """Which model a name that was cut stands for."""
    lines = [f"{_name(m['name'])} {m['model']}" + "".join(f" + {a}" for a in m["loras"]) for m in measured]
    cut = any(m["name"] != m["model"] or columns(m["name"]) > WIDTH for m in measured)
    return "\n".join(lines) if cut else ""


def _text(name: str, measured: Sequence[dict[str, Any]], compared: dict[str, Any]) -> str:
    first = measured[0]["texts"][name]
    lines = [
        f"{name}: {_count(first['documents'])}, {first['characters']:,} characters, {first['bytes']:,} bytes"
    ]
    for row in (0, 1):
        cells = "".join(f"{title[row]:>{width}}" for title, width, _, _ in COLUMNS)
        change = ("change of bits", f"({100 * LEVEL:.0f} % interval)")[row] if compared else ""
        lines.append(f"{'':{WIDTH}}{cells}{change:>{CHANGE}}".rstrip())
    for model in measured:
        figures = model["texts"][name]
        cells = "".join(f"{_number(figures[key], form):>{width}}" for _, width, key, form in COLUMNS)
        change = _change(compared[model["name"]]) if model["name"] in compared else ""
        lines.append(f"{_name(model['name'])}{cells}{change}".rstrip())
    lines.append(_context(name, measured))
    if compared and first["documents"] < FEW:
        lines.append(f"Only {_count(first['documents'])}: such an interval is narrower than it should be.")
    return "\n".join(lines)


def _context(name: str, measured: Sequence[dict[str, Any]]) -> str:
    """How many tokens the models saw, in the order of the rows."""
    windows = {(m["texts"][name]["window"], m["texts"][name]["stride"]) for m in measured}
    said = " and ".join(f"{window:,} tokens, stride {stride:,}" for window, stride in sorted(windows))
    seen = [f"{m['texts'][name]['context']:,.0f}" for m in measured]
    seen = seen[:1] if len({*seen}) == 1 else seen
    return f"Windows of {said}; seen before a scored token, on average: {', '.join(seen)}."


def _change(compared: dict[str, Any]) -> str:
    low_high = compared["interval"]
    sure = f" ({_percent(low_high[0])} to {_percent(low_high[1])})" if low_high else ""
    return f"{_percent(compared['difference'])} %{sure}".rjust(CHANGE) + f"  {compared['verdict']}"


def _percent(share: float) -> str:
    """A share in percent with about three digits: a column's width."""
    decimals = 2 if abs(share) < 0.01 else 1 if abs(share) < 0.9995 else 0
    return f"{100 * share:+.{decimals}f}"


def _number(value: float, form: str) -> str:
    return format(value, form) if value < 1e6 else f"{value:.1e}"


def _choices(index: int, measured: Sequence[dict[str, Any]]) -> str:
    """An exam: the average over subjects, and the categories."""
    first = measured[0]["choices"][index]
    titles = [("", "average"), *((" " + title).rsplit(" ", 1) for title in first["categories"])]
    lines = [
        f"{first['exam']}, {first['shots']}-shot, {first['questions']:,} questions: % right, standard error"
    ]
    for row in (0, 1):
        head = "".join(f"{title[row]:>{SHARE}}" for title in titles).rstrip()
        lines += [" " * WIDTH + head] if head else []
    for model in measured:
        exam = model["choices"][index]
        shares = [exam["average"], *exam["categories"].values()]
        lines.append(_name(model["name"]) + "".join(f"{_share(share):>{SHARE}}" for share in shares))
    return "\n".join(lines)


def _share(share: dict[str, Any]) -> str:
    error = f" +- {100 * share['stderr']:.1f}" if share["stderr"] is not None else ""
    return f"{100 * share['accuracy']:.1f}{error}"


def _speed(measured: Sequence[dict[str, Any]]) -> str:
    first = measured[0]["speed"]
    rows = []
    for model in measured:
        speed = model["speed"]
        times = speed["characters_per_second"] / first["characters_per_second"]
        ratio = f", {times:.2f} times {_cut(measured[0]['name'])}" if model is not measured[0] else ""
        rows.append(
            (
                model["name"],
                f"{speed['characters_per_second']:,.1f} characters/s, {speed['tokens_per_second']:,.1f} tokens/s{ratio}",
            )
        )
    title = (
        f"Decoding {first['characters']:,} characters token by token on {first['device']} in {first['dtype']} "
        f"(medians of {first['repeats']} runs)"
    )
    return _rows(title, rows)


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"{_name(name)}  {said}" for name, said in rows)])


def _count(documents: int) -> str:
    return f"{documents:,} document{'' if documents == 1 else 's'}"


def _cut(name: str) -> str:
    """A name that fits its column: the end of a path tells more than its beginning."""
    if columns(name) <= WIDTH:
        return name
    while columns(name) > WIDTH - 2:
        name = name[1:]
    return f"..{name}"


def _name(name: str) -> str:
    """A name that fills its column."""
    return (cut := _cut(name)) + " " * (WIDTH - columns(cut))
