"""LoRA and trainable vocabulary rows on a model, as PEFT saves and loads them."""

from __future__ import annotations

from typing import Any

from chinese_llama.errors import DoesNotFit, UserError


def lora_config(
    model: Any,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    embeddings: str,
    new_ids: list[int],
) -> Any:
    """A peft.LoraConfig. `embeddings`: "new-rows" trains the rows `new_ids` of both matrices,
    "full" all rows, "frozen" none. Tied matrices stay tied."""
    from peft import LoraConfig

    tied = bool(model.config.tie_word_embeddings)
    matrices = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    extra: dict[str, Any] = {}
    if embeddings == "new-rows":
        if not new_ids:
            raise UserError(
                "embeddings: new-rows, but no manifest says which rows are new; use a base made by "
                "chinese-llama extend-model, or embeddings: full or frozen."
            )
        extra["trainable_token_indices"] = dict.fromkeys(matrices, new_ids)
    elif embeddings == "full":
        extra["modules_to_save"] = matrices
    if extra and tied:
        extra["ensure_weight_tying"] = True
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        **extra,
    )


def add_lora(model: Any, config: Any) -> Any:
    """A PeftModel of `model`; trainable parameters are float32. Raises DoesNotFit for targets that
    the model does not have."""
    import torch
    from peft import get_peft_model

    names = [name for name, _ in model.named_modules()]
    for target in sorted(targets if isinstance(targets := config.target_modules, (list, set)) else ()):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)})
            raise DoesNotFit(f"lora_target_modules: the model has no {target!r}; it has {', '.join(known)}.")
    try:
        lora = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA: {str(error).strip().splitlines()[0]}") from error
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return lora


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)
