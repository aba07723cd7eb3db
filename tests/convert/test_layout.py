"""Meta's names and order of rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from chinese_llama.convert.layout import Sizes, by_heads, even, hf_order, slots, to_halves, to_pairs


def test_pairs_become_halves() -> None:
    rows = torch.arange(8)[:, None]  # two heads of four
    assert to_halves(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert to_pairs(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert to_halves(torch.arange(6)[:, None], 6).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert to_pairs(torch.arange(6)[:, None], 6).flatten().tolist() == [0, 3, 1, 4, 2, 5]


@given(heads=st.integers(1, 5), half=st.integers(1, 6))
def test_the_two_orders_are_inverse(heads: int, half: int) -> None:
    rows = torch.arange(heads * half * 2 * 3).reshape(-1, 3)
    assert torch.equal(to_pairs(to_halves(rows, 2 * half), 2 * half), rows)
    assert torch.equal(to_halves(to_pairs(rows, 2 * half), 2 * half), rows)


@given(data=st.data(), heads=st.integers(1, 5), half=st.integers(1, 6))
def test_some_rows_are_those_of_the_whole(data: st.DataObject, heads: int, half: int) -> None:
    rows = torch.arange(heads * half * 2)[:, None]
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    found = by_heads(lambda first, last: rows[first:last], to_halves, 2 * half, start, stop)
    assert torch.equal(found, to_halves(rows, 2 * half)[start:stop])


def test_the_remainder_goes_to_the_last_shard() -> None:
    assert even(49953, 2) == [24976, 24977]
    assert even(421, 4) == [105, 105, 105, 106]
    assert even(64, 1) == [64]


def test_the_models_order_has_the_same_tensors() -> None:
    found = slots(Sizes(dim=32, layers=2, heads=4, kv_heads=2, ffn=96, vocab=421))
    ordered = hf_order(found)
    assert set(ordered) == set(found)
    assert len(found) == 3 + 2 * 9
    assert [slot.meta for slot in (ordered[0], *ordered[-2:])] == [
        "tok_embeddings.weight", "norm.weight", "output.weight",
    ]  # fmt: skip
    shapes = {slot.meta: slot.shape for slot in found}
    assert shapes["layers.1.attention.wk.weight"] == (16, 32)
    assert shapes["layers.1.feed_forward.w2.weight"] == (32, 96)
