"""Reading SentencePiece models, and which of them can be a base."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.errors import BadFile
from chinese_llama.vocab.proto import (
    CONTROL,
    NORMAL,
    SPACE,
    USER_DEFINED,
    add_pieces,
    encoder,
    first_free_score,
    read_base,
    read_chinese,
    read_model,
    tokenizer_model,
)
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


@pytest.mark.parametrize(("role", "end"), [("bos", "beginning"), ("eos", "end")])
def test_a_base_without_bos_or_eos_is_refused(tmp_path: Path, role: str, end: str) -> None:
    """Every text starts with bos and ends with eos: a base that has none cannot be used."""
    path = trained(tmp_path / "other.model", **{f"{role}_id": -1})
    with pytest.raises(BadFile, match=rf"other\.model: has no {role} piece; a base that marks the {end}"):
        read_base(path)


def test_a_base_with_user_defined_pieces_is_refused(tmp_path: Path, base: Path) -> None:
    model = read_model(base / "tokenizer.model")
    model.pieces.add(piece="<|user|>", score=0.0, type=USER_DEFINED)
    with pytest.raises(BadFile, match=r"own\.model: has user-defined or unused pieces \('<\|user\|>'\)"):
        read_base(tiny.write_model(tmp_path / "own.model", model))


@pytest.mark.parametrize("read", [read_chinese, read_base])
def test_empty_pieces_and_pieces_that_are_there_twice_are_refused(
    tmp_path: Path, base: Path, read: Callable[[Path], Any]
) -> None:
    """Whatever reads such a file by its pieces would give wrong ids."""
    for piece, message in (
        ("", r"own\.model: has an empty piece \(id 420\); it is damaged, train it again"),
        ("</s>", r"own\.model: has the piece '</s>' twice \(ids 2 and 420\)"),
    ):
        model = read_model(base / "tokenizer.model")
        model.pieces.add(piece=piece, score=0.0, type=NORMAL)
        with pytest.raises(BadFile, match=message):
            read(tiny.write_model(tmp_path / "own.model", model))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_chinese_model_may_be_of_either_kind_and_hold_pieces_of_all_kinds(
    tmp_path: Path, kind: str
) -> None:
    options = {"model_type": kind, "vocab_size": 200, "byte_fallback": False}
    path = trained(tmp_path / "zh.model", **options, control_symbols=["<c>"], user_defined_symbols=["<u>"])
    model = read_chinese(path)
    assert model == read_model(path)
    assert {CONTROL, USER_DEFINED, NORMAL} <= {piece.type for piece in model.pieces}


@pytest.mark.parametrize("name", ["text.model", "tokenizer.json"])
def test_a_text_file_is_no_chinese_model_and_no_base(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("中国的首都是北京。\n" * 50, encoding="utf-8")
    for read in (read_chinese, read_base):
        with pytest.raises(BadFile, match="is not a SentencePiece model"):
            read(tmp_path / name)


def test_a_llama_like_base_is_read(tmp_path: Path, base: Path) -> None:
    assert read_base(base) == read_model(base / "tokenizer.model")
    assert len(read_base(trained(tmp_path / "own.model")).pieces) > 259


def test_encoder_with_and_without_the_dummy_prefix(base: Path) -> None:
    model = read_base(base)
    before = model.SerializeToString()
    assert encoder(model).encode("the", out_type=str) == [SPACE + "the"]
    assert not encoder(model, dummy_prefix=False).encode("the", out_type=str)[0].startswith(SPACE)
    assert model.SerializeToString() == before, "the model itself must not change"


def test_new_scores_lie_below_the_base_and_stay_distinct() -> None:
    base = tiny.base_tokenizer()
    pieces = [chr(0x4E00 + number) for number in range(20_000)]
    model = add_pieces(base, pieces)
    old, new = model.pieces[: -len(pieces)], model.pieces[-len(pieces) :]
    ranking = [piece.score for piece in old if piece.type == NORMAL]
    assert max(piece.score for piece in new) < min(ranking)
    assert all(a.score > b.score for a, b in pairwise(new))
    assert list(old) == list(base.pieces)
    assert [piece.piece for piece in new] == pieces


def test_whitespace_runs_do_not_push_the_scores_down() -> None:
    """LLaMA's whitespace runs score -1e9, where float32 cannot tell whole numbers apart."""
    model = tiny.base_tokenizer()
    before = first_free_score(model)
    model.pieces.add(piece=SPACE * 9, score=-1e9, type=NORMAL)
    assert first_free_score(model) == before


def test_the_first_free_score_of_llama(data: Path) -> None:
    assert first_free_score(read_base(data / "tokenizers" / "llama")) == -31741.0
