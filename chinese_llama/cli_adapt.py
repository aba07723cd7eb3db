"""The commands `adapt` and `quickstart`: every stage of a workspace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from chinese_llama import workspace
from chinese_llama.commandline import EXAMPLES, Force

app = typer.Typer()


@app.command(
    epilog=EXAMPLES
    + "chinese-llama adapt --dry-run               [dim]# in a workspace: the plan, memory and disk[/dim]\n\n"
    + "chinese-llama adapt my-model/chinese-llama.yaml\n\n"
    + "chinese-llama adapt --from sft-lora"
)
def adapt(
    file: Annotated[
        Path | None,
        typer.Argument(help="The workspace file.", show_default="chinese-llama.yaml here or above"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be made, and the memory and disk that it takes."),
    ] = False,
    only: Annotated[str | None, typer.Option(help="Look at this stage only.", metavar="STAGE")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Begin with this stage.", metavar="STAGE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make again what stands, too.")] = False,
) -> None:
    """Run every stage of a workspace that is missing or stale, and write the report.

    Stages: train_vocab, extend_vocab, extend_model, control, pt_lora, sft_lora, merge, eval. What stands is kept; what
    was stopped goes on. Exit code 1 if the result breaks a limit of eval.max_regression.
    """
    if file:
        found = workspace.Workspace(file / workspace.FILE if file.is_dir() else file)
    else:
        found = workspace.required("adapt", "FILE")
    if dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"  # a plan fetches nothing
        from chinese_llama.adapt.run import planned

        typer.echo(planned(found, only, start, force))
        return
    _run(found, only, start, force)


@app.command(epilog=EXAMPLES + "chinese-llama quickstart\n\nchinese-llama chat")
def quickstart(
    directory: Annotated[
        Path, typer.Argument(help="Workspace to make: chinese-llama.yaml and quickstart/.")
    ] = Path(),
    force: Force = False,
) -> None:
    """The whole way at toy size, on text that comes with the package: `adapt`, some minutes on a CPU."""
    from chinese_llama.quickstart.pipeline import make

    found = make(directory, force)
    _run(found, None, None, force)
    there = "" if str(directory) == "." else f"cd {directory} && "
    typer.echo(f"Talk to it: {there}chinese-llama chat --model {found.settings.merge.output}")


def _run(space: workspace.Workspace, only: str | None, start: str | None, force: bool) -> None:
    from chinese_llama.adapt.run import adapt as run

    over, told = run(space, only, start, force)
    if told:
        typer.echo(told)
    for sentence in over:
        typer.echo(sentence)
    if over:
        raise typer.Exit(1)
