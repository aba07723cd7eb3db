"""SentencePiece, the tokenizers library and AutoTokenizer: one tokenizer, the same ids."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.data.formats import documents
from chinese_llama.data.templates import text_ids
from chinese_llama.errors import BadFile
from chinese_llama.vocab.audit import PROBES
from chinese_llama.vocab.fast import merges, tokenizer_config, tokenizer_json
from chinese_llama.vocab.merge import extend_vocab
from chinese_llama.vocab.proto import SPACE, encoder, read_base, read_model
from chinese_llama.vocab.readers import load_json
from chinese_llama.vocab.scripts import CHINESE
from tests import tiny
from tests.vocab.strategies import CLASSES, SPECIAL, TEXTS


class Readers(NamedTuple):
    """One tokenizer directory in all that read it, and the base it was made from."""

    directory: Path
    base: sentencepiece.SentencePieceProcessor
    spm: sentencepiece.SentencePieceProcessor
    fast: tokenizers.Tokenizer
    auto: Any


def readers(base: Path, chinese: Path, directory: Path) -> Readers:
    from transformers import AutoTokenizer

    extend_vocab(base, chinese, directory, pad_token="[PAD]")
    spm = encoder(read_model(directory / "tokenizer.model"))
    auto = AutoTokenizer.from_pretrained(str(directory))
    return Readers(directory, encoder(read_base(base)), spm, load_json(directory / "tokenizer.json"), auto)


@pytest.fixture(scope="module")
def pico(base: Path, chinese_sp: Path, tmp_path_factory: pytest.TempPathFactory) -> Readers:
    return readers(base, chinese_sp, tmp_path_factory.mktemp("pico") / "tokenizer")


@pytest.fixture(scope="module")
def llama(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Readers:
    """The real LLaMA tokenizer with the real Chinese pieces."""
    folder = data / "tokenizers"
    directory = tmp_path_factory.mktemp("llama") / "tokenizer"
    return readers(folder / "llama", folder / "chinese_sp.model", directory)


def check(all_of: Readers, text: str) -> None:
    """The contract of an extended tokenizer on one text."""
    ids, before = all_of.spm.encode(text), all_of.base.encode(text)
    assert all_of.fast.encode(text, add_special_tokens=False).ids == ids
    assert all_of.auto(text, add_special_tokens=False)["input_ids"] == ids
    assert text_ids(all_of.auto, text) == ids
    assert all_of.auto.decode(ids) == all_of.spm.decode(ids)
    assert all_of.spm.decode(ids) == all_of.base.decode(before) == text.replace(SPACE, " ")
    assert len(ids) <= len(before)
    if not CHINESE.search(text):
        assert ids == before


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text=SPACE)
def test_readers_agree_on_any_text(pico: Readers, text: str) -> None:
    check(pico, text)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text=" " * 40)
def test_readers_agree_on_any_text_with_the_real_tokenizer(llama: Readers, text: str) -> None:
    check(llama, text)


@pytest.mark.parametrize("kind", CLASSES)
def test_readers_agree_on_every_class_of_text(pico: Readers, kind: str) -> None:
    check(pico, CLASSES[kind])


@pytest.mark.parametrize("kind", CLASSES)
def test_readers_agree_on_every_class_of_text_with_the_real_tokenizer(llama: Readers, kind: str) -> None:
    check(llama, CLASSES[kind])


@pytest.mark.parametrize("character", ["的", "。", "a", " ", "\n", "😀", "龘", "1", "—", "\u0301", SPACE])
def test_readers_agree_on_ten_thousand_of_one_character(pico: Readers, character: str) -> None:
    check(pico, character * 10_000)
    check(pico, "中" + character * 10_000 + "国")


@pytest.mark.parametrize("text", PROBES)
def test_readers_agree_on_the_probes(pico: Readers, text: str) -> None:
    check(pico, text)


@pytest.mark.parametrize("name", ["zh_pretrain.jsonl.gz", "en_pretrain.jsonl.gz"])
def test_readers_agree_on_real_documents(llama: Readers, data: Path, name: str) -> None:
    texts = [text[:3000] for text in islice(documents(data / name), 0, 300)]
    assert len(texts) == 300
    for text in texts:
        check(llama, text)


def test_literal_control_tokens_are_text(pico: Readers) -> None:
    ids = pico.auto("<s>a</s>[PAD]<unk>", add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(pico.auto.all_special_ids)
    assert pico.auto.decode(ids) == "<s>a</s>[PAD]<unk>"


def test_every_new_piece_is_one_token_for_every_reader(pico: Readers) -> None:
    size = pico.base.get_piece_size()
    for index in range(size, pico.spm.get_piece_size() - 1):  # the last one is [PAD]
        piece = pico.spm.id_to_piece(index)
        for ids in (
            pico.spm.encode("a" + piece),
            pico.auto("a" + piece, add_special_tokens=False)["input_ids"],
        ):
            assert ids[-1] == index


def test_special_tokens_have_their_roles(pico: Readers) -> None:
    auto = pico.auto
    assert (auto.unk_token, auto.bos_token, auto.eos_token, auto.pad_token) == (
        "<unk>",
        "<s>",
        "</s>",
        "[PAD]",
    )
    assert (auto.bos_token_id, auto.eos_token_id) == (pico.spm.bos_id(), pico.spm.eos_id())
    assert auto.pad_token_id == len(auto) - 1 == pico.spm.get_piece_size() - 1
    assert auto("the")["input_ids"] == [auto.bos_token_id, *pico.spm.encode("the")]
    assert auto("the", "sea")["input_ids"] == [1, *pico.spm.encode("the"), 1, *pico.spm.encode("sea")]
    padded = auto(["the", "the river"], padding=True)
    assert padded["input_ids"][0][-1] == auto.pad_token_id
    assert padded["attention_mask"][0][-1] == 0


def test_without_a_pad_token_padding_is_unk_and_never_the_end_of_text(base: Path) -> None:
    config = tokenizer_config(read_base(base), None)
    assert config["pad_token"] == "<unk>"
    assert config["split_special_tokens"] is True


def test_saved_and_loaded_again_gives_equal_ids(pico: Readers, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pico.auto.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(again) == len(pico.auto)
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "[PAD]")
    for text in [*PROBES, *SPECIAL]:
        ids = again(text)["input_ids"]
        assert ids == pico.auto(text)["input_ids"]
        assert again.decode(ids) == pico.auto.decode(ids)


def test_merges_join_pieces_to_pieces_by_falling_score(pico: Readers) -> None:
    model = read_model(pico.directory / "tokenizer.model")
    score = {piece.piece: piece.score for piece in model.pieces}
    pairs = merges(model)
    scores = [score[left + right] for left, right in pairs]
    assert scores == sorted(scores, reverse=True)
    assert len(set(pairs)) == len(pairs)


def test_tokenizer_json_keeps_every_id(pico: Readers) -> None:
    model = read_model(pico.directory / "tokenizer.model")
    written = json.loads((pico.directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(tokenizer_json(model)))
    assert list(written["model"]["vocab"]) == [piece.piece for piece in model.pieces]
    added = {token["content"]: token["id"] for token in written["added_tokens"]}
    assert added == {"<unk>": 0, "<s>": 1, "</s>": 2, "[PAD]": len(model.pieces) - 1}


def with_user_defined(symbols: list[str], base: Path) -> model_pb2.ModelProto:
    model = read_base(base)
    for symbol in symbols:
        model.pieces.add(piece=symbol, score=0.0, type=model_pb2.ModelProto.SentencePiece.USER_DEFINED)
    return model


def test_a_base_with_user_defined_symbols_is_refused(base: Path, chinese_sp: Path, tmp_path: Path) -> None:
    """SentencePiece cuts such symbols out before it joins anything; merges alone cannot do that."""
    own = tiny.write_model(tmp_path / "own.model", with_user_defined(["<|user|>"], base))
    with pytest.raises(BadFile, match=r"own\.model: has user-defined or unused pieces \('<\|user\|>'\)"):
        extend_vocab(own, chinese_sp, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["own.model"]
