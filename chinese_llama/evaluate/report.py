"""The report of a run: text for the terminal, Markdown, and one HTML page that needs no network."""

from __future__ import annotations

import html as escaping
import io
from collections.abc import Sequence
from typing import Any

NAMES = {
    "base": "base",
    "plus": "after plus",
    "alpaca": "after alpaca",
    "merged": "merged",
}
COLUMNS = ("tokens per character (zh)", "bits per character (zh)", "bits per byte (en)")
COLOURS = ("#7a8aa0", "#3b82c4", "#d97a2b", "#3a9d6e")


def rows(told: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(stage, cells) of the table of a report."""
    result = []
    for stage, sets in told["stages"].items():
        zh, en = sets["zh"], sets["en"]
        cells = [1 / zh["characters_per_token"], zh["bits_per_character"], en["bits_per_byte"]]
        result.append((NAMES[stage], [f"{cell:.2f}" for cell in cells]))
    return result


def text(told: dict[str, Any]) -> str:
    """The table and the answers for a terminal."""
    lines = ["", f"{'':14}" + "".join(f"{name:>28}" for name in COLUMNS)]
    lines += [f"{stage:14}" + "".join(f"{cell:>28}" for cell in cells) for stage, cells in rows(told)]
    lines += ["", _right(told), ""]
    for sample in told["samples"]:
        lines.append(
            f"[{sample['model']}] {_one_line(sample['question'])}\n    {_one_line(sample['answer'])}"
        )
    return "\n".join([*lines, ""])


def markdown(told: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"# {told['title']}",
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    lines += [f"| {stage} | " + " | ".join(cells) + " |" for stage, cells in rows(told)]
    lines += ["", NOTE, "", _right(told), "", "| model | question | answer |", "| --- | --- | --- |"]
    for sample in told["samples"]:
        cells = [NAMES[sample["model"]], _one_line(sample["question"]), _one_line(sample["answer"])]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


NOTE = (
    "Measured on text that no stage was trained on. Bits per character and per byte do not depend on the "
    "tokenizer, so the base (which spells Chinese in bytes) and the extended model compare directly; lower "
    "is better. “After alpaca” is the adapter unmerged on top of plus, “merged” the plain weights: equal "
    "figures show that nothing was lost in merging."
)


def _right(told: dict[str, Any]) -> str:
    answers = told["answers"]
    share = 100 * answers["right"] / answers["questions"]
    return (
        f"Held-out questions answered with the right word: {answers['right']} of {answers['questions']} "
        f"({share:.0f} %). Each asks for something that was taught, in words that were not."
    )


def _one_line(said: str) -> str:
    return " ".join(said.split())


def html(told: dict[str, Any]) -> str:
    """The report as one page, plots inside as SVG."""
    table = "".join(
        f"<tr><th>{stage}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for stage, cells in rows(told)
    )
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    answers = "".join(
        f"<tr><td>{NAMES[s['model']]}</td><td>{escaping.escape(s['question'])}</td>"
        f"<td>{escaping.escape(s['answer'])}</td></tr>"
        for s in told["samples"]
    )
    plots = "".join(f"<figure>{svg}</figure>" for svg in _plots(told))
    return PAGE.format(
        title=escaping.escape(told["title"]),
        head=head,
        table=table,
        note=NOTE,
        right=_right(told),
        answers=answers,
        plots=plots,
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8881; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.6;
  font-family: system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "WenQuanYi Zen Hei", sans-serif; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; white-space: pre-line; }}
.figures td, .figures thead th:not(:first-child) {{ text-align: right; }}
thead th {{ background: var(--soft); }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
<div class="wide"><table class="figures"><thead><tr><th></th>{head}</tr></thead><tbody>{table}</tbody></table></div>
<p>{note}</p>
<h2>Curves</h2>
<div class="plots">{plots}</div>
<h2>Answers</h2>
<p>{right}</p>
<div class="wide"><table><thead><tr><th>model</th><th>question</th><th>answer</th></tr></thead><tbody>{answers}</tbody></table></div>
</body></html>
"""


def _plots(told: dict[str, Any]) -> list[str]:
    """SVG: loss curves, tokens per character, bits per character, bits per byte."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grey = "#888888"
    style = {
        "svg.fonttype": "none",
        "text.color": grey,
        "axes.labelcolor": grey,
        "axes.edgecolor": grey,
        "xtick.color": grey,
        "ytick.color": grey,
        "axes.titlecolor": grey,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "chinese_llama",
    }
    labels = [NAMES[stage].replace("after ", "") for stage in told["stages"]]
    zh = [sets["zh"] for sets in told["stages"].values()]
    en = [sets["en"] for sets in told["stages"].values()]
    bars = (
        ("tokens per Chinese character", [1 / s["characters_per_token"] for s in zh]),
        ("bits per Chinese character", [s["bits_per_character"] for s in zh]),
        ("bits per English byte", [s["bits_per_byte"] for s in en]),
    )
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(5, 3.2))
        for (name, log), colour in zip(told["losses"].items(), COLOURS, strict=False):
            axes.plot([e["step"] for e in log], [e["loss"] for e in log], label=name, color=colour)
        axes.set(title="training loss (nats per token)", xlabel="step")
        axes.legend(frameon=False)
        return [_svg(figure), *(_bars(title, labels, values) for title, values in bars)]


def _bars(title: str, labels: Sequence[str], values: Sequence[float]) -> str:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    drawn = axes.bar(labels, values, color=COLOURS)
    axes.bar_label(drawn, fmt="%.2f", color="#888888")
    axes.set(title=title)
    axes.margins(y=0.12)
    return _svg(figure)


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    stream = io.StringIO()
    figure.tight_layout()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    drawn = stream.getvalue()
    return drawn[drawn.index("<svg") :]
