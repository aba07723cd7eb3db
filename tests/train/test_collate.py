"""Batches of packed rows: the right targets, and no document that sees another."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.mixture import Source
from chinese_llama.data.packing import pack_documents, parts
from chinese_llama.data.prepare import Job, prepare
from chinese_llama.data.templates import IGNORE
from chinese_llama.train.collate import Collator
from tests import tiny

SIZE = 16
PAD = 2
ROWS = st.lists(
    st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.booleans()), min_size=1, max_size=4
)
NAMES = ("input_ids", "labels", "position_ids")


def rows_of(documents: list[list[int]], size: int = SIZE) -> list[dict[str, Any]]:
    """Rows of prepared data, with source 3."""
    blocks, _ = pack_documents(parts(documents, range(len(documents))), size, last=True)
    ids, lengths = iter(blocks.parts.ids.tolist()), iter(blocks.parts.lengths.tolist())
    ordinals = iter(blocks.parts.documents.tolist())
    return [
        {
            "input_ids": [next(ids) for _ in range(tokens)],
            "lengths": [next(lengths) for _ in range(count)],
            "documents": [next(ordinals) for _ in range(count)],
            "source": 3,
        }
        for tokens, count in zip(blocks.tokens.tolist(), blocks.counts.tolist(), strict=True)
    ]


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, marked=st.booleans(), across=st.booleans(), data=st.data())
def test_every_value_of_a_batch(
    rows: list[tuple[list[int], bool]], marked: bool, across: bool, data: st.DataObject
) -> None:
    """Against the definition, token by token."""
    given_rows = []
    for lengths, filled in rows:
        lengths = [*lengths, SIZE - sum(lengths)] if filled and sum(lengths) < SIZE else lengths
        ids = data.draw(st.lists(st.integers(3, 99), min_size=sum(lengths), max_size=sum(lengths)))
        row: dict[str, Any] = {
            "input_ids": ids,
            "lengths": lengths,
            "documents": list(range(len(lengths))),
            "source": 1,
        }
        if marked:
            row["learnt"] = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        given_rows.append(row)
    batch = Collator(SIZE, PAD, across, bounds=True)(given_rows)
    begins = []
    assert {(batch[name].dtype, tuple(batch[name].shape)) for name in NAMES} == {
        (torch.int64, (len(rows), SIZE))
    }
    for number, row in enumerate(given_rows):
        learnt = row.get("learnt", [True] * len(row["input_ids"]))
        ids, labels, positions = [], [], []
        for length in row["lengths"]:
            for place in range(length):
                token = row["input_ids"][len(ids)]
                labels.append(token if place and learnt[len(ids)] else IGNORE)
                ids.append(token)
                positions.append(place)
        rest = SIZE - len(ids)
        assert batch["input_ids"][number].tolist() == ids + [PAD] * rest
        assert batch["labels"][number].tolist() == labels + [IGNORE] * rest
        wanted = list(range(SIZE)) if across else positions + list(range(rest))
        assert batch["position_ids"][number].tolist() == wanted
        begins += [number * SIZE + place for place, position in enumerate(wanted) if position == 0]
    assert batch["documents"] == [(1, row["documents"]) for row in given_rows]
    bounds = [*begins, SIZE * len(rows)]
    longest = max(end - begin for begin, end in pairwise(bounds))
    for side in "qk":
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch[f"cu_seq_lens_{side}"].tolist() == bounds
        assert batch[f"max_length_{side}"] == longest and type(batch[f"max_length_{side}"]) is int


def test_rows_from_disk_through_a_data_loader(tokenizer: Path, tmp_path: Path) -> None:
    """As a plain DataLoader calls it: rows as arrays, in worker processes too."""
    from chinese_llama.model.load import load_tokenizer

    tiny.write_texts(tmp_path / "a.jsonl", tiny.ENGLISH[:7])
    job = Job("pretraining", (Source(tmp_path / "a.jsonl"),), tokenizer, SIZE)
    rows = prepare(job, tmp_path / "prepared", load_tokenizer(tokenizer)).dataset(0)
    loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=Collator(SIZE, PAD), num_workers=1)
    batches = list(loader)
    assert torch.cat([batch["input_ids"] for batch in batches])[:-1].flatten().tolist() == [
        index for row in list(rows)[:-1] for index in row["input_ids"].tolist()
    ]
    assert [entry for batch in batches for entry in batch["documents"]] == [
        (0, row["documents"].tolist()) for row in rows
    ]


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    from chinese_llama.model.load import load_model

    return load_model(base, "float32")


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """[batch, seq, vocab], as the trainer calls the model: positions, no mask, no cache."""
    with torch.no_grad():
        ids, positions = batch["input_ids"], batch["position_ids"]
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def documents_of(lengths: list[int], vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(
    "lengths", [[7, 5, 4, 16, 1, 1, 14, 3, 6, 2], [40, 3, 3, 25, 9], [5], [16, 16], [1, 1, 1], [33]]
)
@pytest.mark.parametrize("at_once", [1, 8])
def test_packed_logits_are_those_of_each_part_alone(model: Any, lengths: list[int], at_once: int) -> None:
    rows = rows_of(documents_of(lengths, model.config.vocab_size))
    for first in range(0, len(rows), at_once):
        chosen = rows[first : first + at_once]
        packed = logits(model, Collator(SIZE, PAD)(chosen))
        for number, row in enumerate(chosen):
            start = 0
            for length in row["lengths"]:
                part = torch.tensor([row["input_ids"][start : start + length]])
                with torch.no_grad():
                    alone = model(input_ids=part, use_cache=False).logits[0]
                found = packed[number, start : start + length]
                torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
                start += length


def test_documents_see_each_other_where_they_are_told_to(model: Any) -> None:
    (row,) = rows_of(documents_of([6, 6], model.config.vocab_size))
    apart, together = (logits(model, Collator(SIZE, PAD, across)([row]))[0] for across in (False, True))
    torch.testing.assert_close(together[:6], apart[:6], atol=1e-5, rtol=1e-5)
    assert (together[6:12] - apart[6:12]).abs().amax(dim=1).min() > 1e-3
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
    torch.testing.assert_close(together[:12], whole, atol=1e-5, rtol=1e-5)


def test_the_packed_loss_is_the_mean_over_all_targets(model: Any) -> None:
    documents = [[1, 40, 50, 60, 2], [1, 70, 80, 2], [1, 90, 2]]
    batch = Collator(SIZE, PAD)(rows_of(documents))
    nats, targets = 0.0, 0
    with torch.no_grad():
        loss = model(**{name: batch[name] for name in NAMES}, use_cache=False).loss
        for ids in documents:
            row = torch.tensor([ids])
            nats += float(model(input_ids=row, labels=row, use_cache=False).loss) * (len(ids) - 1)
            targets += len(ids) - 1
    assert float(loss) == pytest.approx(nats / targets, rel=1e-5)
