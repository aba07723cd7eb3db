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
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.data.formats import documents
from chinese_llama.data.templates import text_ids
from chinese_llama.vocab.audit import PROBES, fast_reader
from chinese_llama.vocab.fast import merges, tokenizer_config, tokenizer_json
from chinese_llama.vocab.merge import extend_vocab
from chinese_llama.vocab.proto import SPACE, encoder, read_base, read_model
from chinese_llama.vocab.scripts import CHINESE

SPECIAL = ["<s>", "</s>", "<unk>", "[PAD]", "<0x41>", SPACE, SPACE * 3, "\u3000", "\xa0", "\ufeff", "\0"]
PARTS = st.one_of(
    st.text(st.characters(codec="ascii"), max_size=12),
    st.text("中国的首都是北京长江越来多人，。！？（）“”", max_size=12),
    st.text("のカタ繁體龘䶮𠮷豈ＡＢ１", max_size=6),
    st.text("😀👨‍👩‍👧❤️é\u0301한ह", max_size=6),
    st.text(" \t\n\r", max_size=20),
    st.sampled_from(SPECIAL),
    st.builds(lambda unit, times: unit * times, st.text("ab -=的中国 ▁", min_size=1, max_size=3), st.integers(2, 20)),
    st.text(max_size=8),
)  # fmt: skip
TEXTS = st.lists(PARTS, max_size=6).map("".join)


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
    return Readers(directory, encoder(read_base(base)), spm, fast_reader(directory), auto)


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
    assert all_of.spm.decode(ids) == text.replace(SPACE, " ")
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


def test_a_base_with_user_defined_symbols_is_read_alike_or_refused(
    base: Path, chinese_sp: Path, tmp_path: Path
) -> None:
    """SentencePiece cuts such symbols out before it joins anything; merges alone cannot do that."""
    from chinese_llama.errors import UserError

    own = tmp_path / "own.model"
    own.write_bytes(with_user_defined(["<|user|>"], base).SerializeToString())
    try:
        extend_vocab(own, chinese_sp, tmp_path / "out")
    except UserError as error:
        assert "user" in str(error)
        return
    spm, fast = encoder(read_model(tmp_path / "out" / "tokenizer.model")), fast_reader(tmp_path / "out")
    assert fast.encode("a<|user|>b", add_special_tokens=False).ids == spm.encode("a<|user|>b")
