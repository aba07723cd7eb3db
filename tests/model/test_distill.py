"""--init distill: new input rows that give the states that the old segmentation gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.model import distill as distilling
from chinese_llama.model.distill import Student, distill, snippets
from chinese_llama.model.load import load_model, load_tokenizer
from chinese_llama.model.resize import decompose, extend_model
from chinese_llama.model.shards import EMBED, HEAD, Weights
from chinese_llama.vocab.proto import read_model
from chinese_llama.vocab.readers import sp_reader
from tests import tiny


@pytest.fixture
def setting(base: Path, tokenizer: Path, extended: Path) -> tuple[torch.Tensor, list[list[int]], int]:
    """Rows to start from, the parts of the new pieces, the first new id."""
    model = read_model(tokenizer / "tokenizer.model")
    old = len(read_model(base / "tokenizer.model").pieces)
    parts = decompose(tokenizer, sp_reader(model), old, len(model.pieces))
    return Weights(extended).load(EMBED)[old:], parts, old


def test_distilled_rows_come_nearer_to_the_old_segmentation(
    base: Path, tokenizer: Path, extended: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilling, "TIMES", 60)  # a pico corpus repeats itself
    monkeypatch.setattr(distilling, "BATCH", 4)
    manifest = extend_model(base, tokenizer, tmp_path / "out", init="distill", corpus=[work / "zh.jsonl"])
    before, after = manifest.metrics["error"]
    assert after < 0.8 * before
    assert manifest.metrics["pieces"] > 10
    assert manifest.inputs["corpus:0"]["path"] == str(work / "zh.jsonl")
    assert read_manifest(tmp_path / "out") == manifest
    start, made = Weights(extended), Weights(tmp_path / "out")
    old = manifest.metrics["base_vocab_size"]
    for name in start:
        a, b = start.load(name), made.load(name)
        assert torch.equal(a[:old] if name == EMBED else a, b[:old] if name == EMBED else b), name
    moved = (start.load(EMBED)[old:] != made.load(EMBED)[old:]).any(1)
    assert manifest.metrics["pieces"] == int(moved.sum()) < len(moved)  # pieces that do not occur stay


def test_a_tied_base_is_distilled_too(tokenizer: Path, work: Path, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", tiny.base_tokenizer(), tied=True)
    manifest = extend_model(
        base, tokenizer, tmp_path / "out", init="distill", corpus=[work / "zh.jsonl"], pad_to_multiple_of=64
    )
    rows = Weights(tmp_path / "out").load(EMBED)
    assert HEAD not in Weights(tmp_path / "out")
    assert len(rows) == manifest.metrics["rows"]
    assert torch.isfinite(rows).all()


def test_the_same_corpus_gives_the_same_rows(
    base: Path, tokenizer: Path, work: Path, setting: tuple[torch.Tensor, list[list[int]], int]
) -> None:
    rows, parts, old = setting
    torch.manual_seed(1)
    first = distill(base, tokenizer, [work / "zh.jsonl"], rows, parts, old)
    torch.manual_seed(2)
    second = distill(base, tokenizer, [work / "zh.jsonl"], rows, parts, old)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert first[0].shape == rows.shape


def test_no_more_snippets_are_learnt_from_than_the_limit(
    base: Path,
    tokenizer: Path,
    work: Path,
    setting: tuple[torch.Tensor, list[list[int]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distilling, "MOST", 10)
    rows, parts, old = setting
    assert distill(base, tokenizer, [work / "zh.jsonl"], rows, parts, old)[1]["snippets"] == 9


def test_snippets_stop_when_every_piece_was_seen_often_enough(
    tokenizer: Path,
    work: Path,
    setting: tuple[torch.Tensor, list[list[int]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, parts, old = setting
    reader = load_tokenizer(tokenizer)
    found = list(snippets(reader, [work / "zh.jsonl"], parts, old))
    counts = torch.bincount(torch.tensor([index for ids in found for index in set(ids)]))
    assert all(ids[0] == reader.bos_token_id and max(ids) >= old for ids in found)
    assert all(len(ids) <= distilling.SNIPPET + 1 for ids in found)
    rarest = [min(int(counts[index]) for index in ids if index >= old) for ids in found]
    assert max(rarest) <= distilling.TIMES  # none was taken for pieces that were seen often enough
    monkeypatch.setattr(distilling, "CHARACTERS", 30)
    assert len(list(snippets(reader, [work / "zh.jsonl"], parts, old))) < len(found)


def test_the_target_is_read_after_the_last_part(
    base: Path, tokenizer: Path, setting: tuple[torch.Tensor, list[list[int]], int]
) -> None:
    """A snippet of old ids alone has the same states in both segmentations; new ids have those of the end
    of their parts, in a batch of another length too."""
    rows, parts, old = setting
    model = load_model(base)
    student = Student(model, rows, parts, old)
    new = next(index for index, ids in enumerate(parts) if len(ids) == 3)
    batch = [[1, 5, old + new, 7], [1, 6, 7, 8, 9, 10, 11]]
    target = student._target(batch)
    with torch.no_grad():
        states = model.base_model(input_ids=torch.tensor([[1, 5, *parts[new], 7]])).last_hidden_state[0]
        plain = model.base_model(input_ids=torch.tensor([batch[1]])).last_hidden_state[0]
    torch.testing.assert_close(target[0, :4], states[[0, 1, 4, 5]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target[1], plain, rtol=1e-4, atol=1e-4)


def test_a_corpus_without_new_pieces_is_refused(
    base: Path, tokenizer: Path, work: Path, tmp_path: Path
) -> None:
    with pytest.raises(DoesNotFit, match="--corpus: hardly a new piece occurs in these texts"):
        extend_model(base, tokenizer, tmp_path / "out", init="distill", corpus=[work / "en.jsonl"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BadFile, match="holds no text"):
        extend_model(base, tokenizer, tmp_path / "out", init="distill", corpus=[tmp_path / "empty.txt"])
