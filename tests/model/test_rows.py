"""Split lookup, logits and cross-entropy are the plain ones of the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chinese_llama.data.templates import IGNORE
from chinese_llama.model.rows import LOGITS, Head, spans, split_cross_entropy, split_logits, split_lookup

HIDDEN = 6


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[int, list[int] | None]:
    """A size, and the ids that train: none, all, the last ones, or any, in any order."""
    size = draw(st.integers(2, 12))
    some = st.lists(st.integers(0, size - 1), unique=True, max_size=size)
    last = st.integers(0, size).map(lambda first: list(range(first, size)))
    return size, draw(st.one_of(some, last, st.none()))


def whole(size: int, ids: list[int] | None, seed: int = 0) -> tuple[Any, Any, Any, list[int]]:
    """(frozen, rows, the matrix that they stand for, ids), float64."""
    torch.manual_seed(seed)
    chosen = list(range(size)) if ids is None else ids
    frozen = torch.randn(size, HIDDEN, dtype=torch.float64)
    rows = torch.randn(len(chosen), HIDDEN, dtype=torch.float64, requires_grad=True)
    matrix = frozen.index_copy(0, torch.tensor(chosen, dtype=torch.long), rows)
    return None if ids is None else frozen, rows if chosen else None, matrix, chosen


@given(vocabularies())
def test_spans_cover_the_vocabulary_once_in_order(vocabulary: tuple[int, list[int] | None]) -> None:
    size, ids = vocabulary
    found = list(spans(size, range(size) if ids is None else ids))
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(size))
    trained = {s.row + i - s.start: i for s in found if s.row is not None for i in range(s.start, s.stop)}
    assert trained == dict(enumerate(range(size) if ids is None else ids))


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=vocabularies(),
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    ignored=st.floats(0, 1),
    items=st.sampled_from([None, 7, torch.tensor(7)]),
    counted=st.booleans(),
    at_once=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_the_loss_and_its_gradients_are_those_of_the_whole_matrix(
    vocabulary: tuple[int, list[int] | None],
    batch: int,
    length: int,
    ignored: float,
    items: Any,
    counted: bool,
    at_once: int,
    seed: int,
) -> None:
    """In float64, to the last digits: shifted labels, ignored ones, sums and means, any chunk."""
    frozen, rows, matrix, _ = whole(*vocabulary, seed)
    hidden = torch.randn(batch, length, HIDDEN, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocabulary[0], (batch, length))
    labels[torch.rand(batch, length) < ignored] = IGNORE
    learnt = int((labels[:, 1:] != IGNORE).sum())
    targets = functional.pad(labels, (0, 1), value=IGNORE)[:, 1:].flatten()
    logits = hidden.flatten(0, 1) @ matrix.t()
    plain = functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    plain = plain / (learnt if items is None else items)
    wanted = [hidden, *([rows] if rows is not None else [])]
    expected = torch.autograd.grad(plain, wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOGITS, "cpu", at_once)
        head = Head(*vocabulary)
        found = split_cross_entropy(hidden, labels, head, frozen, rows, items, learnt if counted else None)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-13, equal_nan=True)
    if learnt or items is not None:  # a mean of nothing is no number, and nobody goes on from there
        for mine, theirs in zip(torch.autograd.grad(found, wanted), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(vocabulary=vocabularies(), seed=st.integers(0, 99))
def test_lookup_and_logits_are_those_of_the_whole_matrix(
    vocabulary: tuple[int, list[int] | None], seed: int
) -> None:
    frozen, rows, matrix, _ = whole(*vocabulary, seed)
    head = Head(*vocabulary)
    hidden = torch.randn(2, 3, HIDDEN, dtype=torch.float64, requires_grad=True)
    found, plain = split_logits(hidden, head, frozen, rows), hidden @ matrix.t()
    torch.testing.assert_close(found, plain)
    if frozen is None or rows is None:
        return
    input_ids = torch.randint(0, vocabulary[0], (2, 5))
    weight = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    embedded, expected = split_lookup(input_ids, head, frozen, rows), functional.embedding(input_ids, matrix)
    assert torch.equal(embedded, expected)
    for mine, theirs in ((embedded, expected), (found, plain)):
        scale = weight if mine is embedded else torch.ones_like(mine)
        ((g,), (e,)) = (
            torch.autograd.grad((v * scale).sum(), [rows], retain_graph=True) for v in (mine, theirs)
        )
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_loss_stays_float32_and_gradients_near(dtype: torch.dtype) -> None:
    """Rows and their gradient are float32; a scale as GradScaler's comes after, so that nothing is lost below."""
    torch.manual_seed(0)
    size, new, tokens = 500, 120, 64
    frozen = torch.randn(size, 32) * 0.1
    rows = frozen[-new:].clone().requires_grad_()
    hidden = torch.randn(1, tokens, 32, requires_grad=True)
    labels = torch.randint(0, size, (1, tokens))
    head = Head(size, range(size - new, size))
    exact = split_cross_entropy(hidden, labels, head, frozen, rows, 1_000_000)
    expected = torch.autograd.grad(exact, [hidden, rows])
    halved = hidden.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = split_cross_entropy(halved, labels, head, frozen.to(dtype), rows, 1_000_000)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)
    found = torch.autograd.grad(loss * 65536.0, [halved, rows])
    assert [gradient.dtype for gradient in found] == [dtype, torch.float32]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.float() / 65536 - theirs).norm() < 0.02 * theirs.norm()


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had which an operation made; views are not made."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_neither_all_logits_nor_a_copy_of_the_matrix_is_ever_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS, "cpu", 4000)
    size, new, tokens = 1000, 100, 200
    frozen, rows = torch.randn(size, 32), torch.randn(new, 32, requires_grad=True)
    hidden, labels = torch.randn(1, tokens, 32, requires_grad=True), torch.randint(0, size, (1, tokens))
    head = Head(size, range(size - new, size))
    with Largest() as seen:
        embedded = split_lookup(labels, head, frozen, rows)
        (split_cross_entropy(hidden, labels, head, frozen, rows) + embedded.sum()).backward()
    assert seen.numbers == max(tokens * 32, 4000)


def test_without_gradients_none_are_made() -> None:
    head, frozen, rows = Head(9, [7, 8]), torch.randn(9, 4), torch.randn(2, 4, requires_grad=True)
    hidden, labels = torch.randn(1, 5, 4), torch.randint(0, 9, (1, 5))
    with torch.no_grad():
        assert not split_cross_entropy(hidden, labels, head, frozen, rows).requires_grad
    loss = split_cross_entropy(hidden, labels, head, frozen, rows)
    loss.backward()
    assert hidden.grad is None and rows.grad is not None


def test_the_gradients_are_there_once() -> None:
    """As of any graph that is not kept; with `retain_graph` too, for they are scaled in place."""
    head, rows = Head(9, None), torch.randn(9, 4, requires_grad=True)
    loss = split_cross_entropy(torch.randn(1, 5, 4), torch.randint(0, 9, (1, 5)), head, None, rows)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
