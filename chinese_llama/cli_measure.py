"""The command `eval`: thin, like all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from chinese_llama import workspace
from chinese_llama.commandline import EXAMPLES, Below, Loras, check_json, given, write_json

app = typer.Typer()


@app.command(
    "eval",
    epilog=EXAMPLES
    + "chinese-llama eval --model work/merged --text zh=zh.jsonl en=en.jsonl --baseline models/llama-7b --max-regression en=0.02\n\n"
    + "chinese-llama eval --base work/extended --loras plus=work/plus,alpaca=work/alpaca --text zh=zh.jsonl --stride 256\n\n"
    + "chinese-llama eval --model work/merged --choices ceval=data/ceval --shots 5 --json figures.json\n\n"
    + "chinese-llama eval --speed                 [dim]# in a workspace: base and merged[/dim]",
)
def evaluate(
    model: Annotated[
        str | None, typer.Option(help="Model directory or hub id.", show_default="the workspace's")
    ] = None,
    base: Below = None,
    loras: Loras = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE: .txt, .jsonl, .json, .parquet, or a directory of them. One or several.",
            show_default="the workspace's",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens that windows over long documents move by.", show_default="half a window"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens of a window.", show_default="what the model reads, at most 4096"),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="A model to compare with; its tokenizer may differ.", show_default="the workspace's base"
        ),
    ] = None,
    max_regression: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SHARE: exit code 1 if the bits per byte of a text rise by more over the baseline's. May be repeated."
        ),
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(help="EXAM=DIRECTORY: multiple choice, ceval or cmmlu. May be repeated."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each question of --choices.", show_default="5")
    ] = None,
    wikitext: Annotated[
        Path | None, typer.Option(help="A text for word perplexity as WikiText has it.")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Decoding speed in characters per second; models take turns.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Bits per character and per byte, exams, speed: comparable between tokenizers, with a baseline and a gate."""
    from chinese_llama.evaluate.sets import evaluation

    options = given(
        model=model, base=base, loras=loras, text=text or None, stride=stride, window=window, baseline=baseline,
        max_regression=max_regression or None, choices=choices or None, shots=shots, wikitext=wikitext, speed=speed or None,
    )  # fmt: skip
    check_json(json_file)
    space = workspace.find()
    if space and not {"text", "choices", "wikitext"} & set(options):
        from chinese_llama.adapt.subjects import texts

        space.settings.eval.text = {name: str(file) for name, file in texts(space).items()}
    asked = evaluation(space, options)
    from chinese_llama.evaluate.compare import broken
    from chinese_llama.evaluate.run import check, compared, measure, speeds
    from chinese_llama.evaluate.table import told

    subjects = [*([asked.baseline] if asked.baseline else []), *asked.subjects]
    check(subjects, asked.request)
    decoded = (
        speeds(subjects, asked.request.texts) if asked.speed else [None] * len(subjects)
    )  # it is soon told
    measured = [
        {**measure(subject, asked.request), "speed": speed}
        for subject, speed in zip(subjects, decoded, strict=True)
    ]
    comparisons: list[dict[str, Any]] = []
    sentences = []
    for one in measured[1:] if asked.baseline else []:
        found = compared(one, measured[0])
        over = broken(found, asked.limits)
        sentences += [f"{one['name']}: {sentence}" for sentence in over.values()]
        comparisons.append(
            {"stage": one["name"], "baseline": measured[0]["name"], "texts": found, "limits": asked.limits, "broken": list(over)}
        )  # fmt: skip
    typer.echo(told(measured, comparisons))
    write_json(json_file, {"models": measured, "comparisons": comparisons})
    for sentence in sentences:
        typer.echo(sentence, err=True)
    if sentences:
        raise typer.Exit(1)
