"""The audit of tokenizers of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from chinese_llama.vocab import report
from chinese_llama.vocab.audit import (
    audit_vocab,
)
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.readers import open_readers
from tests import tiny

KINDS: dict[str, Callable[[Path], Any]] = {}


def kind(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    KINDS[make.__name__] = make
    return make


def trained(directory: Path, **options: Any) -> None:
    with open(directory / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny.ENGLISH + tiny.CHINESE),
            model_writer=file,
            hard_vocab_limit=False,
            minloglevel=2,
            **{"vocab_size": 420, "byte_fallback": True, **options},
        )


@kind
def llama_like(directory: Path) -> None:
    write_tokenizer(directory, tiny.base_tokenizer(), None)


@kind
def llama_like_tokenizer_json_only(directory: Path) -> None:
    """As Mistral's and many Llama-2 directories are."""
    write_tokenizer(directory, tiny.base_tokenizer(), None)
    (directory / "tokenizer.model").unlink()


@kind
def bpe_that_removes_extra_spaces(directory: Path) -> None:
    trained(directory, model_type="bpe", normalization_rule_name="identity")


@kind
def unigram(directory: Path) -> None:
    trained(
        directory, model_type="unigram", normalization_rule_name="identity", remove_extra_whitespaces=False
    )


@kind
def unigram_with_nmt_nfkc(directory: Path) -> None:
    trained(directory, model_type="unigram", byte_fallback=False)


@kind
def byte_level(directory: Path) -> None:
    tiny.write_byte_level(directory, tiny.byte_level())


@kind
def llama_3_with_a_word_that_no_merges_make(directory: Path) -> None:
    """It looks whole words up first."""
    content = json.loads(tiny.byte_level("llama3").to_str())
    assert content["model"]["ignore_merges"]
    word = max((piece for piece in content["model"]["vocab"] if piece.startswith("Ġ")), key=len)
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) != word]
    tiny.write_byte_level(directory, tokenizers.Tokenizer.from_str(json.dumps(content)))


@kind
def byte_level_with_a_space_before(directory: Path) -> None:
    tokenizer = tiny.byte_level("gpt2")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tiny.write_byte_level(directory, tokenizer)


@kind
def word_pieces(directory: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(tiny.ENGLISH + tiny.CHINESE, trainer)
    tiny.write_byte_level(directory, tokenizer)


@pytest.fixture(scope="module", params=KINDS)
def any_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](directory)
    return directory


def test_a_tokenizer_of_any_kind_is_audited(any_kind: Path, work: Path) -> None:
    files = [work / "zh.jsonl", work / "en.jsonl"]
    told = audit_vocab(any_kind, files)
    reader, _ = open_readers(any_kind)
    assert told["vocab_size"] == len(reader.pieces)
    for file, texts in zip(files, (tiny.CHINESE, tiny.ENGLISH), strict=True):
        figures = told["files"][str(file)]
        assert figures["tokens"] == sum(map(len, reader.encode(texts)))
        assert figures["characters"] == sum(map(len, texts))
        assert figures.get("disagreements", 0) == 0
    assert report.summary(told) and report.markdown(told)


def test_no_piece_that_a_text_uses_is_called_dead_or_unused(any_kind: Path, work: Path) -> None:
    told = audit_vocab(any_kind, [work / "zh.jsonl", work / "en.jsonl"])
    reader, _ = open_readers(any_kind)
    used = {reader.pieces[i] for ids in reader.encode(tiny.ENGLISH + tiny.CHINESE) for i in ids}
    assert not used & set(told["unused"])
    assert not used & set(told["dead"])


def test_tokens_are_counted_by_script(any_kind: Path, work: Path) -> None:
    """Where a tokenizer does not spell texts byte for byte there may be none, but never wrong ones."""
    figures = audit_vocab(any_kind, [work / "en.jsonl"])["files"][str(work / "en.jsonl")]
    scripts = figures["scripts"]
    tokens = sum(counts["tokens"] for counts in scripts.values())
    assert tokens <= figures["tokens"]
    if not any_kind.name.startswith(("word_pieces", "unigram_with_nmt_nfkc", "bpe_that_removes")):
        assert tokens >= figures["tokens"] - len(tiny.ENGLISH)
        assert scripts["Latin letters"]["tokens"] > 5 * scripts["digits"]["tokens"] > 0
