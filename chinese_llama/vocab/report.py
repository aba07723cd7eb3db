"""What `extend-vocab` and `audit-vocab` found, as JSON, as a Markdown page and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chinese_llama.directories import write_text

REPORT = "vocab_report.json"
PAGE = "vocab_report.md"
PICTURE = "vocab_report.png"
HIDDEN = (2048, 4096, 5120, 8192)  # of common models
LISTED = 40  # pieces of a list on the page; the JSON has all
PROBLEMS = {
    "disagreements": "read differently by SentencePiece and tokenizer.json",
    "changed": "not as by the base, though without Chinese",
    "longer": "longer than under the base",
    "lost": "not given back by decoding, though by the base's decoding",
}


def write(directory: Path, told: dict[str, Any], hidden: int | None) -> None:
    """Write the three files into `directory`; `hidden` is the base's hidden size, if it is known."""
    write_text(directory / REPORT, json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    write_text(directory / PAGE, markdown(told, hidden) + f"\n![{PICTURE}]({PICTURE})\n")
    picture(told, directory / PICTURE)


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / REPORT).read_text(encoding="utf-8"))


def hidden_size(base: Path) -> int | None:
    """hidden_size in the config.json of a base's directory, None where there is none."""
    try:
        return int(json.loads((base / "config.json").read_text(encoding="utf-8"))["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sets(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a set of texts -> its figures."""
    named = {"probe texts": told["checks"]} if "checks" in told else {}
    if "held_out" in told:
        named["kept apart from the corpus"] = told["held_out"]
    return {**named, **told.get("files", {})}


def summary(told: dict[str, Any]) -> str:
    """The report in some lines for a terminal."""
    size, base = told["vocab_size"], told["base_vocab_size"]
    dead = told["checks"]["dead"] if "checks" in told else told["dead"]
    grown = base and size > base
    lines = [f"{base:,} + {size - base:,} = {size:,} pieces" if grown else f"{size:,} pieces"]
    lines[0] += f", {len(dead):,} dead"
    lines[0] += f", {len(told['unused']):,} unused here." if "unused" in told else "."
    if told.get("size") and size < told["size"]:
        lines.append(f"  Fewer than the {told['size']:,} that --size allows: no more are offered.")
    for name, figures in sets(told).items():
        before = f"{figures['base_characters_per_token']:.3f} -> " if base else ""
        faults = [
            f"{figures[problem]:,} {what}" for problem, what in PROBLEMS.items() if figures.get(problem)
        ]
        lines.append(
            f"  {name}: {figures['documents']:,} texts, {before}{figures['characters_per_token']:.3f} characters "
            f"per token; {'; '.join(faults) or 'no fault'}."
        )
    for problem, texts in (told["checks"]["examples"] if "checks" in told else told["examples"]).items():
        lines += [f"  {PROBLEMS[problem]}: {text!r}" for text in texts[:1]]
    return "\n".join(lines)


def markdown(told: dict[str, Any], hidden: int | None = None) -> str:
    """The report as a page."""
    return "\n\n".join(block for block in _blocks(told, hidden) if block) + "\n"


def _blocks(told: dict[str, Any], hidden: int | None) -> Iterator[str]:
    size, base = told["vocab_size"], told["base_vocab_size"]
    yield "# Vocabulary report"
    if base and size > base:
        yield f"{base:,} pieces of the base + {size - base:,} = **{size:,}**. {_source(told)}"
    else:
        beside = f" Compared with `{told['base']}`: {base:,} pieces." if base else ""
        yield f"`{told['tokenizer']}`: **{size:,}** pieces.{beside}"
    yield "## Length of texts\n\n" + _lengths(sets(told))
    for name, figures in sets(told).items():
        yield f"### By script: {name}\n\n" + _scripts(figures)
    yield "## Faults\n\n" + _faults(told)
    if "curve" in told:
        yield f"## Size\n\nMeasured on {told['curve_on']}; each row of the table is a vocabulary whose pieces are those most worth having.\n\n{_curve(told, hidden)}"
    if base and size > base:
        yield "## Price and saving\n\n" + _price(told, hidden)
    yield _lists(told)


def _source(told: dict[str, Any]) -> str:
    if told.get("policy") == "reference":
        return f"All pieces of `{told['chinese_sp']}` appended with score 0 (policy reference)."
    if "corpus" in told:
        corpus = told["corpus"]
        files = ", ".join(f"`{file}`" for file in corpus["files"])
        return (
            f"Chosen from `{told['chinese_sp']}` and from {corpus['documents']:,} documents "
            f"({corpus['clauses']:,} different clauses) of {files}."
        )
    return f"Chosen from `{told['chinese_sp']}`." if "chinese_sp" in told else f"Base: `{told['base']}`."


def _lengths(named: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, figures in named.items():
        row = [name.replace("|", "\\|"), f"{figures['documents']:,}", f"{figures['characters']:,}"]
        for prefix in ("base_", ""):
            for unit in ("characters_per_token", "bytes_per_token", "non_ascii_per_token"):
                row.append(f"{figures[prefix + unit]:.3f}" if prefix + unit in figures else "")
        rows.append(row)
    head = ["texts", "documents", "characters"]
    for who in ("base: ", ""):
        head += [f"{who}characters per token", f"{who}bytes per token", f"{who}non-ASCII per token¹"]
    note = "¹ non-ASCII characters divided by the tokens that hold at least one of them"
    return f"{table(head, rows)}\n\n{note}"


def _scripts(figures: dict[str, Any]) -> str:
    rows = []
    for script, counts in figures["scripts"].items():
        row = [script, f"{counts['characters']:,}"]
        for name in ("base_tokens", "tokens"):
            row.append(f"{counts['characters'] / counts[name]:.3f}" if counts.get(name) else "")
        rows.append(row)
    note = "A token counts for the script of its first character, a space before others left aside."
    return f"{table(['script', 'characters', 'base: per token', 'per token'], rows)}\n\n{note}"


def _faults(told: dict[str, Any]) -> str:
    dead = told["checks"]["dead"] if "checks" in told else told["dead"]
    lines = [f"- Pieces that no text can produce: {len(dead):,}."]
    if "unused" in told:
        lines.append(f"- Pieces that these texts never use: {len(told['unused']):,}.")
    for name, figures in sets(told).items():
        for problem, what in PROBLEMS.items():
            if problem in figures:
                of = figures["without_chinese"] if problem == "changed" else figures["documents"]
                lines.append(f"- {name}: {what}: {figures[problem]:,} of {of:,}.")
    examples = told["checks"]["examples"] if "checks" in told else told["examples"]
    for problem, found in examples.items():
        lines += [f"- {PROBLEMS[problem]}, for example: {_code(text)}" for text in found]
    return "\n".join(lines)


def _curve(told: dict[str, Any], hidden: int | None) -> str:
    hidden = hidden or 4096
    rows, before = [], None
    for point in told["curve"]:
        per_token = point["characters_per_token"]
        gain = f"{per_token / before - 1:+.1%}" if before else ""
        millions = (point["size"] - told["base_vocab_size"]) * 2 * hidden / 1e6
        rows.append([f"{point['size']:,}", f"{per_token:.3f}", gain, f"{millions:.1f} M"])
        before = per_token
    return table(["pieces", "characters per token", "gain", f"parameters at hidden size {hidden:,}"], rows)


def _price(told: dict[str, Any], hidden: int | None) -> str:
    new = told["vocab_size"] - told["base_vocab_size"]
    sizes = sorted({*HIDDEN, hidden or HIDDEN[0]})
    rows = [[f"{h:,}", f"{2 * h:,}", f"{2 * h * new / 1e6:.1f} M"] for h in sizes]
    lines = [
        f"- {name}: {1 - figures['tokens'] / figures['base_tokens']:.1%} fewer tokens than under the base."
        for name, figures in sets(told).items()
        if figures.get("base_tokens")
    ]
    price = table(["hidden size", "parameters of a piece", f"of {new:,} new pieces"], rows)
    return "\n".join(lines) + f"\n\n{price}\n\nTied models pay half."


def _lists(told: dict[str, Any]) -> str:
    blocks = []
    if told.get("repaired"):
        items = [f"{_code(p)} needed {' '.join(map(_code, parts))}" for p, parts in told["repaired"].items()]
        blocks.append(_list("Repaired: pieces that could not be produced, and what was added", items))
    if told.get("dropped"):
        reasons: dict[str, list[str]] = {}
        for piece, reason in told["dropped"].items():
            reasons.setdefault(reason, []).append(_code(piece))
        blocks += [_list(f"Dropped: {reason}", pieces) for reason, pieces in reasons.items()]
    dead = told["checks"]["dead"] if "checks" in told else told.get("dead", [])
    if dead:
        blocks.append(_list("Dead", [_code(piece) for piece in dead]))
    if told.get("unused"):
        blocks.append(_list("Unused on these texts", [_code(piece) for piece in told["unused"]]))
    return "\n\n".join(blocks)


def _list(title: str, items: Sequence[str]) -> str:
    more = f" … and {len(items) - LISTED:,} more in {REPORT}" if len(items) > LISTED else ""
    return f"### {title} ({len(items):,})\n\n{', '.join(items[:LISTED])}{more}"


def _code(text: str) -> str:
    """Inline code on one line, whatever the text holds."""
    shown = json.dumps(text, ensure_ascii=False)[1:-1].replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{ticks} {shown} {ticks}" if len(ticks) > 1 else f"`{shown}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(told: dict[str, Any], file: Path) -> None:
    """Draw characters per token against size, and by script against the base, to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    named = {name: figures for name, figures in sets(told).items() if figures["documents"]}
    curve = told.get("curve")
    figure = Figure(figsize=(10 if curve else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, 2 if curve else 1, squeeze=False)[0])
    if curve:
        sizes, lengths = zip(*((p["size"], p["characters_per_token"]) for p in curve), strict=True)
        axes[0].plot(sizes, lengths, marker="o", color="#1f6f8b")
        axes[0].set(xlabel="pieces, base included", ylabel="characters per token", title=told["curve_on"])
        axes[0].xaxis.set_major_formatter("{x:,.0f}")
        axes[0].xaxis.set_major_locator(MaxNLocator(5))
        axes[0].grid(alpha=0.3)
    name, figures = list(named.items())[-1]
    scripts = [s for s, counts in figures["scripts"].items() if counts.get("tokens")]
    for offset, key, colour in ((-0.2, "base_tokens", "#b0b0b0"), (0.2, "tokens", "#1f6f8b")):
        counts = [figures["scripts"][script] for script in scripts]
        if not all(key in one for one in counts):
            continue
        values = [one["characters"] / max(1, one[key]) for one in counts]
        places = [index + offset for index in range(len(scripts))]
        axes[-1].barh(
            places, values, height=0.38, color=colour, label="base" if "base" in key else "extended"
        )
    axes[-1].set_yticks(range(len(scripts)), scripts)
    axes[-1].invert_yaxis()
    axes[-1].set(xlabel="characters per token", title=f"by script: {name[-40:]}")
    axes[-1].legend()
    figure.savefig(file, dpi=110)
