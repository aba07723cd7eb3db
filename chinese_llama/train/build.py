"""The model that a recipe trains: base, adapters below it, LoRA and vocabulary rows on top."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from chinese_llama.errors import DoesNotFit, OutputExists, UserError
from chinese_llama.merging.live import bake_in, grow
from chinese_llama.merging.plan import Adapter, Step, check_lineage, load
from chinese_llama.merging.stream import Options, merge
from chinese_llama.model.adapters import whole_rows
from chinese_llama.model.lean import lean
from chinese_llama.model.load import check_pair, check_tokenizer, first_new_id, load_model
from chinese_llama.model.lora import add_lora, continue_lora, lora_config
from chinese_llama.model.shards import Weights
from chinese_llama.progress import say
from chinese_llama.train.fields import Fields, Recipe


def build(recipe: Recipe[Any], adapters: list[Adapter], tokenizer: Any, arguments: Any) -> Any:
    """The PeftModel that trains: the base with `adapters` baked in, and a fresh LoRA or the one of
    `init_adapter` on top. With a quantised base, adapters below are merged into a copy first, in the
    directory where the run works.

    Raises DoesNotFit where tokenizer, base and adapters do not belong together.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 divides the weights before LoRA and rows are put on them
    fields = recipe.fields
    place = Path(fields.model_name_or_path)
    check_length(place, fields.length)
    if Path(fields.tokenizer) != place:
        check_tokenizer(place, tokenizer, fields.tokenizer)
    going_on = load("init_adapter", Path(fields.init_adapter)) if fields.init_adapter else None
    check_lineage(place, [*adapters, *([going_on] if going_on else [])])
    if fields.quantization == "none":
        model = load_model(place, fields.dtype)
        bake_in(model, place, adapters)
    else:
        if adapters:
            place = _merged(place, adapters, arguments)
        model = load_model(place, fields.dtype, fields.quantization, training_device())
    if going_on:
        grow(model, whole_rows(going_on))
    check_pair(model, tokenizer, fields.model_name_or_path)
    model.config.use_cache = False
    if going_on:
        return lean(continue_lora(model, going_on))
    divided = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if divided and fields.embeddings == "new-rows" and model.config.tie_word_embeddings:
        raise UserError(
            "embeddings: new-rows does not go with FSDP where both matrices are one; take full or frozen, or DDP."
        )
    first = first_new_id(fields.model_name_or_path, fields.tokenizer)
    config = lora_config(
        model,
        rank=fields.lora_r,
        alpha=fields.lora_alpha,
        dropout=fields.lora_dropout,
        targets=fields.lora_target_modules,
        embeddings=fields.embeddings,
        new_ids=list(range(first, len(tokenizer))) if first is not None else [],
        use_rslora=fields.use_rslora,
        use_dora=fields.use_dora,
    )
    return lean(add_lora(model, config))


def adopt(fields: Fields) -> None:
    """Let the settings of `init_adapter` hold, as far as they are an adapter's."""
    if not fields.init_adapter:
        return
    config = load("init_adapter", Path(fields.init_adapter)).config
    for name, key in (
        ("lora_r", "r"),
        ("lora_alpha", "lora_alpha"),
        ("lora_dropout", "lora_dropout"),
        ("lora_target_modules", "target_modules"),
        ("use_rslora", "use_rslora"),
        ("use_dora", "use_dora"),
    ):
        setattr(fields, name, config.get(key, getattr(fields, name)))
    rows = "new-rows" if config.get("trainable_token_indices") else "frozen"
    fields.embeddings = "full" if config.get("modules_to_save") else rows
    say(
        f"init_adapter: its own settings hold: r {fields.lora_r}, alpha {fields.lora_alpha}, dropout {fields.lora_dropout}, "
        f"embeddings {fields.embeddings}."
    )


def training_device() -> str:
    """Where a quantised base is put when it is loaded: this process's GPU, else the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def check_length(place: Path, length: int) -> None:
    """Raise DoesNotFit for a block that is longer than the model's limit."""
    limit = Weights(place).config().get("max_position_embeddings")
    if limit and length > limit:
        raise DoesNotFit(f"A block of {length} tokens is longer than the model's limit of {limit}.")


def _merged(place: Path, adapters: list[Adapter], arguments: Any) -> Path:
    """`place` with `adapters` baked in, as a directory: a quantised weight takes no delta. One that was made of
    others is made again."""
    target, steps = Path(arguments.output_dir) / "base", [Step([adapter]) for adapter in adapters]
    with arguments.main_process_first(desc="merging"):
        try:
            merge(place, steps, target, Options(verify=False, resume=None), keep=True)
        except OutputExists:
            merge(place, steps, target, Options(verify=False, resume=None, force=True))
    return target
