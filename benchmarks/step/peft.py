"""Contenders of `train-step`: PEFT by itself with the plain Trainer of transformers.

`embeddings: full` is `modules_to_save`, as the reference project trains; `new-rows` is
`trainable_token_indices`. With `upcast` whole matrices train in float32, as mixed precision has it; PEFT
leaves `modules_to_save` in the type of the base, and casts LoRA and single rows only.
"""

from __future__ import annotations

from typing import Any

from benchmarks.step.common import MATRICES, Settings, begin, blocks


def lora(settings: Settings) -> Any:
    """The peft.LoraConfig of the settings."""
    from peft import LoraConfig

    if settings.embeddings == "full":
        return LoraConfig(**settings.lora, modules_to_save=MATRICES)
    rows = list(range(settings.first_new, settings.rows))
    return LoraConfig(**settings.lora, trainable_token_indices=dict.fromkeys(MATRICES, rows))


def load(settings: Settings) -> Any:
    """The base, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    model.config.use_cache = False
    return model


def upcast(model: Any) -> None:
    """Make what trains float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def main() -> None:
    settings = begin()
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments, default_data_collator

    model = get_peft_model(load(settings), lora(settings))
    if settings.upcast:
        upcast(model)
    columns = ["input_ids", "labels"] if settings.across else ["input_ids", "labels", "position_ids"]
    arguments = TrainingArguments(
        output_dir=f"{settings.work}/trainer", remove_unused_columns=False, **settings.training
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=blocks(settings, *columns),
        data_collator=default_data_collator,
    )
    trainer.train()


if __name__ == "__main__":
    main()
