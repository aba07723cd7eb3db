"""A contender of `train-step`: TRL's SFTTrainer with `modules_to_save`, on blocks that are packed already."""

from __future__ import annotations

from benchmarks.step.common import begin, blocks
from benchmarks.step.peft import load, lora, upcast


def main() -> None:
    settings = begin()
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=f"{settings.work}/trl",
        max_length=settings.block,
        packing=True,  # its collator lays a batch end to end, and tells documents by `seq_lengths`
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings.training,
    )
    trainer = SFTTrainer(
        model=load(settings),
        args=arguments,
        train_dataset=blocks(settings, "input_ids", "labels", "seq_lengths").with_format(None),
        processing_class=AutoTokenizer.from_pretrained(settings.tokenizer),
        peft_config=lora(settings),
    )
    if settings.upcast:
        upcast(trainer.model)
    trainer.train()


if __name__ == "__main__":
    main()
