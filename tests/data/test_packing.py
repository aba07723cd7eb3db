"""Packing loses nothing, and no document sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.packing import pack_documents, pack_samples
from chinese_llama.data.templates import IGNORE, Sample

FILLER = 2
SIZES = st.integers(1, 16)
DOCUMENTS = st.lists(st.lists(st.integers(3, 99), max_size=40), max_size=12)
SAMPLES = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 6)).map(
        lambda n: Sample([1] * n[0] + [7] * n[1], [IGNORE] * n[0] + [7] * n[1])
    ),
    max_size=12,
)


def segments(block: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each part of a block: positions count from 0 in each."""
    starts = [index for index, position in enumerate(block["position_ids"]) if position == 0]
    ends = [*starts[1:], len(block["input_ids"])]
    for start, end in zip(starts, ends, strict=True):
        assert block["position_ids"][start:end] == list(range(end - start))
    return [(block["input_ids"][a:b], block["labels"][a:b]) for a, b in zip(starts, ends, strict=True)]


@settings(max_examples=100, deadline=None)
@given(documents=DOCUMENTS, size=SIZES)
def test_no_token_of_a_document_is_lost(documents: list[list[int]], size: int) -> None:
    blocks = list(pack_documents(documents, size, FILLER))
    flat = [index for block in blocks for index in block["input_ids"]]
    wanted = [index for ids in documents for index in ids]
    assert flat[: len(wanted)] == wanted
    assert len(blocks) == -(-len(wanted) // size), "no block more than needed"
    assert set(flat[len(wanted) :]) <= {FILLER}
    assert all(len(column) == size for block in blocks for column in block.values())


@settings(max_examples=100, deadline=None)
@given(documents=DOCUMENTS, size=SIZES)
def test_parts_start_at_position_0_and_their_first_token_is_no_target(
    documents: list[list[int]], size: int
) -> None:
    parts = [part for block in pack_documents(documents, size, FILLER) for part in segments(block)]
    for ids, labels in parts:
        filled = set(ids) == {FILLER}
        assert labels == ([IGNORE] * len(ids) if filled else [IGNORE, *ids[1:]])
    found = [ids for ids, _ in parts if set(ids) != {FILLER}]
    expected: list[list[int]] = []
    at = 0
    for document in documents:
        while document:
            cut = size - at % size
            expected.append(document[:cut])
            at += len(document[:cut])
            document = document[cut:]
    assert found == expected


@settings(max_examples=100, deadline=None)
@given(samples=SAMPLES, size=SIZES)
def test_samples_stay_whole_and_keep_their_labels(samples: list[Sample], size: int) -> None:
    fitting = [sample for sample in samples if len(sample.input_ids) <= size]
    blocks = list(pack_samples(samples, size, FILLER))
    parts = [part for block in blocks for part in segments(block) if set(part[0]) != {FILLER}]
    assert [ids for ids, _ in parts] == [sample.input_ids for sample in fitting]
    assert [labels for _, labels in parts] == [[IGNORE, *sample.labels[1:]] for sample in fitting]
    assert all(len(column) == size for block in blocks for column in block.values())


def test_the_rest_of_a_block_is_filler_that_is_not_learnt() -> None:
    (block,) = pack_documents([[5, 6, 7]], 6, FILLER)
    assert block == {
        "input_ids": [5, 6, 7, FILLER, FILLER, FILLER],
        "labels": [IGNORE, 6, 7, IGNORE, IGNORE, IGNORE],
        "position_ids": [0, 1, 2, 0, 1, 2],
    }


def test_nothing_gives_no_block() -> None:
    assert list(pack_documents([], 8, FILLER)) == []
    assert list(pack_documents([[], []], 8, FILLER)) == []
    assert list(pack_samples([Sample([1] * 9, [1] * 9)], 8, FILLER)) == []


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    from chinese_llama.model.load import load_model

    return load_model(base, "float32")


LENGTHS = [[7, 5, 4], [16], [1, 1, 14], [3, 6, 2], [13]]  # blocks of 16, in the order of packing


def test_packed_logits_are_those_of_each_document_alone(model: Any) -> None:
    """Several blocks in a batch, as the trainer gives them: without a mask and without a cache."""
    import torch

    generator = torch.Generator().manual_seed(0)
    documents = [
        torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()
        for row in LENGTHS
        for length in row
    ]
    blocks = list(pack_samples([Sample(ids, ids) for ids in documents], 16, FILLER))
    assert len(blocks) == len(LENGTHS)
    batch = {name: torch.tensor([block[name] for block in blocks]) for name in blocks[0]}
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        left = iter(documents)
        for row, lengths in enumerate(LENGTHS):
            start = 0
            for length in lengths:
                alone = model(input_ids=torch.tensor([next(left)]), use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start : start + length], alone, atol=1e-5, rtol=1e-5)
                start += length


def test_the_packed_loss_is_the_mean_over_all_targets(model: Any) -> None:
    import torch

    documents = [[1, 40, 50, 60, 2], [1, 70, 80, 2], [1, 90, 2]]
    (block,) = pack_documents(documents, 16, FILLER)
    batch = {name: torch.tensor([values]) for name, values in block.items()}
    nats, targets = 0.0, 0
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
        for ids in documents:
            row = torch.tensor([ids])
            nats += float(model(input_ids=row, labels=row, use_cache=False).loss) * (len(ids) - 1)
            targets += len(ids) - 1
    assert float(loss) == pytest.approx(nats / targets, rel=1e-5)


def test_samples_that_are_too_long_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [Sample([1] * length, [1] * length) for length in (3, 9, 4)]
    blocks = list(pack_samples(samples, 8, filler=0))
    assert [block["input_ids"].count(1) for block in blocks] == [7]
    assert "Left out 1 of 3 samples: longer than 8 tokens" in capsys.readouterr().err
