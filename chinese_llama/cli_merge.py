"""The commands `merge` and `convert`: thin, like all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chinese_llama import workspace
from chinese_llama.commandline import EXAMPLES, Force, Output, frugal, given, note_if_kept

app = typer.Typer()


@app.command(
    epilog=EXAMPLES
    + "chinese-llama merge --loras plus,alpaca    [dim]# in a workspace[/dim]\n\n"
    + "chinese-llama merge --base work/extended --loras plus=work/plus,alpaca=work/alpaca --output work/merged\n\n"
    + "chinese-llama merge --base models/llama-7b --loras chinese-llama-plus-7b,chinese-alpaca-plus-7b --output out --dry-run\n\n"
    + "chinese-llama merge --plan merge/plans/weighted.yaml --base models/llama-7b --output out"
)
def merge(
    base: Annotated[
        str | None,
        typer.Option(
            help="The weights that the first adapter was trained on: a directory (Hugging Face's or Meta's form) or a hub id.",
            show_default="the plan's, else the workspace's extended model",
        ),
    ] = None,
    loras: Annotated[
        str | None,
        typer.Option(
            help="Adapters in order: names, directories, hub ids, or name=directory.",
            show_default="the workspace's",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="What each adapter's delta is multiplied with: 1.0,0.7.", show_default="1 each"),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="A plan file instead of --loras, or the name of one that comes along.")
    ] = None,
    output: Output = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="the base's")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="hf, or meta: consolidated.NN.pth and params.json.", show_default="hf"),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Threads that compute; 0: one for each processor.")] = 0,
    verify: Annotated[
        bool,
        typer.Option(
            help="Read the result again, and compare every weight, and logits, with base + adapters."
        ),
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what a stopped or killed merge left.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done and what it costs; write nothing.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace an output that exists; merge in spite of another base or order."
        ),
    ] = False,
) -> None:
    """Bake LoRA adapters into base weights; the result is a plain HF model."""
    from chinese_llama.merging.stage import described, merged_model

    frugal()
    options = given(
        base=base, loras=loras, weights=weights, plan=plan, output=output, dtype=dtype, format=format
    ) | {"workers": workers, "verify": verify, "resume": resume}
    if dry_run:
        typer.echo(described(workspace.find(), options, force))
        return
    made, manifest = merged_model(workspace.find(), options, force)
    note_if_kept(made)
    from chinese_llama.merging.verify import told

    metrics = manifest.metrics
    typer.echo(
        f"{made}: {' + '.join(manifest.settings['loras'])} merged into {manifest.inputs['base']['path']}; "
        f"{metrics['changed_tensors']} of {metrics['tensors']} tensors changed, {metrics['rows']:,} rows.\n"
        f"{told(metrics.get('verified'))}"
    )


@app.command(
    epilog=EXAMPLES
    + "chinese-llama convert --from meta --to hf llama/7B --output models/llama-7b\n\n"
    + "chinese-llama convert --from hf --to meta work/merged --output work/meta --shards 2"
)
def convert(
    source: Annotated[Path, typer.Argument(help="The model's directory.")],
    to: Annotated[str, typer.Option("--to", help="hf or meta.")],
    output: Annotated[Path, typer.Option(help="Directory to write; must not exist yet.")],
    origin: Annotated[
        str | None, typer.Option("--from", help="hf or meta.", show_default="what it is")
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1, help="Files of Meta's form.", show_default="as before, or as Meta's for the size"
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The longest text, which Meta's form does not say.",
            show_default="2048, bfloat16: 4096",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Meta's own LLaMA 1 and 2 checkpoints into Hugging Face's form and back, bit for bit."""
    from chinese_llama.convert.convert import convert as run

    frugal()
    manifest = run(source, output, to, origin, shards, context, force)
    metrics = manifest.metrics
    typer.echo(
        f"{output}: {metrics['tensors']} tensors, {metrics['rows']:,} rows, {metrics['bytes'] / 1e9:.2f} GB."
    )
