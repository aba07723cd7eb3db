"""The command `chinese-llama`: thin; what works is imported inside each command."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chinese_llama import __version__, workspace
from chinese_llama.cli_merge import app as merge_app
from chinese_llama.cli_vocab import app as vocab_app
from chinese_llama.commandline import (
    EXAMPLES,
    Base,
    Force,
    Output,
    given,
    load,
    note_if_kept,
    repeated,
    workspace_for,
    write_json,
)
from chinese_llama.errors import UserError, report

app = typer.Typer(
    name="chinese-llama",
    help="Teach a LLaMA-family model Chinese.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(vocab_app)
app.add_typer(merge_app)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"chinese-llama {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    pass


@app.command(
    epilog=EXAMPLES
    + "chinese-llama init my-model --base models/llama-7b --corpus zh.jsonl.gz --replay en.jsonl.gz --instructions alpaca_zh.json"
)
def init(
    directory: Annotated[Path, typer.Argument(help="Directory of the new workspace.")],
    base: Annotated[str | None, typer.Option(help="The HF model to adapt: a directory or a hub id.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Chinese text.")] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="English text: a fifth of what is trained on, so that the English stays."),
    ] = None,
    instructions: Annotated[Path | None, typer.Option(help="Instruction records.")] = None,
    force: Force = False,
) -> None:
    """Write a commented chinese-llama.yaml for your own base and corpus, and a copy of recipes/."""
    from chinese_llama.directories import write_text
    from chinese_llama.hub import is_hub_id
    from chinese_llama.resources import place_recipes

    file = directory / workspace.FILE
    if file.exists() and not force:
        raise UserError(f"{file} exists; --force replaces it.")
    for place in (base, corpus, replay, instructions):
        if place is not None and not Path(place).exists() and not is_hub_id(place):
            raise UserError(f"{place}: no such file or directory.")
    there = directory.absolute()
    places = [_seen_from(there, place) for place in (base, corpus, replay, instructions)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        place_recipes(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}).") from error
    write_text(file, workspace.template(*places))
    typer.echo(
        f"{file} is written. Check base, corpus and data in it; then, in {directory}:\n  chinese-llama extend-vocab"
    )


def _seen_from(directory: Path, place: str | Path | None) -> str | None:
    """A path as the workspace in `directory` has it: relative if it lies below, else whole."""
    if place is None or not Path(place).exists():
        return None if place is None else str(place)
    whole = Path(place).absolute()
    return str(whole.relative_to(directory) if whole.is_relative_to(directory) else whole)


@app.command(
    "extend-model",
    epilog=EXAMPLES
    + "chinese-llama extend-model --base models/llama-7b --tokenizer work/tokenizer --output work/extended\n\n"
    + "chinese-llama extend-model --init distill --corpus zh.jsonl.gz    [dim]# in a workspace[/dim]",
)
def extend_model(
    base: Base = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The extended tokenizer.", show_default="the workspace's")
    ] = None,
    output: Output = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="How new rows start: asymmetric, subword-mean, mean-resizing, random, distill.",
            show_default="asymmetric",
        ),
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text that `--init distill` reads. May be repeated.", show_default="the workspace's"
        ),
    ] = None,
    pad_to_multiple_of: Annotated[
        int | None, typer.Option(help="Round the rows up.", show_default="1")
    ] = None,
    force: Force = False,
) -> None:
    """Grow the base's vocabulary matrices for the extended tokenizer."""
    from chinese_llama import stages

    options = given(
        base=base, tokenizer=tokenizer, output=output, init=init, pad_to_multiple_of=pad_to_multiple_of,
        corpus=corpus or None,
    )  # fmt: skip
    space = workspace_for("extend-model", options, "base", "tokenizer", "output")
    made, manifest = stages.extended_model(space, options, force)
    note_if_kept(made)
    typer.echo(
        f"{made}: {manifest.metrics['base_vocab_size']:,} -> {manifest.metrics['rows']:,} rows ({manifest.settings['init']})."
    )


