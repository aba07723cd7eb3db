"""Instruction tuning with LoRA, on the base with the adapters below it baked in.

    accelerate launch recipes/sft_lora.py                                 # in a workspace
    accelerate launch recipes/sft_lora.py --config recipes/configs/sft_7b_80gb.yaml \\
        --model_name_or_path work/extended --adapters plus=work/plus \\
        --data alpaca_zh.jsonl --output_dir work/alpaca
    python recipes/sft_lora.py --dry-run                 # what would train, on what, in which memory

Only answers (and the end of text after them) are learnt. Fields are those of
chinese_llama.train.fields.TuningFields and of transformers' TrainingArguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from chinese_llama.errors import report

DEFAULTS = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of all steps
    "weight_decay": 0.0,
    "num_train_epochs": 2,
}


def main(argv: Sequence[str]) -> None:
    """Parse, build, train, save."""
    from chinese_llama.train.fields import TuningFields, resolve

    recipe = resolve("sft_lora", TuningFields, DEFAULTS, argv)

    from chinese_llama.model.load import quiet_libraries
    from chinese_llama.train.jobs import tuning_job
    from chinese_llama.train.session import run

    quiet_libraries()
    run(recipe, tuning_job(recipe))


if __name__ == "__main__":
    sys.exit(report(main, sys.argv[1:]))
