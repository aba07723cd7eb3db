"""A PeftModel that computes the same with less: its parameters, their names and what is saved stay PEFT's.

- Vocabulary rows that train are looked up and multiplied beside the frozen matrix (chinese_llama.model.rows); PEFT puts
  them into a copy of it in every pass.
- In training, a forward pass with labels gives a loss and no logits.
- LoRA takes its input as it is, without a cast to float32 and back, and its product is added inside a matrix product;
  it and the MLPs keep next to nothing for the backward pass (chinese_llama.model.frugal).
- Norms are PyTorch's own: one kernel on a GPU, which keeps its input and no float32 copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from chinese_llama.model.frugal import add_lora_product, gated, remember, swiglu
from chinese_llama.model.rows import Head, split_cross_entropy, split_logits, split_lookup

PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # logits are lm_head of the last hidden states, and no more
Forward = Callable[..., Any]


def lean(lora: Any) -> Any:
    """`lora` (a PeftModel with one adapter), its forward passes replaced where they are known to be equal; the others
    stay PEFT's. It is not to be copied from then on (a copy would compute with the parameters of this one), and an
    adapter that is merged into it stays merged."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    model = lora.get_base_model()
    for module in model.modules():
        if _is_plain_lora(module):
            module.forward = _lora_forward(module, module.forward)
    if model.config.model_type not in PLAIN:
        return lora
    # layers of bitsandbytes' int8 hold on to what they are given, and would to what that was made of
    note = _no_note if getattr(model, "is_loaded_in_8bit", False) else remember
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = _norm_forward(module, module.forward, note)
        if model.config.hidden_act == "silu" and hasattr(module, "gate_proj"):
            module.forward = _mlp_forward(module, module.forward, note)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, TrainableTokensWrapper):
        _let_go_of_originals(embedding.token_adapter)
        embedding.forward = _lookup_forward(_Rows(embedding), embedding.forward)
    elif isinstance(embedding, ModulesToSaveWrapper):
        embedding.forward = _in_dtype(embedding.forward, embedding.original_module.weight.dtype)
    if isinstance(head, TrainableTokensWrapper):
        _let_go_of_originals(head.token_adapter)
    elif not (isinstance(head, ModulesToSaveWrapper) or type(head) is torch.nn.Linear):
        return lora  # LoRA on the head, say
    if getattr(getattr(head, "original_module", head), "bias", None) is None:
        rows = _Rows(head)
        head.forward = _head_forward(rows, head.forward)
        model.forward = _loss_forward(model, rows, model.forward)
        model.counts_learnt = True
    return lora


class _Rows:
    """The vocabulary matrix behind a module: what of it is frozen, and what trains."""

    def __init__(self, module: Any) -> None:
        self.module, self.tokens = module, getattr(module, "token_adapter", None)
        size = getattr(module, "original_module", module).weight.shape[0]
        self.head = Head(size, self._ids())

    def _ids(self) -> list[int] | None:
        if self.tokens is not None:
            return list(self.tokens.token_indices[self.tokens.active_adapters[0]])
        return None if hasattr(self.module, "modules_to_save") else []

    def usual(self) -> bool:
        """False where the adapter is off, or merged into the matrix: then PEFT knows what to do."""
        off = getattr(self.module, "disable_adapters", False)
        return not off and not (self.tokens is not None and self.tokens.merged)

    def tensors(self) -> tuple[Any, Any]:
        """(frozen, rows), either of which may be None; asked anew each time: FSDP2 replaces parameters."""
        if self.tokens is not None:
            name = self.tokens.active_adapters[0]
            return self.tokens.base_layer.weight, self.tokens.trainable_tokens_delta[name]
        if hasattr(self.module, "modules_to_save"):
            return None, self.module.modules_to_save[self.module.active_adapters[0]].weight
        return self.module.weight, None


def _lookup_forward(rows: _Rows, plain: Forward) -> Forward:
    @functools.wraps(plain)
    def forward(input_ids: Any, *rest: Any, **named: Any) -> Any:
        if not rows.usual():
            return plain(input_ids, *rest, **named)
        return split_lookup(input_ids, rows.head, *rows.tensors())

    return forward


def _in_dtype(plain: Forward, dtype: torch.dtype) -> Forward:
    @functools.wraps(plain)
    def forward(*given: Any, **named: Any) -> Any:
        return plain(*given, **named).to(dtype)  # else a matrix in float32 makes all hidden states so

    return forward


def _head_forward(rows: _Rows, plain: Forward) -> Forward:
    """Logits, or with `labels` the loss. It is the head's own: hooks that gather its weights come first."""

    @functools.wraps(plain)
    def forward(hidden: Any, *rest: Any, labels: Any = None, **named: Any) -> Any:
        if labels is not None:
            loss = split_cross_entropy
            if torch.compiler.is_compiling():
                loss = torch.compiler.disable(loss)  # a loop
            return loss(hidden, labels, rows.head, *rows.tensors(), **named)
        if rows.tokens is None or not rows.usual():
            return plain(hidden, *rest, **named)
        return split_logits(hidden, rows.head, *rows.tensors())

    return forward


def _loss_forward(model: Any, rows: _Rows, plain: Forward) -> Forward:
    @functools.wraps(plain)
    def forward(*given: Any, labels: Any = None, **named: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        more = named.get("output_hidden_states") or named.get("return_dict") is False
        if labels is None or more or not model.training or not rows.usual():
            named.pop("learnt", None)
            return plain(*given, labels=labels, **named)
        items, learnt = named.pop("num_items_in_batch", None), named.pop("learnt", None)
        named = {name: value for name, value in named.items() if value is not None}
        hidden = model.model(*given, **named).last_hidden_state
        return CausalLMOutputWithPast(loss=model.lm_head(hidden, labels=labels, items=items, learnt=learnt))

    return forward


def _is_plain_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    named = type(module).__name__ in ("Linear", "Linear4bit", "Linear8bitLt")
    if not (isinstance(module, LoraLayer) and named):
        return False
    return not any(module.lora_variant) and not any(getattr(module, "lora_bias", {}).values())


def _lora_forward(layer: Any, plain: Forward) -> Forward:
    @functools.wraps(plain)
    def forward(x: Any, *rest: Any, **named: Any) -> Any:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        odd = rest or named or layer.disable_adapters or layer.merged or len(names) != 1
        if odd or torch.compiler.is_compiling():  # which fuses what PEFT writes
            return plain(x, *rest, **named)
        (name,) = names
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if not torch.is_autocast_enabled(x.device.type) and x.dtype != a.dtype:
            return plain(x)
        dropout = layer.lora_dropout[name]
        share = dropout.p if layer.training and isinstance(dropout, torch.nn.Dropout) else 0.0
        return add_lora_product(layer.base_layer(x), x, a, b, layer.scaling[name], share)

    return forward


def _no_note(tensor: Any, *_: Any) -> Any:
    return tensor


def _mlp_forward(mlp: Any, plain: Forward, note: Forward) -> Forward:
    def forward(x: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        return mlp.down_proj(note(gated(gate, up), swiglu, gate, up))

    return forward


def _norm_forward(norm: Any, plain: Forward, note: Forward) -> Forward:
    def normed(hidden: Any) -> Any:
        return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

    def forward(hidden: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain(hidden)
        with torch.autocast(hidden.device.type, enabled=False):  # which would make it float32
            return note(normed(hidden), normed, hidden)

    return forward


def _let_go_of_originals(tokens: Any) -> None:
    """What rows were before training, which PEFT keeps in float32 to take a merge back."""
    for name, rows in tokens.trainable_tokens_original.items():
        tokens.trainable_tokens_original[name] = rows.new_empty(0)
