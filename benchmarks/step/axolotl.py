"""A contender of `train-step`: Axolotl, LoRA with `lora_modules_to_save`, on blocks that are tokenised and
packed already, each a sample; its own packing, which keeps documents apart, needs flash attention.

Whole matrices stay in the type of the base, as PEFT has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.step.common import MATRICES, PROJECTIONS, begin, blocks

SAME = (  # names of its settings that are those of transformers
    "gradient_accumulation_steps",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "gradient_checkpointing",
    "logging_steps",
    "save_strategy",
    "seed",
)


def main() -> None:
    settings = begin()
    from axolotl.cli.train import do_cli

    place = Path(settings.work)
    data = place / "blocks.parquet"
    ones = blocks(settings, "input_ids", "labels").with_format(None)
    ones.add_column("attention_mask", [[1] * settings.block] * len(ones)).to_parquet(str(data))
    shared = settings.training
    config: dict[str, Any] = {
        "base_model": settings.model,
        "tokenizer_config": settings.tokenizer,
        "datasets": [{"path": str(data), "ds_type": "parquet", "split": "train", "type": None}],
        "dataset_prepared_path": str(place / "prepared"),
        "shuffle_merged_datasets": False,
        "output_dir": str(place / "axolotl"),
        "sequence_len": settings.block,
        "sample_packing": False,
        "val_set_size": 0,
        "adapter": "lora",
        "lora_r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "lora_target_modules": PROJECTIONS,
        "lora_modules_to_save": MATRICES,
        "micro_batch_size": settings.batch,
        "num_epochs": 1,
        "optimizer": settings.optim,
        "lr_scheduler": shared["lr_scheduler_type"],
        "sdp_attention": True,
    }
    if not torch.cuda.is_available():  # its kernels, on by default, know nothing else
        config |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    file = place / "axolotl.yaml"
    file.write_text(json.dumps(config | {name: shared[name] for name in SAME}), encoding="utf-8")
    do_cli(str(file))


if __name__ == "__main__":
    main()
