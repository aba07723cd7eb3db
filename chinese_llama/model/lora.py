"""LoRA and trainable vocabulary rows on a model, as PEFT saves and loads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.merging.plan import Adapter

GROUPS = ("lora_A", "lora_B", "lora_magnitude_vector", "embed_tokens", "lm_head")


def lora_config(
    model: Any,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    embeddings: str,
    new_ids: list[int],
    use_rslora: bool = False,
    use_dora: bool = False,
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
        use_rslora=use_rslora,
        use_dora=use_dora,
        **extra,
    )


def add_lora(model: Any, config: Any) -> Any:
    """A PeftModel of `model`; trainable parameters are float32. Raises DoesNotFit for targets that
    the model does not have."""
    from peft import get_peft_model

    names = [name for name, _ in model.named_modules()]
    for target in sorted(targets if isinstance(targets := config.target_modules, (list, set)) else ()):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)})
            raise DoesNotFit(f"lora_target_modules: the model has no {target!r}; it has {', '.join(known)}.")
    try:
        lora = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"LoRA: {str(error).strip().splitlines()[0]}") from error
    return _in_float32(lora)


def continue_lora(model: Any, adapter: Adapter) -> Any:
    """A PeftModel of `model` with the weights of `adapter`, all of which train on; among them adapters in
    the published layout (LoRA and both vocabulary matrices whole). Raises BadFile, DoesNotFit."""
    from peft import PeftModel

    try:
        lora = PeftModel.from_pretrained(model, str(adapter.path), is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        what = str(error).strip().splitlines()[-1].strip()
        raise DoesNotFit(f"{adapter.path} does not fit the base: {what}") from error
    missing = [name for name, p in lora.named_parameters() if "lora_B" in name and not p.any()]
    if missing:
        raise BadFile(adapter.file, f"gives {missing[0]} no weights: it is zero, or missing.")
    return _in_float32(lora)


def _in_float32(lora: Any) -> Any:
    import torch

    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return lora


def group_of(name: str) -> str:
    """The trainable group (one of GROUPS, else "other") that a parameter belongs to, by its name.

    >>> group_of("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    'lora_A'
    """
    return next((group for group in GROUPS if group in name), "other")


def trainable_groups(model: Any) -> dict[str, int]:
    """Numbers that train, by group, in the order of GROUPS."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[group_of(name)] = counts.get(group_of(name), 0) + parameter.numel()
    return {group: counts[group] for group in [*GROUPS, "other"] if group in counts}


def fingerprint(tensors: Iterable[tuple[str, Any]]) -> dict[str, list[float]]:
    """For each (name, tensor) its sum and its sum of squares, in float64: what tells whether it moved."""
    found = {}
    for name, tensor in tensors:
        values = tensor.detach().double()
        found[name] = [float(values.sum()), float((values * values).sum())]
    return found


def unmoved(before: dict[str, list[float]], after: dict[str, list[float]]) -> list[str]:
    """The groups of which not one parameter moved."""
    groups: dict[str, bool] = {}
    for name, values in after.items():
        groups[group_of(name)] = groups.get(group_of(name), False) or before.get(name) != values
    return [group for group in [*GROUPS, "other"] if groups.get(group) is False]


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)
