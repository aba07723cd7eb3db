"""Tokenizers as they are read: which reader is taken, and what it knows of its pieces."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.errors import BadFile
from chinese_llama.vocab.audit import PROBES
from chinese_llama.vocab.proto import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, encoder, read_model
from chinese_llama.vocab.readers import Reader, open_readers
from tests import tiny

TEXT = st.text(st.sampled_from("中国北京。”the 20\n\t😀é１<s>"), max_size=30)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_byte_level(tmp_path_factory.mktemp("bytes"), tiny.byte_level())


def trained(path: Path, **options: object) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.ENGLISH),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 200, **options},
    )
    path.write_bytes(model.getvalue())
    return path


def test_both_files_of_a_directory_are_read(tokenizer: Path) -> None:
    model, fast = open_readers(tokenizer)
    assert fast is not None
    assert model.pieces == fast.pieces == [p.piece for p in read_model(tokenizer / "tokenizer.model").pieces]
    assert model.encode(list(PROBES)) == fast.encode(list(PROBES))
    assert model.encode is not fast.encode
    assert model.encode(["", "a"])[0] == fast.encode(["", "a"])[0] == []


def test_a_model_file_brings_the_json_file_beside_it(tokenizer: Path, tmp_path: Path) -> None:
    beside = open_readers(tokenizer / "tokenizer.model")
    assert beside[1] is not None
    shutil.copy(tokenizer / "tokenizer.model", tmp_path / "bare.model")
    model, fast = open_readers(tmp_path / "bare.model")
    assert fast is None
    assert model.encode(list(PROBES)) == beside[0].encode(list(PROBES))


def test_a_json_file_is_read_alone(tokenizer: Path, byte_level: Path) -> None:
    for place in (byte_level, byte_level / "tokenizer.json"):
        reader, other = open_readers(place)
        assert other is None
        assert reader.encode(["中"]) == [tiny.byte_level().encode("中", add_special_tokens=False).ids]
    reader, other = open_readers(tokenizer / "tokenizer.json")
    assert other is None
    assert reader.encode(list(PROBES)) == open_readers(tokenizer)[0].encode(list(PROBES))


def test_what_an_id_of_sentencepiece_stands_for(tokenizer: Path) -> None:
    reader, _ = open_readers(tokenizer)
    model = read_model(tokenizer / "tokenizer.model")
    for index, piece in enumerate(model.pieces):
        text = piece.piece.replace(SPACE, " ")
        lengths = {NORMAL: len(text.encode()), BYTE: 1, CONTROL: 0, UNKNOWN: 0}
        assert reader.lengths[index] == lengths[piece.type]
        assert (index in reader.normal) == (piece.type == NORMAL)
        if piece.type == NORMAL:
            assert reader.texts([index]) == [text]
    assert reader.prefix == 1


def test_plain_puts_nothing_before_a_text(tokenizer: Path) -> None:
    reader, _ = open_readers(tokenizer)
    [ids] = reader.plain(["北京"])
    assert [reader.pieces[index] for index in ids] == ["北京"]
    assert reader.encode(["北京"]) != [ids]
    assert reader.plain([" 北京"]) == reader.encode(["北京"])


def test_a_model_without_a_dummy_prefix_has_none(tmp_path: Path) -> None:
    options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 420}
    reader, _ = open_readers(trained(tmp_path / "a.model", add_dummy_prefix=False, **options))
    assert reader.prefix == 0
    assert reader.plain(["the sea"]) == reader.encode(["the sea"])


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_the_lengths_of_a_text_are_its_bytes(tokenizer: Path, byte_level: Path, text: str) -> None:
    """Both kinds, a literal control token among them: it is text."""
    for place in (tokenizer, byte_level):
        reader, _ = open_readers(place)
        [ids] = reader.encode([text])
        assert reader.lengths[ids].sum() == len(text.encode()) + (reader.prefix if text else 0)


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_byte_level_decodes_to_the_text(byte_level: Path, text: str) -> None:
    reader, _ = open_readers(byte_level)
    assert reader.decode(reader.encode([text])) == [text]


def test_what_an_id_of_byte_level_stands_for(byte_level: Path) -> None:
    reader, _ = open_readers(byte_level)
    controls = [reader.pieces.index(token) for token in tiny.CONTROLS]
    assert controls == list(range(len(reader.pieces) - 3, len(reader.pieces)))
    assert not reader.lengths[controls].any()
    assert not set(controls) & set(reader.normal)
    ids = {piece: index for index, piece in enumerate(reader.pieces)}
    for piece, text in (("a", "a"), ("Ġthe", " the"), ("ä¸Ń", "中")):
        assert reader.texts([ids[piece]]) == [text]
        assert reader.lengths[ids[piece]] == len(text.encode())
    assert ids["ä"] not in reader.normal, "a byte of a character has no text of its own"
    assert reader.lengths[ids["ä"]] == 1
    assert reader.prefix == 0


@pytest.mark.parametrize("token", tiny.CONTROLS)
def test_a_literal_control_token_is_text_to_byte_level(byte_level: Path, token: str) -> None:
    reader, _ = open_readers(byte_level)
    [ids] = reader.encode([f"a {token}中"])
    assert reader.pieces.index(token) not in ids
    assert reader.decode([ids]) == [f"a {token}中"]


def test_ids_that_no_piece_has_are_empty(byte_level: Path, tmp_path: Path) -> None:
    content = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = []
    ids = content["model"]["vocab"]
    last = max(ids, key=lambda piece: ids[piece])
    ids[last] += 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    reader, _ = open_readers(tmp_path)
    assert reader.pieces[ids[last] - 5 : ids[last]] == [""] * 5
    assert reader.pieces[ids[last]] == last
    assert not set(range(ids[last] - 5, ids[last])) & set(reader.normal)


@pytest.mark.parametrize("left_out", ["normalizer", "pre_tokenizer", "post_processor", "added_tokens"])
def test_a_json_file_may_leave_out_what_the_library_does_not_need(
    byte_level: Path, tmp_path: Path, left_out: str
) -> None:
    content = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    del content[left_out]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    reader, _ = open_readers(tmp_path)
    assert reader.pieces.index("a") == open_readers(byte_level)[0].pieces.index("a")


@pytest.fixture(params=["unigram", "bpe"])
def any_model(request: pytest.FixtureRequest, tmp_path: Path) -> Reader:
    return open_readers(trained(tmp_path / "any.model", model_type=request.param))[0]


def test_models_of_other_kinds_are_read_too(any_model: Reader) -> None:
    assert any_model.decode(any_model.encode(["the sea"])) == ["the sea"]


def test_an_unknown_character_has_no_length(tmp_path: Path) -> None:
    path = trained(tmp_path / "a.model", model_type="bpe")
    reader, _ = open_readers(path)
    [ids] = reader.plain(["中"])
    assert ids == [encoder(read_model(path)).unk_id()]
    assert reader.lengths[ids].sum() == 0


def test_what_cannot_be_read_is_named(tmp_path: Path, work: Path) -> None:
    with pytest.raises(BadFile, match=r"has neither tokenizer\.model nor tokenizer\.json"):
        open_readers(tmp_path)
    with pytest.raises(BadFile, match="gone: no such file"):
        open_readers(tmp_path / "gone")
    with pytest.raises(BadFile, match=r"zh\.jsonl: is not a SentencePiece model"):
        open_readers(work / "zh.jsonl")
    for content in ("", "{", '{"version": "1.0"}', '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(BadFile, match=r"tokenizer\.json: is not a tokenizer"):
            open_readers(tmp_path)
    (tmp_path / "tokenizer.model").write_text("中国的首都", encoding="utf-8")
    with pytest.raises(BadFile, match=r"tokenizer\.model: is not a SentencePiece model"):
        open_readers(tmp_path)
