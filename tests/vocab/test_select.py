"""Which pieces enter: each can be produced, nothing without Chinese changes, nothing gets longer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.vocab.bases import SentencePieceBase
from chinese_llama.vocab.corpus import clauses
from chinese_llama.vocab.fast import tokenizer_json
from chinese_llama.vocab.learn import last_join
from chinese_llama.vocab.proto import BPE, CONTROL, NORMAL, SPACE, UNIGRAM, USER_DEFINED, add_pieces, encoder
from chinese_llama.vocab.scripts import CHINESE, is_chinese
from chinese_llama.vocab.select import Selection, candidates, select, uses_of
from tests import tiny
from tests.tiny import chinese_model

LETTERS = "一二三"
WORDS = st.lists(st.text(LETTERS, min_size=2, max_size=6), max_size=20)
PERIODIC = st.builds(lambda unit, times, rest: unit * times + rest, st.text(LETTERS, min_size=1, max_size=4), st.integers(1, 8), st.text(LETTERS, max_size=8))  # fmt: skip
CORPUS = st.dictionaries(st.text(LETTERS, min_size=1, max_size=12), st.integers(1, 40), min_size=1, max_size=20)  # fmt: skip
SENTENCES = Counter(clause for text in tiny.CHINESE for clause in clauses(text))


@cache
def base_model() -> model_pb2.ModelProto:
    return tiny.base_tokenizer()


@cache
def base() -> SentencePieceBase:
    return SentencePieceBase(base_model(), Path("x"))


@cache
def base_encoder() -> sentencepiece.SentencePieceProcessor:
    return encoder(base_model())


def light(pieces: Sequence[str]) -> model_pb2.ModelProto:
    """A Chinese model whose pieces count as a few words each, so that a small corpus decides."""
    model = chinese_model(list(pieces))
    model.trainer_spec.model_type = UNIGRAM
    for piece in model.pieces:
        piece.score = -14.0
    return model


def reader(model: model_pb2.ModelProto) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(model)))


def assert_alive(pieces: list[str]) -> None:
    """Each of the pieces comes out of the encoder that has just these."""
    processor = encoder(add_pieces(base_model(), pieces), dummy_prefix=False)
    assert processor.encode(pieces, out_type=str) == [[piece] for piece in pieces]
    assert len(set(pieces)) == len(pieces)


def uses(pieces: list[str], words: dict[str, int]) -> dict[str, float]:
    return dict(zip(pieces, uses_of(base(), pieces, words)[base().size :].tolist(), strict=True))


@settings(max_examples=50, deadline=None)
@given(words=WORDS)
def test_every_selected_piece_can_be_produced_and_none_is_lost(words: list[str]) -> None:
    """Each piece asked for is in, unless `dropped` says why; what is in comes out of the encoder."""
    asked = [*words, *LETTERS]
    selection = select(base(), chinese_model(asked))
    assert_alive(selection.pieces)
    assert set(asked) == (set(selection.pieces) | set(selection.dropped)) & set(asked)
    assert not set(selection.dropped) & set(selection.pieces)
    assert set(selection.by_worth) == set(selection.pieces)
    added = {piece for parts in selection.repaired.values() for piece in parts}
    assert set(selection.pieces) <= set(asked) | added


@settings(max_examples=50, deadline=None)
@given(words=WORDS, texts=st.lists(PERIODIC, min_size=1, max_size=8))
def test_periodic_text_is_read_alike_and_never_gets_longer(words: list[str], texts: list[str]) -> None:
    """Overlapping occurrences of one piece are where merge lists and scores can part."""
    model = add_pieces(base_model(), select(base(), chinese_model([*words, *LETTERS])).pieces)
    new, fast = encoder(model), reader(model)
    for text in texts:
        ids = new.encode(text)
        assert ids == fast.encode(text, add_special_tokens=False).ids
        assert len(ids) <= len(base_encoder().encode(text))


@pytest.mark.parametrize(("words", "text"), [(["一二"], "三一二"), (["二二一", "二二"], "一二二一")])
def test_words_whose_characters_are_no_pieces_are_read_alike(words: list[str], text: str) -> None:
    """SentencePiece joins characters that are no pieces themselves; the other reader needs them."""
    model = add_pieces(base_model(), select(base(), chinese_model(words)).pieces)
    assert encoder(model).encode(text) == reader(model).encode(text, add_special_tokens=False).ids


def test_a_dead_piece_is_repaired_by_the_piece_it_lacks() -> None:
    selection = select(base(), chinese_model(["越来越多", *"越来多"]))
    assert "越来越多" in selection.pieces
    assert "越来越多" in selection.repaired
    assert set(selection.repaired["越来越多"]) <= set(selection.pieces)


def test_what_is_not_chinese_is_dropped_with_a_reason() -> None:
    asked = ["ab", "10", "中1", "Ａ", SPACE, f"{SPACE}a", "中 国", "”", "……"]
    selection = select(base(), chinese_model([*asked, "中"]))
    assert selection.pieces == ["中"]
    assert selection.dropped == dict.fromkeys(asked, "not Chinese")


@pytest.mark.parametrize("counts", [None, {"。”": 50, "中国": 9}])
def test_a_shared_mark_never_enters_alone(counts: dict[str, int] | None) -> None:
    """The base spells it in bytes; a piece of its own would change English text."""
    selection = select(base(), light(["。”", "“中国", "中国"]), counts, 6)
    assert "中国" in selection.pieces
    assert all(map(is_chinese, selection.pieces))


def test_a_leading_space_mark_is_taken_off() -> None:
    assert select(base(), chinese_model([f"{SPACE}中", "中", f"{SPACE}国"])).pieces == ["中", "国"]


@pytest.mark.parametrize("counts", [None, {"中国": 50, "国": 9, "中": 9}])
def test_pieces_of_other_kinds_and_pieces_of_the_base_are_left(counts: dict[str, int] | None) -> None:
    assert select(base(), chinese_model(["中"], CONTROL)).pieces == []
    grown = SentencePieceBase(add_pieces(base_model(), ["中"]), Path("x"))
    selection = select(grown, chinese_model(["中", "国"]), counts)
    assert "国" in selection.pieces
    assert "中" not in selection.pieces


@pytest.mark.parametrize("counts", [None, {"中国": 50}])
def test_a_user_defined_piece_is_dropped_with_a_reason(counts: dict[str, int] | None) -> None:
    model = chinese_model(["中", "国", "中国"])
    model.pieces.add(piece="北京", score=0.0, type=USER_DEFINED)
    selection = select(base(), model, counts)
    assert selection.dropped["北京"].startswith("user-defined")
    assert "北京" not in selection.pieces


def test_the_order_is_the_score_with_single_characters_last() -> None:
    assert select(base(), chinese_model(["中", "国", "中国", "国中"])).pieces == [
        "中国",
        "国中",
        "中",
        "国",
    ]


@pytest.mark.parametrize("counts", [None, SENTENCES])
def test_the_same_input_gives_the_same_selection(counts: Counter[str] | None) -> None:
    model = chinese_model(["中国人民", "人民", *"中国人民"])
    assert select(base(), model, counts) == select(base(), model, counts)


def test_marks_that_nfkc_made_ascii_are_written_back() -> None:
    model = chinese_model(["),", "(", "!?", "中国!", ":;", "a,", ".", "3)"])
    model.normalizer_spec.name = "nmt_nfkc"
    selection = Selection([])
    assert list(candidates(model, selection)) == ["），", "（", "！？", "中国！", "：；"]
    assert selection.dropped == dict.fromkeys(["a,", ".", "3)"], "not Chinese")
    assert {"），", "（", "！？", "中国！"} <= set(select(base(), model).pieces)
    model.normalizer_spec.name = "identity"
    assert list(candidates(model, Selection([]))) == []


def test_shares_are_probabilities_of_a_unigram_model_and_fall_with_the_rank_of_bpe() -> None:
    model = chinese_model(["中", "国", f"{SPACE}国", "京"])
    for piece, score in zip(model.pieces, (-3.0, -1.0, -2.0, -4.0), strict=True):
        piece.score = score
    model.trainer_spec.model_type = UNIGRAM
    e = 2.718281828459045
    shares = candidates(model, Selection([]))
    assert list(shares) == ["国", "中", "京"]
    assert shares == pytest.approx({"国": e**-1 + e**-2, "中": e**-3, "京": e**-4})
    model.trainer_spec.model_type = BPE
    by_rank = list(candidates(model, Selection([])).values())
    assert by_rank == sorted(by_rank, reverse=True)


@settings(max_examples=40, deadline=None)
@given(counts=CORPUS, most=st.integers(1, 12))
def test_with_a_corpus_at_most_so_many_pieces_and_all_alive(counts: dict[str, int], most: int) -> None:
    selection = select(base(), light(LETTERS), counts, most)
    assert len(selection.pieces) <= most
    assert sorted(selection.by_worth) == sorted(selection.pieces)
    assert all(map(is_chinese, selection.pieces))
    assert_alive(selection.pieces)


@settings(max_examples=40, deadline=None)
@given(counts=CORPUS)
@example(counts={"一" * 12: 40, "一二一二一二三一二": 30, "二一二一三三三": 25})
def test_the_first_pieces_by_worth_are_a_living_vocabulary_however_many(counts: dict[str, int]) -> None:
    selection = select(base(), light(LETTERS), counts)
    for count in range(len(selection.pieces) + 1):
        first = selection.first(count)
        assert len(first) == count
        assert_alive(first)


@settings(max_examples=40, deadline=None)
@given(words=WORDS)
def test_without_a_corpus_too(words: list[str]) -> None:
    selection = select(base(), chinese_model([*words, *LETTERS]))
    for count in range(len(selection.pieces) + 1):
        assert_alive(selection.first(count))


@settings(max_examples=60, deadline=None)
@given(counts=CORPUS, least=st.integers(1, 60))
def test_no_piece_is_used_less_than_asked_but_where_another_is_joined_from_it(
    counts: dict[str, int], least: int
) -> None:
    selection = select(base(), light(LETTERS), counts, 20, least)
    pieces = selection.pieces
    assert_alive(pieces)
    rank = {piece: index for index, piece in enumerate(pieces)}
    needed = {part for piece in pieces for part in last_join(piece, rank) or ()}
    for piece, used in uses(pieces, counts).items():
        assert used >= least or piece in needed


def test_frequent_words_of_the_corpus_enter_though_the_chinese_model_lacks_them() -> None:
    selection = select(base(), light("中国"), SENTENCES, 60)
    assert {"中国", "北京", "图书馆"} <= set(selection.pieces)
    assert len(selection.pieces) <= 60


def test_more_pieces_make_the_corpus_shorter() -> None:
    selection = select(base(), light("中国北京"), SENTENCES, 120)
    encoded = [
        sum(map(len, base().encode_with(selection.first(count))(list(SENTENCES))))
        for count in range(0, len(selection.pieces) + 1, 10)
    ]
    assert encoded == sorted(encoded, reverse=True)
    assert encoded[-1] < encoded[0] / 3


def test_text_without_chinese_stays_and_none_gets_longer_with_pieces_of_a_corpus() -> None:
    selection = select(base(), light("中国"), SENTENCES, 120)
    new = encoder(add_pieces(base_model(), selection.pieces))
    for text in [*tiny.ENGLISH[:5], *tiny.CHINESE[:5], "“quoted”—…", "😀 １２", "  a\t中 b"]:
        ids, before = new.encode(text), base_encoder().encode(text)
        assert len(ids) <= len(before)
        assert ids == before or CHINESE.search(text)


def test_uses_are_what_the_encoder_makes_of_the_words() -> None:
    counts = {"中国人": 3, "国人": 2, "人a": 5, "京": 1}
    found = uses_of(base(), ["国人", "中", "人"], counts)
    assert found[base().size :].tolist() == [5.0, 3.0, 5.0]
    bytes_of = [base_model().pieces[index].piece for index in found[: base().size].nonzero()[0]]
    assert sorted(bytes_of) == sorted([f"<0x{byte:02X}>" for byte in "京".encode()] + ["a"])


def test_normal_pieces_only_are_known_to_the_base() -> None:
    assert NORMAL == 1
    assert base().known == {piece.piece for piece in base_model().pieces if piece.type == NORMAL}


@pytest.mark.parametrize("score", [0.0, 50.0, 1000.0])
def test_scores_that_are_no_logarithms_do_not_outweigh_a_corpus(score: float) -> None:
    """Shares never add up to more than one, so the Chinese model never counts more than its words."""
    model = model_pb2.ModelProto()
    for piece in ("中国", "国人", "人中"):
        model.pieces.add(piece=piece, score=score, type=NORMAL)
    assert sum(candidates(model, Selection([])).values()) == pytest.approx(1.0)
