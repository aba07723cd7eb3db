"""A contender of `train-step`, for a GPU: Unsloth as its documentation trains LoRA with `embed_tokens` and `lm_head`
(continued pretraining), on blocks that are tokenised and packed already, each a sample.
"""

from __future__ import annotations

import unsloth  # before transformers and trl, which it patches

from benchmarks.step.common import MATRICES, PROJECTIONS, begin, blocks


def main() -> None:
    settings = begin()
    import torch
    from transformers import default_data_collator
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=settings.model,
        max_seq_length=settings.block,
        dtype=getattr(torch, settings.dtype),
        load_in_4bit=False,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[*PROJECTIONS, *MATRICES],
        use_gradient_checkpointing=settings.checkpointing,
        random_state=0,
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{settings.work}/unsloth",
            max_length=settings.block,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            **settings.training,
        ),
        train_dataset=blocks(settings, "input_ids", "labels"),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
