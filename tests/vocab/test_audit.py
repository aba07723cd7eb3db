"""The audit finds what is wrong with a tokenizer, and counts a corpus right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.errors import BadFile, UserError
from chinese_llama.vocab import merge
from chinese_llama.vocab.audit import (
    BATCH,
    EXAMPLES,
    PROBES,
    audit_vocab,
    check_contract,
    dead_pieces,
    fast_ids,
    fast_reader,
)
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.proto import NORMAL, encoder, read_base, read_model
from tests import tiny


def written(directory: Path, model: model_pb2.ModelProto) -> Path:
    directory.mkdir()
    write_tokenizer(directory, model, None)
    return directory


def grown(base: Path, pieces: dict[str, float]) -> model_pb2.ModelProto:
    """The base with pieces and scores appended as they are, sensible or not."""
    model = read_base(base)
    for piece, score in pieces.items():
        model.pieces.add(piece=piece, score=score, type=NORMAL)
    return model


def test_the_extended_tokenizer_keeps_its_contract(base: Path, tokenizer: Path) -> None:
    checks = check_contract(read_base(base), read_model(tokenizer / "tokenizer.model"), tokenizer)
    assert checks == {"dead": [], "disagreements": 0, "changed": 0, "longer": 0, "broken": []}


def test_a_dead_piece_is_found(base: Path, tmp_path: Path) -> None:
    model = grown(base, {"中": -900.0, "国": -901.0, "人": -902.0, "中国人": -903.0})
    size = len(read_base(base).pieces)
    assert dead_pieces(model, size) == ["中国人"]
    checks = check_contract(read_base(base), model, written(tmp_path / "out", model))
    assert checks["dead"] == ["中国人"]
    assert "the piece '中国人' cannot be produced." in checks["broken"]


def test_the_base_has_no_dead_piece_that_the_audit_counts_as_new(base: Path) -> None:
    model = read_base(base)
    assert dead_pieces(model, len(model.pieces)) == []


def test_text_without_chinese_that_changes_is_found(base: Path, tmp_path: Path) -> None:
    model = grown(base, {"20": 0.0})
    directory = written(tmp_path / "out", model)
    checks = check_contract(read_base(base), model, directory, ["the", "in 2023"])
    assert checks["changed"] == 1
    assert checks["broken"] == ["text without Chinese is tokenised differently than by the base: 'in 2023'."]


def test_a_renamed_old_id_is_found(base: Path, tmp_path: Path) -> None:
    model = read_base(base)
    model.pieces[300].piece = "中国"
    directory = written(tmp_path / "out", model)
    was = read_base(base).pieces[300].piece
    checks = check_contract(read_base(base), model, directory, [])
    assert checks["broken"] == [f"id 300 was {was!r} and is '中国'."]


def test_text_that_gets_longer_is_found(base: Path, tmp_path: Path) -> None:
    """A piece that is preferred over the base's own merges breaks these up."""
    model = grown(base, {"az": 5.0})
    fox = tiny.ENGLISH[0]
    assert len(encoder(model).encode(fox)) > len(encoder(read_base(base)).encode(fox))
    checks = check_contract(read_base(base), model, written(tmp_path / "out", model), [fox, "the"])
    assert checks["longer"] == 1
    assert f"more tokens than under the base for: {fox!r}." in checks["broken"]


def test_readers_that_disagree_are_found(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    shutil.copytree(tokenizer, directory)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) != "北京"]
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    checks = check_contract(read_base(base), read_model(directory / "tokenizer.model"), directory, ["在北京"])
    assert checks["disagreements"] == 1
    assert "SentencePiece and tokenizer.json give different ids for: '在北京'." in checks["broken"]
    told = audit_vocab(directory, [tiny.write_texts(tmp_path / "zh.jsonl", ["在北京", "你好"])])
    assert told["files"][str(tmp_path / "zh.jsonl")]["disagreements"] == 1
    assert told["examples"] == {"disagreements": ["在北京"]}


