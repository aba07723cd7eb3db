"""What extend-model costs beside `cp` of the base: seconds and peak memory.

    python -m benchmarks extend-model --data DATA

makes a LLaMA of 7B geometry with random weights (bfloat16, shards of 5 GB), so nothing has to be fetched,
and grows its matrices for LLaMA's tokenizer (DATA/tokenizers/llama/tokenizer.model) with the shipped Chinese
pieces. extend-model hashes all that it reads and writes (the hashes of the base are not remembered from the
run before), and flushes to the disk. Smaller: --layers 8 --hidden 2048 --shards 500MB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from functools import partial
from pathlib import Path

from benchmarks.record import (
    COPY,
    COSTS,
    OUT,
    ROOT,
    Measured,
    costs,
    in_turns,
    markdown,
    measured,
    options_of,
    record,
)


def main(argv: list[str]) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=OUT / "extend-model")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--shards", default="5GB", help="the size of the base's files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("make",), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.work = work = options.work.resolve()
    if options.only:
        make(options)
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    measured([sys.executable, "-m", "benchmarks", "extend-model", *argv, "--only", "make"])
    shutil.copyfile(options.data / "tokenizers/llama/tokenizer.model", work / "base" / "tokenizer.model")
    tool = [sys.executable, "-m", "chinese_llama"]
    measured([*tool, "extend-vocab", "--base", "base", "--output", "tokenizer"], work)
    extend = [*tool, "extend-model", "--base", "base", "--tokenizer", "tokenizer", "--output", "out"]
    ways = {
        "cp of the base, flushed": COPY,
        "cp of the base": ["cp", "-r", "base", "out"],
        "extend-model": extend,
    }
    found = in_turns({name: partial(once, command, work) for name, command in ways.items()}, options.rounds)
    size = sum(file.stat().st_size for file in (work / "base").iterdir())
    notes = f"LLaMA of {options.layers} layers, hidden {options.hidden}, bfloat16: {size / 1e9:.1f} GB. "
    notes += f"Medians of {options.rounds} rounds."
    shutil.rmtree(work)
    record("extend-model", markdown(COSTS, costs(found, next(iter(ways)))), notes, options.results)


def once(command: list[str], work: Path) -> Measured:
    """One run, in which no hash is remembered."""
    for made in ("out", "cache"):
        shutil.rmtree(work / made, ignore_errors=True)
    os.sync()
    return measured(command, work, {"XDG_CACHE_HOME": str(work / "cache")})


def make(options: argparse.Namespace) -> None:
    """The base: random weights, vocabulary 32,000."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 43 // 16,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 128),
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(str(options.work / "base"), max_shard_size=options.shards)
