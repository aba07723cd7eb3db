"""The command `doctor`: thin, like all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chinese_llama.commandline import EXAMPLES

app = typer.Typer()


@app.command(
    epilog=EXAMPLES
    + "chinese-llama doctor models/llama-7b chinese-llama-plus-lora-7b chinese-alpaca-plus-lora-7b\n\n"
    + "chinese-llama doctor work/tokenizer zh.jsonl.gz alpaca_zh.json\n\n"
    + "chinese-llama doctor .                     [dim]# a workspace: all that it names[/dim]\n\n"
    + "chinese-llama doctor work/merged --json > report.json"
)
def doctor(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            help="Models, adapters, tokenizers, merged models, data, in any mix; or a workspace.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Say what files are, whether they fit, in which order adapters merge, and what is wrong. Exit code 1: something is broken."""
    import json
    import shutil
    import sys

    from chinese_llama.doctor import examine

    report = examine.examine(paths)
    if as_json:
        typer.echo(json.dumps(examine.as_json(report), ensure_ascii=False, indent=1))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        typer.echo(examine.text(report, width))
    raise typer.Exit(report.exit_code)
