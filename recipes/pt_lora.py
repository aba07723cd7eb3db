"""Continued pretraining with LoRA and trainable rows for the new pieces.

    accelerate launch recipes/pt_lora.py                                  # in a workspace
    accelerate launch recipes/pt_lora.py --config recipes/configs/pt_7b_80gb.yaml \\
        --model_name_or_path work/extended --data zh.jsonl --output_dir work/plus
    python recipes/pt_lora.py --config recipes/configs/pt_tiny_cpu.yaml --max_steps 20

Fields are those of chinese_llama.train.fields.PretrainingFields and of transformers'
TrainingArguments, in the YAML file and on the command line alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from chinese_llama.errors import report

DEFAULTS = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "weight_decay": 0.01,
    "num_train_epochs": 1,
}
BATCH = 256  # documents


def main(argv: Sequence[str]) -> None:
    """Parse, build, train, save."""
    from chinese_llama.train.fields import PretrainingFields, resolve

    recipe = resolve("pt_lora", PretrainingFields, DEFAULTS, argv)
    fields = recipe.fields

    from chinese_llama.model.load import quiet_libraries
    from chinese_llama.train.session import run

    quiet_libraries()

    def blocks(tokenizer: Any, path: Path) -> Iterable[dict[str, list[int]]]:
        from chinese_llama.data.packing import pack_documents

        return pack_documents(tokenized(tokenizer, path), fields.block_size, tokenizer.eos_token_id)

    run(recipe, fields.block_size, blocks, settings={})


def tokenized(tokenizer: Any, path: Path) -> Iterator[list[int]]:
    """bos, ids and eos of every document; literal control tokens in a text stay text."""
    from chinese_llama.data.formats import documents
    from chinese_llama.progress import track

    texts = track(documents(path), f"packing {path.name}", unit="documents")
    while batch := list(islice(texts, BATCH)):
        encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True)
        for ids in encoded["input_ids"]:
            yield [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


if __name__ == "__main__":
    sys.exit(report(main, sys.argv[1:]))
