"""What the contenders of `train-step` are given: a tokenizer, a model with random weights, packed blocks.

    python -m benchmarks.step.material options.json

makes them in the directory `work` of the options, unless they are there, and measures the machine's rate of
matrix products.
"""

from __future__ import annotations

import gzip
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

CHARACTERS = 3  # a token of the corpus holds fewer


def main() -> None:
    made(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def made(options: dict[str, Any]) -> dict[str, Any]:
    """What `work`/material.json then holds: the options, what `make` says, and the rate, FLOP a second."""
    work = Path(options["work"])
    record = work / "material.json"
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if found.get("options") != options:
        shutil.rmtree(work / "material", ignore_errors=True)
        (work / "material").mkdir(parents=True)
        found = {"options": options, **make(work / "material", options)}
    found["rate"] = matrix_rate(options["dtype"])
    record.write_text(json.dumps(found), encoding="utf-8")
    return found


def make(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Tokenizer, model and blocks in `directory`; what there is to know of them."""
    from chinese_llama.artifacts import Manifest, write_manifest
    from chinese_llama.model.load import first_new_id, load_tokenizer
    from chinese_llama.vocab.merge import extend_vocab

    base, tokenizer = directory / "base", directory / "tokenizer"
    base.mkdir()
    shutil.copyfile(options["tokenizer"], base / "tokenizer.model")
    extend_vocab(base, Path(options["chinese_sp"]), tokenizer, policy="reference")
    loaded = load_tokenizer(tokenizer)
    write_model(directory / "model", len(loaded), options)
    for file in tokenizer.glob("tokenizer*"):  # some peers look for it beside the model
        shutil.copyfile(file, directory / "model" / file.name)
    first = first_new_id(tokenizer)
    manifest = Manifest("model", "train-step", vocab_size=len(loaded), metrics={"base_vocab_size": first})
    write_manifest(
        directory / "model", manifest
    )  # as extend-model does: recipes need not hash the base again
    return {
        "rows": len(loaded),
        "first_new": first,
        "characters_per_token": write_blocks(directory, loaded, options),
    }


def write_model(directory: Path, rows: int, options: dict[str, Any]) -> None:
    """A LLaMA with random weights and `rows` pieces."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=options["hidden"],
        intermediate_size=options["hidden"] * 43 // 16,
        num_hidden_layers=options["layers"],
        num_attention_heads=options["heads"],
        max_position_embeddings=options["block"],
        initializer_range=options["hidden"] ** -0.5,  # logits of order 1: a loss that attention matters to
        dtype=options["dtype"],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options["dtype"]))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(str(directory), max_shard_size="5GB")


def write_blocks(directory: Path, tokenizer: Any, options: dict[str, Any]) -> float:
    """As many of the corpus' first documents as the steps take, packed as a recipe does, and the same for the
    others as blocks.parquet; characters of a token."""
    import numpy
    import pyarrow
    import pyarrow.parquet

    from chinese_llama.data.mixture import sources
    from chinese_llama.data.prepare import Job, prepare
    from chinese_llama.train.collate import Collator

    block, corpus = options["block"], directory / "corpus.jsonl"
    slice_of(Path(options["corpus"]), corpus, options["blocks"] * block * CHARACTERS)
    job = Job("pretraining", tuple(sources(str(corpus))), directory / "tokenizer", block)
    prepared = prepare(job, directory / "prepared", tokenizer)
    rows = list(prepared.dataset(seed=42))
    batch = Collator(block, tokenizer.eos_token_id)(rows)
    columns = {name: list(batch[name].numpy()) for name in ("input_ids", "labels", "position_ids")}
    columns["attention_mask"] = [(positions == 0).cumsum() for positions in columns["position_ids"]]
    starts = [[*(positions == 0).nonzero()[0], block] for positions in columns["position_ids"]]
    columns["seq_lengths"] = [numpy.diff(found) for found in starts]
    # without the metadata of `datasets`, which older versions cannot read
    pyarrow.parquet.write_table(pyarrow.table(columns), directory / "blocks.parquet")
    figures = prepared.manifest.metrics["sources"]
    return float(sum(s["characters"] for s in figures) / sum(s["tokens"] for s in figures))


def slice_of(corpus: Path, target: Path, characters: int) -> None:
    """Write the first lines of a .jsonl or .jsonl.gz that hold so many characters."""
    opened = gzip.open if corpus.suffix == ".gz" else open
    with opened(corpus, "rt", encoding="utf-8") as source, target.open("w", encoding="utf-8") as kept:
        for line in source:
            kept.write(line)
            characters -= len(line)
            if characters < 0:
                return


def matrix_rate(dtype: str) -> float:
    """FLOP a second of large products of matrices: the median of some."""
    import torch

    cuda = torch.cuda.is_available()
    size, device = (8192, "cuda") if cuda else (1536, "cpu")
    one, two = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        one @ two
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def flops(options: dict[str, Any], rows: int, rank: int) -> dict[str, float]:
    """FLOP of a token in a step, by part.

    `model`: 4N, where N are the weights in matrix products, lm_head included (layers * (4 h*h + 3 h*i) + rows*h):
    2N forward, and 2N for the gradient of what goes into them; frozen weights have none of their own, and what
    is computed a second time (checkpointing) does not count. `whole head`: 2 rows*h more where lm_head trains
    whole. `attention`: 6 s*h a layer: two products of 2 s*h, halved by causality, three times (forward, and
    both gradients), for blocks of s tokens of one document. `lora`: 6 times its weights.
    """
    h, layers, block = options["hidden"], options["layers"], options["block"]
    inner = h * 43 // 16
    weights = layers * (4 * h * h + 3 * h * inner) + rows * h
    adapters = layers * rank * (4 * 2 * h + 3 * (h + inner))
    return {
        "model": 4.0 * weights,
        "whole head": 2.0 * rows * h,
        "attention": 6.0 * layers * block * h,
        "lora": 6.0 * adapters,
    }


if __name__ == "__main__":
    main()
