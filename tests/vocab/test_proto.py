"""Reading SentencePiece models, and which of them can be a base."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.errors import BadFile
from chinese_llama.vocab.proto import SPACE, encoder, read_base, read_model, tokenizer_model
from tests import tiny


def trained(path: Path, **options: Any) -> Path:
    """A SentencePiece model on the English sentences, LLaMA-like unless `options` say otherwise."""
    model = io.BytesIO()
    llama = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.ENGLISH),
        model_writer=model,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **{**llama, **options},
    )
    path.write_bytes(model.getvalue())
    return path


def test_reads_what_was_written(base: Path) -> None:
    model = read_model(base / "tokenizer.model")
    assert [piece.piece for piece in model.pieces][:3] == ["<unk>", "<s>", "</s>"]
    assert model.SerializeToString() == (base / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    "content", [b"", b"not a model\n", b'{"model": 1}', bytes(1000), "汉字".encode() * 99]
)
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=r"tokenizer\.model: is not a SentencePiece model"):
        read_model(path)


def test_a_truncated_model_is_refused(tmp_path: Path, base: Path) -> None:
    whole = (base / "tokenizer.model").read_bytes()
    path = tmp_path / "cut.model"
    for share in (0.01, 0.3, 0.5, 0.8):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BadFile, match=r"cut\.model: is not a SentencePiece model"):
            read_model(path)


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_short_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """None end in an error of another kind."""
    path = tmp_path_factory.getbasetemp() / "any.model"
    path.write_bytes(content)
    with pytest.raises(BadFile, match="is not a SentencePiece model"):
        read_model(path)


def test_a_missing_file_and_a_directory_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"gone\.model: cannot be read \(No such file"):
        read_model(tmp_path / "gone.model")
    with pytest.raises(BadFile, match=r"cannot be read \(Is a directory\)"):
        read_model(tmp_path)


def test_tokenizer_model_is_found_in_a_directory_or_given_itself(base: Path, tmp_path: Path) -> None:
    assert tokenizer_model(base) == base / "tokenizer.model"
    assert tokenizer_model(base / "tokenizer.model") == base / "tokenizer.model"
    with pytest.raises(BadFile, match=r"has no tokenizer\.model; a SentencePiece-BPE tokenizer"):
        tokenizer_model(tmp_path)
    with pytest.raises(BadFile, match="nowhere: no such file"):
        tokenizer_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "is not a BPE model"),
        ({"treat_whitespace_as_suffix": True}, "does not write spaces as LLaMA's does"),
        ({"byte_fallback": False, "vocab_size": 200}, "has no byte pieces"),
    ],
)
def test_bases_that_cannot_be_extended_say_why(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = trained(tmp_path / "other.model", **options)
    with pytest.raises(BadFile, match=rf"other\.model: {message}"):
        read_base(path)


def test_a_base_without_bos_is_refused(tmp_path: Path) -> None:
    """Every text starts with bos: a base that has none cannot be used."""
    path = trained(tmp_path / "other.model", bos_id=-1)
    with pytest.raises(BadFile, match=r"other\.model: .*bos"):
        read_base(path)


def test_a_llama_like_base_is_read(tmp_path: Path, base: Path) -> None:
    assert read_base(base) == read_model(base / "tokenizer.model")
    assert len(read_base(trained(tmp_path / "own.model")).pieces) > 259


def test_encoder_with_and_without_the_dummy_prefix(base: Path) -> None:
    model = read_base(base)
    before = model.SerializeToString()
    assert encoder(model).encode("the", out_type=str) == [SPACE + "the"]
    assert not encoder(model, dummy_prefix=False).encode("the", out_type=str)[0].startswith(SPACE)
    assert model.SerializeToString() == before, "the model itself must not change"
