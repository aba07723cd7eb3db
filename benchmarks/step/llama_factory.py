"""A contender of `train-step`: LLaMA-Factory, LoRA with `additional_target` and packing that keeps documents
apart (`neat_packing`, which its supervised stage has), on blocks that are tokenised and packed already.

It makes what trains float32 by itself.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.step.common import MATRICES, PROJECTIONS, begin, blocks


def main() -> None:
    settings = begin()
    from llamafactory.train.tuner import run_exp

    packed = Path(settings.work) / "tokenized"
    columns = ("input_ids", "labels", "attention_mask", "position_ids")
    blocks(settings, *columns).with_format(None).save_to_disk(str(packed / "train"))
    (packed / "dataset_dict.json").write_text('{"splits": ["train"]}', encoding="utf-8")
    run_exp(
        {
            "model_name_or_path": settings.model,
            "dataset": "blocks",  # asked for, and passed over
            "tokenized_path": str(packed),
            "output_dir": f"{settings.work}/llama_factory",
            "stage": "sft",
            "template": "empty",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "lora_target": ",".join(PROJECTIONS),
            "additional_target": ",".join(MATRICES),
            "cutoff_len": settings.block,
            "neat_packing": True,
            "flash_attn": "sdpa",
            "disable_gradient_checkpointing": not settings.checkpointing,
            **settings.training,
        }
    )


if __name__ == "__main__":
    main()
