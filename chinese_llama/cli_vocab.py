"""The commands for vocabularies: train-vocab, extend-vocab, audit-vocab."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chinese_llama.commandline import (
    EXAMPLES,
    Base,
    Force,
    Output,
    check_json,
    given,
    note_if_kept,
    workspace_for,
    write_json,
)

app = typer.Typer()


@app.command(
    "train-vocab",
    epilog=EXAMPLES
    + "chinese-llama train-vocab --corpus zh.jsonl.gz --corpus books.txt --output work/chinese_sp --vocab-size 20000",
)
def train_vocab(
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text: .txt, .jsonl, .json, .parquet; also .gz, .zst. May be repeated.",
            show_default="the workspace's",
        ),
    ] = None,
    output: Output = None,
    vocab_size: Annotated[int | None, typer.Option(help="Pieces to train.", show_default="20000")] = None,
    model_type: Annotated[str | None, typer.Option(help="bpe or unigram.", show_default="bpe")] = None,
    force: Force = False,
) -> None:
    """Train a Chinese SentencePiece model on a corpus."""
    from chinese_llama import stages
    from chinese_llama.vocab.train import MODEL

    options = given(corpus=corpus or None, output=output, vocab_size=vocab_size, model_type=model_type)
    made, manifest = stages.trained_vocab(
        workspace_for("train-vocab", options, "corpus", "output"), options, force
    )
    note_if_kept(made)
    typer.echo(
        f"{made / MODEL}: {manifest.vocab_size:,} pieces from {manifest.metrics['characters']:,} Chinese characters."
    )


@app.command(
    "extend-vocab",
    epilog=EXAMPLES
    + "chinese-llama extend-vocab --base models/llama-7b --corpus zh.jsonl.gz --size 49920 --output work/tokenizer\n\n"
    + "chinese-llama extend-vocab --base models/llama-7b --chinese-sp chinese_sp.model --output work/tokenizer\n\n"
    + "chinese-llama extend-vocab                 [dim]# in a workspace[/dim]",
)
def extend_vocab(
    base: Base = None,
    chinese_sp: Annotated[
        Path | None,
        typer.Option(
            help="A Chinese SentencePiece model; 20k and 8k come along.",
            show_default="the workspace's; else 20k",
        ),
    ] = None,
    output: Output = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="Chinese text to learn on which pieces are worth their rows. May be repeated."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Most pieces of the finished tokenizer, base included.",
            show_default="as many as the Chinese model offers",
        ),
    ] = None,
    min_count: Annotated[
        int | None, typer.Option(help="Leave out pieces used less often in the corpus.", show_default="0")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="strict: nothing but Chinese changes, no dead piece; reference: as Chinese-LLaMA was merged.",
            show_default="strict",
        ),
    ] = None,
    pad_token: Annotated[
        str | None, typer.Option(help="Add a padding token, such as '\\[PAD]'.", show_default="none")
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="More texts to prove the contract on.")] = None,
    force: Force = False,
) -> None:
    """Add Chinese pieces to the base's tokenizer, and prove the result."""
    from chinese_llama import stages
    from chinese_llama.vocab import report

    options = given(
        base=base, chinese_sp=chinese_sp, output=output, corpus=corpus or None, size=size,
        min_count=min_count, policy=policy, pad_token=pad_token, probe=probe,
    )  # fmt: skip
    space = workspace_for("extend-vocab", options, "base", "output")
    made, told = stages.extended_tokenizer(space, options, force)
    note_if_kept(made)
    typer.echo(f"{made}: {report.summary(told)}\n  Report: {made / report.PAGE}")


@app.command(
    "audit-vocab",
    epilog=EXAMPLES
    + "chinese-llama audit-vocab --tokenizer work/tokenizer --base models/llama-7b --corpus zh.jsonl.gz --corpus en.jsonl.gz",
)
def audit_vocab(
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer: a directory, or its tokenizer.model.")],
    corpus: Annotated[list[Path], typer.Option(help="Text to tokenise. May be repeated.")],
    base: Annotated[Path | None, typer.Option(help="The base's tokenizer, to compare with.")] = None,
    page: Annotated[Path | None, typer.Option("--report", help="Write a Markdown page here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """What a tokenizer makes of a corpus: lengths by script, dead and unused pieces, disagreeing readers."""
    from chinese_llama.directories import write_text
    from chinese_llama.vocab import audit, report

    check_json(json_file)
    told = audit.audit_vocab(tokenizer, corpus, base)
    typer.echo(f"{tokenizer}: {report.summary(told)}")
    if page:
        write_text(page, report.markdown(told, report.hidden_size(base) if base else None))
    write_json(json_file, told)
