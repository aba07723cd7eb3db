"""Packed attention by bounds gives what SDPA gives by position ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.model import attention
from chinese_llama.model.load import load_model
from chinese_llama.model.lora import add_lora, lora_config
from chinese_llama.train.collate import Collator
from tests import tiny

SIZE = 16
PLAIN = ("input_ids", "labels", "position_ids")


def batch_of(parts: list[list[int]], rows: int, across: bool = False) -> dict[str, Any]:
    """A batch with bounds, of rows with parts of these lengths; ids are random."""
    generator = torch.Generator().manual_seed(1)
    given_rows = [
        {
            "input_ids": torch.randint(3, rows, (sum(lengths),), generator=generator).numpy(),
            "lengths": lengths,
            "documents": list(range(len(lengths))),
            "source": 0,
        }
        for lengths in parts
    ]
    batch = Collator(SIZE, 2, across, bounds=True)(given_rows)
    del batch["documents"]
    return batch


def trained(base: Path) -> Any:
    """A PeftModel with LoRA and new rows, B not zero; the same each time."""
    model = load_model(base, "float32")
    torch.manual_seed(0)
    rows = list(range(model.config.vocab_size - 5, model.config.vocab_size))
    lora = add_lora(model, lora_config(model, 4, 8, 0.0, ["q_proj", "v_proj", "down_proj"], "new-rows", rows))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return lora.train()


def step(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The loss and the gradients of a step."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 8
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_sdpa(groups: int, across: bool, checkpointing: bool, tmp_path: Path) -> None:
    base = tiny.write_llama(tmp_path / "base", 99, num_key_value_heads=groups)
    batch = batch_of([[7, 5, 4], [1, 1, 9], [16], [3]], 99, across)
    plain = {name: batch[name] for name in PLAIN}
    ours, theirs = trained(base), trained(base)
    attention.put_on(ours)
    if checkpointing:
        for model in (ours, theirs):
            model.get_base_model().gradient_checkpointing_enable()
            model.enable_input_require_grads()
    wanted = step(theirs, plain)
    assert_same(step(ours, batch), wanted)
    if not across:  # without bounds the rows would be one part each
        assert abs(step(ours, plain)["loss"] - wanted["loss"]) > 1e-3


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), groups=st.sampled_from([1, 2, 4]))
def test_parts_are_those_of_a_mask(sizes: list[int], groups: int) -> None:
    torch.manual_seed(len(sizes))
    tokens = sum(sizes)
    query, key, value = (torch.randn(tokens, heads, 8) for heads in (4, groups, groups))
    part = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mask = (part[:, None] == part) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    keys, values = (item.repeat_interleave(4 // groups, dim=1) for item in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) / 8**0.5
    wanted = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values)
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    torch.testing.assert_close(attention.by_parts(query, key, value, bounds), wanted, atol=1e-5, rtol=1e-5)


def test_measuring_is_as_with_sdpa(extended: Path) -> None:
    """Filler on the right, and neither mask nor bounds."""
    ours, theirs = load_model(extended, "float32"), load_model(extended, "float32")
    attention.put_on(ours)
    ids = torch.randint(3, 400, (3, 20))
    with torch.no_grad():
        found, wanted = (model(input_ids=ids, use_cache=False).logits for model in (ours, theirs))
    torch.testing.assert_close(found, wanted)


def test_under_autocast_all_states_are_of_its_type() -> None:
    """Rotations in float32 make queries and keys so; values stay in bfloat16."""
    query, key = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16)
    value = torch.randn(2, 2, 8, 16).bfloat16()
    bounds = torch.tensor([0, 3, 8, 16], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention.packed_attention(None, query, key, value, None, 0.0, None, bounds, 8)
    q, k, v = (item.float().transpose(1, 2).flatten(0, 1) for item in (query, key, value))
    wanted = attention.by_parts(q, k, v, bounds.tolist()).view(2, 8, 4, 16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", "bfloat16"), ("cuda", "float32"), ("cpu", "float32"), ("mps", "float16")]
)
def test_only_half_precision_on_cuda_is_packed(device: str, dtype: str, extended: Path) -> None:
    model = load_model(extended, "float32")
    assert not attention.use_packed(model, torch.device(device), dtype)
    assert model.config._attn_implementation == "sdpa"


def test_other_models_and_dropout_keep_sdpa(tmp_path: Path) -> None:
    model = load_model(tiny.write_llama(tmp_path / "base", 99, attention_dropout=0.1), "float32")
    assert not attention.use_packed(model, torch.device("cuda"), "bfloat16")
    model.config.attention_dropout, model.config.model_type = 0.0, "mistral"
    assert not attention.use_packed(model, torch.device("cuda"), "bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel may run")
def test_a_kernel_that_does_not_run_is_told_and_not_used(
    extended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(extended, "float32")
    assert not attention.use_packed(model, torch.device("cuda"), "bfloat16")
    assert model.config._attn_implementation == "sdpa"
    told = capsys.readouterr().err
    assert told.count("Attention of packed rows goes through a mask, which is slower: ") == 1


def test_a_kernel_that_is_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")

    def kernel(query: Any, key: Any, value: Any, bounds: Any, longest: int, scale: float | None) -> Any:
        return attention.by_parts(query, key, value, [0, *bounds.tolist()[skipped:]], scale)

    monkeypatch.setattr(attention, "_by_kernel", kernel)
    skipped = 1
    assert attention.probe(cpu, torch.bfloat16, 4, 2, 8) == ""
    skipped = 2  # the first token is not kept apart
    assert "% off here" in attention.probe(cpu, torch.bfloat16, 4, 2, 8)
