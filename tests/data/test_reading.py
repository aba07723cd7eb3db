"""Reading in batches goes on from anywhere, and a text is on one side only."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data import reading
from chinese_llama.data.reading import Batch, Position, ahead, batches, held_out

FILES = st.lists(st.lists(st.text("ab", min_size=1, max_size=6), max_size=8), max_size=4)


START = Position()


def all_batches(content: list[list[str]], start: Position = START, share: float = 0.0) -> list[Batch]:
    def read(file: Path, left_out: Counter[str]) -> Iterator[str]:
        left_out["seen"] += 1
        yield from content[int(file.name)]

    return list(batches([Path(str(n)) for n in range(len(content))], read, len, share, start))


@settings(max_examples=100, deadline=None)
@given(content=FILES, size=st.integers(1, 12))
def test_batches_hold_everything_in_order_and_begin_anywhere(content: list[list[str]], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BATCH", size)
        whole = all_batches(content)
        assert [text for batch in whole for text in batch.items] == [t for texts in content for t in texts]
        assert [n for batch in whole for n in batch.ordinals] == list(range(sum(map(len, content))))
        assert sum(batch.left_out["seen"] for batch in whole) == len(content)
        assert all(sum(map(len, batch.items)) >= size for batch in whole[:-1])
        for number, batch in enumerate(whole):
            assert all_batches(content, batch.end)[:-1] == whole[number + 1 : -1]
    assert whole[-1].end == Position(len(content), 0, sum(map(len, content)))


@settings(max_examples=100, deadline=None)
@given(text=st.text(), share=st.floats(0, 0.5))
def test_a_text_is_always_on_the_same_side(text: str, share: float) -> None:
    assert held_out(text, share) == held_out(f" {text}\r\n", share)
    assert held_out(text, share) <= held_out(text, 0.5)
    assert not held_out(text, 0.0)


def test_about_the_share_is_held_out_and_ordinals_count_all() -> None:
    texts = [f"document {number}" for number in range(4000)]
    (batch,) = all_batches([texts], share=0.25)
    assert len(batch.held_out) == pytest.approx(1000, abs=100)
    assert sorted([*batch.items, *batch.held_out]) == sorted(texts)
    assert all(texts[ordinal] == text for ordinal, text in zip(batch.ordinals, batch.items, strict=True))
    assert batch.end.documents == 4000


def test_the_next_items_are_worked_on_in_the_meantime() -> None:
    """The second item is done while the first one is still looked at."""
    done = {number: threading.Event() for number in range(6)}

    def work(number: int) -> int:
        done[number].set()
        return number * 2

    for number, made in ahead(range(6), work):
        assert made == number * 2
        if number < 5:
            assert done[number + 1].wait(10)


def test_an_error_in_the_thread_is_raised_where_its_item_is_due() -> None:
    stream = ahead([1, 0], lambda number: 1 / number)
    assert next(stream) == (1, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(stream)