def test_a_strict_tokenizer_that_breaks_its_contract_is_not_written(
    base: Path, chinese_sp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"中": -900.0, "国": -901.0, "人": -902.0, "中国人": -903.0}
    monkeypatch.setattr(merge, "add_pieces", lambda *_: grown(base, bad))
    with pytest.raises(UserError, match=r"breaks its contract: the piece '中国人' cannot be produced\."):
        merge.extend_vocab(base, chinese_sp, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_figures_of_a_corpus(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    texts = tiny.CHINESE[:5] * (BATCH // 5 + 5) + ["the 2023 <s>"]
    path = tiny.write_texts(tmp_path / "mixed.jsonl", texts)
    told = audit_vocab(tokenizer, [path], base)
    figures = told["files"][str(path)]
    new, old = encoder(read_model(tokenizer / "tokenizer.model")), encoder(read_base(base))
    characters, tokens = sum(map(len, texts)), sum(map(len, new.encode(texts)))
    assert figures["documents"] == len(texts)
    assert figures["characters"] == characters
    assert figures["bytes"] == sum(len(text.encode()) for text in texts)
    assert figures["tokens"] == tokens
    assert figures["base_tokens"] == sum(map(len, old.encode(texts)))
    assert figures["characters_per_token"] == pytest.approx(characters / tokens)
    assert figures["base_characters_per_token"] == pytest.approx(characters / figures["base_tokens"])
    assert figures["characters_per_token"] > 2 * figures["base_characters_per_token"]
    assert (figures["changed"], figures["longer"], figures["disagreements"]) == (0, 0, 0)
    assert (told["vocab_size"], told["base_vocab_size"]) == (new.get_piece_size(), old.get_piece_size())
    assert (told["dead"], told["examples"]) == ([], {})


def test_unused_pieces_are_those_that_no_document_holds(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    path = tiny.write_texts(tmp_path / "one.jsonl", ["北京"])
    told = audit_vocab(tokenizer, [path], base)
    model = read_model(tokenizer / "tokenizer.model")
    new = [piece.piece for piece in model.pieces[told["base_vocab_size"] :]]
    used = encoder(model).encode("北京", out_type=str)
    assert told["unused"] == [piece for piece in new if piece not in used]
    assert len(told["unused"]) < len(new)


def test_without_a_base_there_are_no_comparisons(tokenizer: Path, work: Path) -> None:
    told = audit_vocab(tokenizer, [work / "zh.jsonl", work / "en.jsonl"])
    assert told["base_vocab_size"] is None
    assert list(told["files"]) == [str(work / "zh.jsonl"), str(work / "en.jsonl")]
    assert not any(
        "base" in key or key in ("changed", "longer") for key in told["files"][str(work / "zh.jsonl")]
    )


def test_examples_are_few_and_short(base: Path, tmp_path: Path) -> None:
    directory = written(tmp_path / "out", grown(base, {"20": 0.0}))
    path = tiny.write_texts(tmp_path / "en.jsonl", [f"{number} in 2023 " + "a" * 400 for number in range(20)])
    told = audit_vocab(directory, [path], base)
    assert told["files"][str(path)]["changed"] == 20
    assert [len(text) for text in told["examples"]["changed"]] == [200] * EXAMPLES


def test_fast_reader_says_what_it_lacks(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(BadFile, match=r"has no tokenizer\.json"):
        fast_reader(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    with pytest.raises(BadFile, match=r"tokenizer\.json: is not a tokenizer"):
        fast_reader(tmp_path)
    assert fast_ids(fast_reader(tokenizer), ["", "<s>"])[0] == []


def test_a_corpus_that_cannot_be_read_is_named(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"gone\.jsonl: no such file"):
        audit_vocab(tokenizer, [tmp_path / "gone.jsonl"])
    with pytest.raises(BadFile, match=r"has no tokenizer\.model"):
        audit_vocab(tmp_path, [tmp_path / "gone.jsonl"])


def test_the_probes_hold_what_is_hard() -> None:
    text = "\n".join(PROBES)
    assert "" in PROBES
    assert all(part in text for part in ("<s>", "[PAD]", "▁", "\t", "   ", "２３", "\U0001f600", "𠮷"))


def test_the_reference_changes_english_and_the_audit_says_so(data: Path, tmp_path: Path) -> None:
    folder = data / "tokenizers"
    report = merge.extend_vocab(folder / "llama", folder / "chinese_sp.model", tmp_path / "out", "reference")
    assert report["checks"]["changed"] > 0
    assert report["checks"]["disagreements"] > 0
