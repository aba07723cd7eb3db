"""The commands `generate`, `chat`, `rate` and `judge`: what models say, and what people and judges say of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chinese_llama import workspace
from chinese_llama.commandline import EXAMPLES, Below, Force, Loras, check_json, note_if_kept, write_json
from chinese_llama.errors import UserError

if TYPE_CHECKING:
    from chinese_llama.merging.adapter import Adapter

app = typer.Typer()
Model = Annotated[
    str | None, typer.Option(help="Model directory or hub id.", show_default="the workspace's merged model")
]
Tokens = Annotated[int, typer.Option(min=1, help="The longest answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="What generate --output has written.")]


def _place(command: str, model: str | None) -> str:
    """Where the model is: as given, else the workspace's merged one."""
    if model is not None:
        return model
    space = workspace.required(command, "--model")
    merged = space.path(space.settings.merge.output)
    if not merged.is_dir():
        raise UserError(f"{merged} does not exist yet; make it with chinese-llama merge --loras plus,alpaca.")
    return str(merged)


def _adapted(base: str | None, loras: str, model: str | None) -> tuple[str, list[Adapter]]:
    """Where the base of `--loras` is, and these adapters."""
    from chinese_llama.merging.plan import parse_list, resolve

    if model is not None:
        raise UserError("generate: give --model, or --loras with what they are put on (--base), not both.")
    space = workspace.required("generate", "--base") if base is None else workspace.find()
    if base is None and space:
        base = str(space.path(space.settings.extend_model.output))
    return str(base), [resolve(item, space) for item in parse_list(loras)]


def _load(place: str, adapters: Sequence[Adapter] = ()) -> tuple[Any, Any]:
    from chinese_llama.evaluate.models import Subject, open_subject
    from chinese_llama.model.load import quiet_libraries

    quiet_libraries()
    return open_subject(Subject(place, place, list(adapters)))


@app.command(
    epilog=EXAMPLES
    + "chinese-llama generate --model work/merged --prompt '中国的首都是哪里？'\n\n"
    + "chinese-llama generate --prompts prompts.jsonl --model work/merged --against work/control --output work/answers\n\n"
    + "chinese-llama generate --prompt 你好 --base work/extended --loras plus=work/plus,alpaca=work/alpaca"
)
def generate(
    prompt: Annotated[
        str | None, typer.Option(help="A question, or the beginning of a text for a base model.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of them: .txt, a line each; or records with prompt, or instruction data (the first question)."
        ),
    ] = None,
    model: Model = None,
    base: Below = None,
    loras: Loras = None,
    against: Annotated[
        str | None, typer.Option(help="With --prompts: a second model, to compare with.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --prompts: directory to write; must not exist yet.")
    ] = None,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of what is drawn, and of the order on the page.")
    ] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue prompts as text, even if the model has a template.")
    ] = False,
    force: Force = False,
) -> None:
    """Answer a prompt, or those of a file, with one model or two: answers.jsonl, and a page to read and rate."""
    if (prompt is None) == (prompts is None):
        raise UserError("generate: give --prompt TEXT, or --prompts FILE with --output DIR.")
    if (prompts is None) != (output is None) or (against and prompts is None):
        raise UserError(
            "generate: --prompts, --output and --against go together: a file's answers are written."
        )
    if base is not None and loras is None:
        raise UserError("--base is what the adapters of --loras are put on; for a plain model give --model.")
    place, adapters = _adapted(base, loras, model) if loras is not None else (_place("generate", model), [])
    if prompt is not None:
        from chinese_llama.evaluate.generate import answer

        typer.echo(answer(*_load(place, adapters), prompt, max_new_tokens, temperature, seed, raw))
        return
    from chinese_llama.evaluate.answers import PAGE, How, answer_file
    from chinese_llama.model.load import quiet_libraries

    assert prompts and output
    quiet_libraries()
    models = {"A": place} | ({"B": against} if against else {})
    how = How(max_new_tokens, temperature, seed, raw)
    manifest = answer_file(prompts, models, output, how, force, adapters)
    note_if_kept(output)
    for label, found in manifest.metrics.get("right", {}).items():
        low, high = found["interval"]
        typer.echo(
            f"{label} ({manifest.metrics['models'][label]}): the keyword is in {found['right']} of {found['questions']} answers "
            f"({found['share']:.1%}; 95 %: {low:.1%} to {high:.1%})."
        )
    vote = f"; to vote: chinese-llama rate {output}" if against else ""
    typer.echo(f"{output}: {manifest.metrics['prompts']:,} prompts; to read: {output / PAGE}{vote}")


@app.command(epilog=EXAMPLES + "chinese-llama chat --model work/merged")
def chat(
    model: Model = None,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
) -> None:
    """Talk to a model. /new starts a new conversation; an empty line or Ctrl-D ends it."""
    place = _place("chat", model)
    loaded, tokenizer = _load(place)
    from chinese_llama.evaluate.chat import chat as talk

    typer.echo(f"{place} (/new starts afresh, an empty line or Ctrl-D ends)")
    talk(loaded, tokenizer, max_new_tokens, temperature)


@app.command(
    epilog=EXAMPLES + "chinese-llama rate work/answers\n\n" + "chinese-llama rate work/answers --tally"
)
def rate(
    directory: Directory,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: any that is free.")] = 8790,
    tally: Annotated[bool, typer.Option("--tally", help="Only tell how the votes stand.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Vote on the answers of two models, on a page that this machine serves to itself; who won, with an interval."""
    from chinese_llama.evaluate.rating import Votes, serve

    check_json(json_file)
    if not tally:
        serve(directory, port)
    votes = Votes(directory)
    typer.echo(votes.told())
    write_json(json_file, {"names": votes.names, **votes.tally()})


@app.command(
    epilog=EXAMPLES
    + "chinese-llama judge work/answers --url http://localhost:8000/v1 --judge Qwen/Qwen3-32B --key-env JUDGE_KEY"
)
def judge(
    directory: Directory,
    url: Annotated[str, typer.Option(help="An OpenAI-compatible API, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option("--judge", help="The judge's name there.")],
    key_env: Annotated[
        str, typer.Option(help="The environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    timeout: Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds for a whole request.")] = 120.0,
    retries: Annotated[
        int, typer.Option(min=0, help="Further tries, of a request that fails or a reply that is no verdict.")
    ] = 4,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Requests at a time.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Have another model judge answers: of two in both orders, of one in points. It sends prompts and answers there."""
    from chinese_llama.evaluate.endpoint import Endpoint
    from chinese_llama.evaluate.judge import judge as run
    from chinese_llama.evaluate.judge import sentences

    check_json(json_file)
    key = os.environ.get(key_env, "")
    if not key.strip():
        raise UserError(
            f"the environment variable {key_env} (--key-env) holds no key; set it, to any word where none is asked for."
        )
    figures = run(directory, Endpoint(url, model, key, timeout, retries), workers)
    typer.echo(sentences(figures))
    write_json(json_file, figures)
