"""Bases whose SentencePiece models treat spaces or characters in other ways than LLaMA's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.errors import BadFile
from chinese_llama.vocab.audit import PROBES
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.merge import extend_vocab
from chinese_llama.vocab.proto import encoder, read_model
from chinese_llama.vocab.readers import open_readers
from tests import tiny
from tests.vocab.strategies import CLASSES

KINDS: dict[str, dict[str, Any]] = {
    "extra spaces removed": {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
    "no dummy prefix": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
}


def trained(kind: str) -> model_pb2.ModelProto:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.ENGLISH),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        minloglevel=2,
        **KINDS[kind],
    )
    proto = model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


@pytest.fixture(scope="module", params=sorted(set(KINDS) - {"nmt_nfkc"}))
def extended(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, chinese_sp: Path
) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "base").mkdir()
    write_tokenizer(folder / "base", trained(request.param), None)
    report = extend_vocab(folder / "base", chinese_sp, folder / "tokenizer")
    assert report["new_pieces"] > 50 and not report["checks"]["broken"]
    return folder / "tokenizer"


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from(" \t\n中国的首都ab12，！。<s>é\u3000"), max_size=30), min_size=1)
)
def test_both_readers_agree(extended: Path, texts: list[str]) -> None:
    texts += PROBES
    _, fast = open_readers(extended)
    assert fast is not None
    assert fast.encode(texts) == encoder(read_model(extended / "tokenizer.model")).encode(texts)


def test_both_readers_agree_on_every_class_of_text(extended: Path) -> None:
    model, fast = open_readers(extended)
    assert fast is not None
    for text in CLASSES.values():
        assert fast.encode([text]) == model.encode([text])


def test_decoding_gives_what_sentencepiece_gives(extended: Path) -> None:
    processor, (_, fast) = encoder(read_model(extended / "tokenizer.model")), open_readers(extended)
    assert fast is not None
    for text in [*PROBES, *CLASSES.values()]:
        ids = processor.encode(text)
        assert fast.decode([ids]) == [processor.decode(ids)]


def test_decoding_gives_what_the_base_gives(extended: Path) -> None:
    new, old = open_readers(extended)[0], open_readers(extended.parent / "base")[0]
    for text in [*PROBES, *CLASSES.values()]:
        assert new.decode(new.encode([text])) == old.decode(old.encode([text]))


def test_a_base_that_normalises_is_refused(chinese_sp: Path, tmp_path: Path) -> None:
    """The tokenizers library does it otherwise (half-width kana with a sound mark), and a character that is
    not Chinese may become one (U+2329)."""
    (tmp_path / "base").mkdir()
    write_tokenizer(tmp_path / "base", trained("nmt_nfkc"), None)
    with pytest.raises(BadFile, match=r"normalises its text \(nmt_nfkc\)"):
        extend_vocab(tmp_path / "base", chinese_sp, tmp_path / "out")
