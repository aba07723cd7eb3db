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
from chinese_llama.cli_adapt import app as adapt_app
from chinese_llama.cli_answers import app as answers_app
from chinese_llama.cli_doctor import app as doctor_app
from chinese_llama.cli_measure import app as measure_app
from chinese_llama.cli_merge import app as merge_app
from chinese_llama.cli_vocab import app as vocab_app
from chinese_llama.commandline import (
    EXAMPLES,
    Base,
    Force,
    Output,
    given,
    note_if_kept,
    repeated,
    workspace_for,
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
for part in (adapt_app, vocab_app, merge_app, measure_app, answers_app, doctor_app):
    app.add_typer(part)


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
    where = "" if directory.resolve() == Path.cwd() else f", in {directory}"
    typer.echo(
        f"{file} is written. Check base, corpus and data in it; then{where}:\n  chinese-llama adapt --dry-run"
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


def _terminate(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: exit code 0, 1 (a check that fails), 2 (bad input), 130 (stopped)."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # a terminal that closes, unless nohup says otherwise
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)
    atexit.register(gc.freeze)  # else Python looks through all that torch has loaded as it ends
    sys.exit(report(_run, sys.argv[1:]))


def _run(argv: Sequence[str]) -> None:
    try:
        app(repeated(argv))
    except SystemExit as done:
        if done.code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise
