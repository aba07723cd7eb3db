"""Continued pretraining with LoRA and trainable rows for the new pieces.

    accelerate launch recipes/pt_lora.py                                  # in a workspace
    accelerate launch recipes/pt_lora.py --config recipes/configs/pt_7b_80gb.yaml \\
        --model_name_or_path work/extended --data zh.jsonl --output_dir work/plus
    python recipes/pt_lora.py --config recipes/configs/pt_tiny_cpu.yaml --max_steps 20
    python recipes/pt_lora.py --dry-run                  # what would train, on what, in which memory

Fields are those of chinese_llama.train.fields.PretrainingFields and of transformers'
TrainingArguments, in the YAML file and on the command line alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from chinese_llama.errors import report

DEFAULTS = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "weight_decay": 0.01,
    "num_train_epochs": 1,
}


def main(argv: Sequence[str]) -> None:
    """Parse, build, train, save."""
    from chinese_llama.train.fields import PretrainingFields, resolve

    recipe = resolve("pt_lora", PretrainingFields, DEFAULTS, argv)

    from chinese_llama.model.load import quiet_libraries
    from chinese_llama.train.jobs import pretraining_job
    from chinese_llama.train.session import run

    quiet_libraries()
    run(recipe, pretraining_job(recipe))


if __name__ == "__main__":
    sys.exit(report(main, sys.argv[1:]))