@app.command(
    "eval",
    epilog=EXAMPLES
    + "chinese-llama eval --model work/merged --text zh=zh.jsonl --text en=en.jsonl --json figures.json\n\n"
    + "chinese-llama eval                         [dim]# in a workspace: base and merged[/dim]",
)
def evaluate(
    model: Annotated[
        str | None, typer.Option(help="Model directory or hub id.", show_default="the workspace's")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE. May be repeated.", show_default="the workspace's")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Bits per character and per byte of texts: comparable between tokenizers."""
    from chinese_llama.evaluate.sets import evaluation

    options = given(model=model, text=text or None)
    models, sets = evaluation(workspace_for("eval", options, "model", "text"), options)
    from chinese_llama.evaluate.bits import evaluate as run
    from chinese_llama.model.load import quiet_libraries

    quiet_libraries()
    told: list[dict[str, Any]] = []
    for place in models:
        told.append(run(place, sets))
        typer.echo(place)
        for name, figures in told[-1]["sets"].items():
            typer.echo(
                f"  {name}: {figures['bits_per_character']:.3f} bits per character, {figures['bits_per_byte']:.3f} bits per byte, "
                f"perplexity {figures['perplexity']:.2f} per token, {figures['characters_per_token']:.3f} characters per token"
            )
    write_json(json_file, told[0] if len(told) == 1 else {"models": told})


@app.command(epilog=EXAMPLES + "chinese-llama generate --model work/merged --prompt '中国的首都是哪里？'")
def generate(
    prompt: Annotated[str, typer.Option(help="A question, or the beginning of a text for a base model.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model directory or hub id.", show_default="the workspace's merged model"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as text, even if the model has a template.")
    ] = False,
) -> None:
    """Answer one prompt."""
    _, loaded, tokenizer = load("generate", model)
    from chinese_llama.evaluate.generate import answer

    typer.echo(answer(loaded, tokenizer, prompt, max_new_tokens, temperature, seed, raw))


@app.command(epilog=EXAMPLES + "chinese-llama chat --model work/merged")
def chat(
    model: Annotated[
        str | None,
        typer.Option(help="Model directory or hub id.", show_default="the workspace's merged model"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
) -> None:
    """Talk to a model. /new starts a new conversation; an empty line or Ctrl-D ends it."""
    place, loaded, tokenizer = load("chat", model)
    from chinese_llama.evaluate.chat import chat as talk

    typer.echo(f"{place} (/new starts afresh, an empty line or Ctrl-D ends)")
    talk(loaded, tokenizer, max_new_tokens, temperature)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=EXAMPLES
    + "chinese-llama prepare pt_lora               [dim]# in a workspace[/dim]\n\n"
    + "chinese-llama prepare sft_lora --tokenizer-name-or-path work/tokenizer --data alpaca_zh.json --prepared-dir work/prepared",
)
def prepare(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Whose data: pt_lora or sft_lora.")],
) -> None:
    """Tokenise and pack a recipe's data ahead; options are the recipe's. The recipe then finds it, or makes it itself."""
    from chinese_llama.train.jobs import named_sources, prepare_ahead

    prepared = prepare_ahead(recipe, context.args)
    for source in named_sources(prepared):
        typer.echo(
            f"{source['name']}: {source['documents']:,} documents, {source['held_out']:,} held out, {source['tokens']:,} tokens, {source['blocks']:,} blocks"
        )
    typer.echo(prepared.directory)


@app.command(epilog=EXAMPLES + "chinese-llama quickstart\n\nchinese-llama chat")
def quickstart(
    directory: Annotated[
        Path, typer.Argument(help="Workspace to make: chinese-llama.yaml and quickstart/.")
    ] = Path(),
    force: Force = False,
) -> None:
    """The whole way at toy size, on text that comes with the package: some minutes on a CPU."""
    from chinese_llama.quickstart.pipeline import run

    run(directory, force)


def _terminate(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: exit code 0, 1 (a check that fails), 2 (bad input), 130 (stopped)."""
    signal.signal(signal.SIGTERM, _terminate)
    atexit.register(gc.freeze)  # else Python looks through all that torch has loaded as it ends
    sys.exit(report(_run, sys.argv[1:]))


def _run(argv: Sequence[str]) -> None:
    try:
        app(repeated(argv))
    except SystemExit as done:
        if done.code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise
