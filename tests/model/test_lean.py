"""A lean model is the PeftModel that it was, in losses, gradients, logits and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from chinese_llama.data.templates import IGNORE
from chinese_llama.model.lean import lean
from chinese_llama.model.lora import add_lora, lora_config
from chinese_llama.model.rows import LOGITS

OLD, ROWS = 40, 64  # the last rows are padding, and frozen
NEW = list(range(OLD, 60))
SHAPE: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]


def adapted(model: Any, embeddings: str = "new-rows", **more: Any) -> Any:
    """A PeftModel of which nothing is zero any more."""
    given = {"rank": 4, "alpha": 12, "dropout": 0.0, "targets": TARGETS, "new_ids": NEW, **more}
    lora = add_lora(model, lora_config(model, embeddings=embeddings, **given))
    torch.manual_seed(1)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return lora


def pair(embeddings: str = "new-rows", tied: bool = False, dtype: Any = torch.float32, **more: Any) -> Any:
    """(as PEFT has it, lean), of the same weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).to(dtype)
    lora = adapted(model, embeddings, **more).train()
    return lora, lean(copy.deepcopy(lora))


def batch() -> dict[str, Any]:
    torch.manual_seed(2)
    ids = torch.randint(0, ROWS, (3, 12))
    labels = ids.clone()
    labels[0, :7] = IGNORE
    positions = torch.arange(12).repeat(3, 1)
    positions[1] %= 5
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def learn(model: Any, **more: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of `batch`, and the gradient of all that trains."""
    model.zero_grad()
    loss = model(**batch(), **more).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_same(one: Any, other: Any, **near: float) -> None:
    torch.testing.assert_close(one[0], other[0], **near)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], **near, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", ["new-rows", "full", "frozen"])
def test_it_learns_as_before(embeddings: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS, "cpu", 5 * ROWS)
    usual, ours = pair(embeddings, tied)
    items = {"num_items_in_batch": torch.tensor(50)}
    check_same(learn(ours), learn(usual))
    check_same(learn(ours, **items), learn(usual, **items))
    learnt = int((batch()["labels"][:, 1:] != IGNORE).sum())
    check_same(learn(ours, **items, learnt=learnt), learn(usual, **items))
    ours.get_base_model().gradient_checkpointing_enable()
    check_same(learn(ours), learn(usual))


def test_a_training_pass_gives_no_logits_and_evaluation_does() -> None:
    usual, ours = pair()
    assert ours(**batch()).logits is None
    assert ours(input_ids=batch()["input_ids"]).logits.shape == (3, 12, ROWS)
    assert len(ours(**batch(), output_hidden_states=True).hidden_states) == SHAPE["num_hidden_layers"] + 1
    assert len(ours(**batch(), return_dict=False)) >= 2
    evaluated = ours.eval()(**batch(), learnt=5)
    torch.testing.assert_close(evaluated.logits, usual.eval()(**batch()).logits)
    torch.testing.assert_close(evaluated.loss, usual(**batch()).loss)


@pytest.mark.parametrize("embeddings", ["new-rows", "full", "frozen"])
def test_off_and_merged_it_is_what_peft_makes_of_it(embeddings: str) -> None:
    usual, ours = (model.eval() for model in pair(embeddings))
    ids = batch()["input_ids"]
    with usual.disable_adapter(), ours.disable_adapter():
        assert torch.equal(usual(input_ids=ids).logits, ours(input_ids=ids).logits)
        losses = [model.train()(**batch()).loss for model in (usual, ours)]
        torch.testing.assert_close(losses[1], losses[0])
        for model in (usual, ours):
            model.eval()
    kept = ours(input_ids=ids).logits
    ours.merge_adapter()
    torch.testing.assert_close(ours(input_ids=ids).logits, kept)


@pytest.mark.parametrize("embeddings", ["new-rows", "full"])
def test_what_is_saved_is_the_same_and_peft_loads_it(embeddings: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    usual, ours = pair(embeddings)
    for name, model in (("usual", usual), ("ours", ours)):
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    saved, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "usual"))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[n], expected[n]) for n in saved)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**SHAPE)), str(tmp_path / "ours")).eval()
    ids = batch()["input_ids"]
    torch.testing.assert_close(loaded(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("embeddings", ["new-rows", "full"])
def test_under_autocast_it_is_as_near_to_float32_as_peft(embeddings: str) -> None:
    exact = learn(pair(embeddings, dtype=torch.float32)[0])
    found = []
    for model in pair(embeddings, dtype=torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(learn(model))
    far = [
        sum(float((g.float() - exact[1][n]).square().sum()) for n, g in gradients.items()) ** 0.5
        for _, gradients in found
    ]
    # PEFT's full matrices make all hidden states float32, which no merged model's will be
    assert far[1] < (1.1 if embeddings == "new-rows" else 1.5) * far[0]
    assert float(found[1][0]) == pytest.approx(float(exact[0]), rel=0.01)
    assert all(gradient.dtype == torch.float32 for gradient in found[1][1].values())


@pytest.mark.parametrize("embeddings", ["new-rows", "full"])
def test_under_autocast_only_what_norms_are_given_is_kept_in_float32(embeddings: str) -> None:
    """PEFT keeps what it casts for LoRA, and full matrices make all hidden states float32."""
    _, ours = pair(embeddings, dtype=torch.bfloat16, dropout=0.5)
    own = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        ours(**batch())
    wide = [t for t in kept if t.dtype == torch.float32 and t.untyped_storage().data_ptr() not in own]
    norms = 2 * SHAPE["num_hidden_layers"] + 1
    hidden = [t for t in wide if t.ndim == 3 and t.shape[-1] == SHAPE["hidden_size"]]
    assert 0 < len(hidden) <= 2 * norms  # the values, and those by which they are divided
    assert not [t for t in wide if t.shape[-1] == SHAPE["intermediate_size"]]


def test_dora_and_odd_calls_stay_pefts() -> None:
    usual, ours = pair(use_dora=True)
    check_same(learn(ours), learn(usual))
    usual, ours = pair(dtype=torch.bfloat16)  # without autocast: PEFT casts
    torch.testing.assert_close(
        ours(input_ids=batch()["input_ids"]).logits, usual(input_ids=batch()["input_ids"]).logits
    )


def test_other_models_and_heads_with_more_to_them_are_left_alone() -> None:
    """Gemma scales its embeddings; LoRA on the head is no row."""
    torch.manual_seed(0)
    gemma = adapted(GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=8)))
    usual, ours = copy.deepcopy(gemma).train(), lean(gemma).train()
    check_same(learn(ours), learn(usual))
    assert ours(**batch()).logits is not None
    usual, ours = pair("frozen", targets=["q_proj", "lm_head"])
    check_same(learn(ours), learn(usual))
    assert ours(**batch()).logits is not None


def test_a_model_with_biases_is_lean_too() -> None:
    torch.manual_seed(0)
    lora = adapted(Qwen2ForCausalLM(Qwen2Config(**SHAPE))).train()
    ours = lean(copy.deepcopy(lora))
    check_same(learn(ours), learn(lora))
    assert ours(**batch()).logits is None


def test_it_generates() -> None:
    usual, ours = (model.eval() for model in pair())
    ids = batch()["input_ids"][:1]
    said = [m.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for m in (usual, ours)]
    assert torch.equal(*said) and said[0].shape[1] > ids.shape[1]


def test_originals_take_no_memory() -> None:
    _, ours = pair()
    kept = [b for name, b in ours.named_buffers() if "trainable_tokens_original" in name]
    assert kept and sum(buffer.numel() for buffer in kept) == 0
