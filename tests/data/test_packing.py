"""Packing loses nothing, and cuts only documents."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.packing import OPEN, Blocks, Parts, fill, join, pack_documents, pack_samples, parts
from chinese_llama.data.templates import IGNORE

SIZES = st.integers(2, 16)
DOCUMENTS = st.lists(st.lists(st.integers(3, 99), max_size=40), max_size=12)
LABELLED = st.lists(
    st.lists(st.tuples(st.integers(3, 99), st.booleans()), min_size=1, max_size=16), max_size=60
).map(lambda samples: [list(zip(*sample, strict=True)) for sample in samples])


def rows(blocks: Blocks) -> list[list[tuple[int, list[int]]]]:
    """(ordinal, ids) of each part of each block."""
    counts, lengths = blocks.counts.tolist(), iter(blocks.parts.lengths.tolist())
    documents, ids = iter(blocks.parts.documents.tolist()), iter(blocks.parts.ids.tolist())
    made = [
        [(next(documents), [next(ids) for _ in range(next(lengths))]) for _ in range(count)]
        for count in counts
    ]
    assert not [*lengths, *documents, *ids], "rows cover all of it"
    assert [sum(len(part) for _, part in row) for row in made] == blocks.tokens.tolist()
    return made


@settings(max_examples=200, deadline=None)
@given(documents=DOCUMENTS, size=SIZES)
def test_documents_are_cut_at_borders_and_nothing_is_lost(documents: list[list[int]], size: int) -> None:
    blocks, rest = pack_documents(parts(documents, range(len(documents))), size, last=True)
    assert not len(rest.ids) and not len(rest.lengths) and not len(rest.documents)
    made = rows(blocks)
    found: list[list[int]] = [[] for _ in documents]
    for ordinal, ids in (part for row in made for part in row):
        assert ids, "no part is empty"
        found[ordinal] += ids
    assert found == documents
    assert [ordinal for row in made for ordinal, _ in row] == sorted(o for row in made for o, _ in row)
    assert all(len({ordinal for ordinal, _ in row}) == len(row) for row in made), "cut at borders only"
    assert [*blocks.tokens[:-1]] == [size] * (len(made) - 1), "only the last block is not full"
    assert sum(blocks.tokens) == sum(map(len, documents))


@settings(max_examples=200, deadline=None)
@given(documents=DOCUMENTS, size=SIZES, cut=st.integers(0, 12))
def test_packing_in_two_goes_gives_the_same_blocks(documents: list[list[int]], size: int, cut: int) -> None:
    stream = [parts([ids], [number]) for number, ids in enumerate(documents)]
    nothing = parts([], [])
    first, rest = pack_documents(join([nothing, *stream[:cut]]), size, last=False)
    assert len(rest.ids) < size and set(first.tokens.tolist()) <= {size}
    second, _ = pack_documents(join([rest, *stream[cut:]]), size, last=True)
    whole, _ = pack_documents(join([nothing, *stream]), size, last=True)
    assert rows(first) + rows(second) == rows(whole)


@settings(max_examples=200, deadline=None)
@given(documents=DOCUMENTS, size=SIZES)
def test_every_token_but_the_first_of_a_part_is_learnt(documents: list[list[int]], size: int) -> None:
    blocks, _ = pack_documents(parts(documents, range(len(documents))), size, last=True)
    cuts = sum(len(row) for row in rows(blocks))
    assert blocks.parts.learnt_targets() == sum(map(len, documents)) - cuts


@settings(max_examples=200, deadline=None)
@given(samples=LABELLED, size=st.just(16))
def test_each_sample_is_whole_in_one_block_with_its_labels(samples: list[Any], size: int) -> None:
    ids = [list(sample[0]) for sample in samples]
    labels = [
        [i if on else IGNORE for i, on in zip(one, sample[1], strict=True)]
        for one, sample in zip(ids, samples, strict=True)
    ]
    blocks = pack_samples(parts(ids, range(len(ids)), labels), size)
    made = rows(blocks)
    assert all(blocks.tokens <= size)
    assert sorted(ordinal for row in made for ordinal, _ in row) == list(range(len(ids)))
    assert all(part == ids[ordinal] for row in made for ordinal, part in row)
    order = [ordinal for row in made for ordinal, _ in row]
    assert blocks.parts.learnt is not None
    assert blocks.parts.learnt.tolist() == [on for ordinal in order for on in samples[ordinal][1]]
    assert blocks.parts.learnt_targets() == sum(sum(sample[1][1:]) for sample in samples)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), max_size=200))
def test_blocks_are_filled_about_in_order(lengths: list[int]) -> None:
    blocks = fill(lengths, 16)
    firsts = [block[0] for block in blocks]
    assert firsts == sorted(firsts)
    for number, block in enumerate(blocks):
        assert block == sorted(block)
        following = firsts[number + OPEN :]
        assert not following or block[-1] < following[0], "a block is closed when OPEN newer ones are there"
    for earlier, later in pairwise(blocks):
        room = 16 - sum(lengths[sample] for sample in earlier if sample < later[0])
        assert lengths[later[0]] > room, "no new block while there is room"


def test_look_ahead_fills_blocks_better() -> None:
    assert fill([9, 9, 7, 7], 16) == [[0, 2], [1, 3]]


def test_a_part_that_fills_the_block_exactly() -> None:
    blocks, rest = pack_documents(parts([[1, 2, 3, 4], [5, 6]], [7, 8]), 4, last=False)
    assert rows(blocks) == [[(7, [1, 2, 3, 4])]]
    assert (rest.ids.tolist(), rest.lengths.tolist(), rest.documents.tolist()) == ([5, 6], [2], [8])


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_nothing_gives_no_block(documents: list[list[int]]) -> None:
    blocks, rest = pack_documents(parts(documents, range(len(documents))), 8, last=True)
    assert rows(blocks) == [] and not len(rest.ids)
    assert rows(pack_samples(parts([], [], []), 8)) == []


def test_types_are_those_on_disk() -> None:
    blocks, rest = pack_documents(parts([[1, 2, 3]], [0]), 2, last=False)
    for made in (blocks.parts, rest, join([rest, rest]), pack_samples(rest, 2).parts):
        assert isinstance(made, Parts)
        assert (made.ids.dtype, made.lengths.dtype, made.documents.dtype) == (np.int32, np.int64, np.int64)
