"""What a run leaves to read: run.md with its picture, and the model card."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import Manifest
from chinese_llama.train.fields import Recipe

PAGE, PICTURE = "run.md", "loss.png"
Log = list[dict[str, Any]]


def markdown(recipe: Recipe[Any], manifest: Manifest, log: Log) -> str:
    """The page of a run: course, data, what was measured, settings."""
    metrics = manifest.metrics
    lines = [f"# {Path(recipe.fields.output_dir).name}: a run of {recipe.name}", ""]
    lines += [f"{_sentence(metrics)}", "", f"![loss and measures]({PICTURE})", ""] if log else []
    lines += _measures(log)
    lines += ["## Data", "", "| source | weight | documents | held out | blocks | tokens | dropped |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for source in metrics["sources"]:
        dropped = ", ".join(f"{reason}: {count:,}" for reason, count in source["dropped"].items() if count)
        counts = (source[key] for key in ("documents", "held_out", "blocks", "tokens"))
        cells = [source["name"], str(source["weight"] or ""), *(f"{count:,}" for count in counts), dropped]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Trained", "", "| group | numbers |", "| --- | ---: |"]
    lines += [f"| {group} | {count:,} |" for group, count in metrics["groups"].items()]
    lines += ["", "## Settings", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in sorted(manifest.settings.items())]
    lines += ["", "## Made from", "", "| | | sha256 |", "| --- | --- | --- |"]
    lines += [f"| {role} | {v['path']} | `{v['sha256'][:16]}` |" for role, v in manifest.inputs.items()]
    return "\n".join([*lines, ""])


def card(recipe: Recipe[Any], manifest: Manifest, log: Log) -> str:
    """The model card of an adapter."""
    fields, metrics = recipe.fields, manifest.metrics
    below = ", ".join(fields.adapters) or "none"
    lines = ["---", "library_name: peft", "language: [zh, en]", "---"]
    lines += [
        f"# {Path(fields.output_dir).name}",
        "",
        f"LoRA adapter made by `{recipe.name}` of chinese_llama.",
        "",
    ]
    lines += [f"- base: `{fields.model_name_or_path}`, adapters below: {below}", f"- {_sentence(metrics)}"]
    lines += [f"- {metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters trained", ""]
    lines += _measures(log)
    lines += [
        "Load it on the base with `PeftModel.from_pretrained`, or bake it in with `chinese-llama merge`. The whole run:"
    ]
    lines += [f"`{PAGE}`; hashes of everything that it was made from: `chinese_llama.json`.", ""]
    return "\n".join(lines)


def _sentence(metrics: dict[str, Any]) -> str:
    first, last = metrics["first_loss"], metrics["last_loss"]
    losses = f", loss {first:.3f} -> {last:.3f}" if first is not None else ""
    return f"{metrics['steps']:,} steps of {metrics['tokens_per_step']:,} tokens{losses}."


def _measures(log: Log) -> list[str]:
    """The table of what was measured, step by step."""
    entries = [entry for entry in log if "eval" in entry]
    if not entries:
        return []
    names = _texts(entries)
    head = ["step", *(f"{name}, bits per {unit}" for name in names for unit in ("character", "byte"))]
    lines = ["## Measured", "", "| " + " | ".join(head) + " |", "| ---: |" + " ---: |" * (2 * len(names))]
    for entry in entries:
        found = [entry["eval"].get(name) for name in names]
        cells = [f"{f[f'bits_per_{unit}']:.3f}" if f else "" for f in found for unit in ("character", "byte")]
        lines.append(f"| {entry['step']:,} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _texts(entries: Log) -> list[str]:
    """The names of all texts that were measured; a run may go on with others."""
    return list(dict.fromkeys(name for entry in entries for name in entry["eval"]))


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "\\n")


def picture(log: Log, path: Path) -> None:
    """The loss by step, and beside it the bits per character and per byte of what was measured, as PNG."""
    from matplotlib.figure import Figure

    measured = [entry for entry in log if "eval" in entry]
    figure = Figure(figsize=(10 if measured else 5.5, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    axes[0].plot(*zip(*losses, strict=True), color="#3b82c4", marker="." if len(losses) < 40 else None)
    axes[0].set(xlabel="step", ylabel="loss, nats per token")
    for name, colour in zip(_texts(measured), cycle(COLOURS), strict=False):
        for unit, style in (("character", "-"), ("byte", ":")):
            found = [(entry["step"], entry["eval"][name]) for entry in measured if name in entry["eval"]]
            points = [(step, figures[f"bits_per_{unit}"]) for step, figures in found]
            axes[1].plot(
                *zip(*points, strict=True), style, color=colour, marker=".", label=f"{name}, per {unit}"
            )
    if measured:
        axes[1].set(xlabel="step", ylabel="bits")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


COLOURS = ("#d9482b", "#3b82c4", "#3a9d6e", "#8a5cc2", "#d9a12b", "#555555")
