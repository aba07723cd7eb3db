"""Which pieces enter: each can be produced, nothing without Chinese changes, nothing gets longer."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.vocab.fast import tokenizer_json
from chinese_llama.vocab.proto import CONTROL, NORMAL, SPACE, encoder
from chinese_llama.vocab.select import add_pieces, first_free_score, select
from tests import tiny

LETTERS = "一二三"
WORDS = st.lists(st.text(LETTERS, min_size=2, max_size=6), max_size=20)
PERIODIC = st.builds(lambda unit, times, rest: unit * times + rest, st.text(LETTERS, min_size=1, max_size=4), st.integers(1, 8), st.text(LETTERS, max_size=8))  # fmt: skip


@cache
def base_model() -> model_pb2.ModelProto:
    return tiny.base_tokenizer()


@cache
def base_encoder() -> sentencepiece.SentencePieceProcessor:
    return encoder(base_model())


def chinese_model(pieces: list[str], kind: int = NORMAL) -> model_pb2.ModelProto:
    """A Chinese model with these pieces, best first."""
    model = model_pb2.ModelProto()
    for rank, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(rank), type=kind)
    return model


def reader(model: model_pb2.ModelProto) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(model)))


@settings(max_examples=50, deadline=None)
@given(words=WORDS)
def test_every_selected_piece_can_be_produced_and_none_is_lost(words: list[str]) -> None:
    """Each piece asked for is in, unless `dropped` says why; what is in comes out of the encoder."""
    asked = [*words, *LETTERS]
    selection = select(base_model(), chinese_model(asked))
    processor = encoder(add_pieces(base_model(), selection.pieces), dummy_prefix=False)
    assert [processor.encode(piece, out_type=str) for piece in selection.pieces] == [
        [piece] for piece in selection.pieces
    ]
    assert len(set(selection.pieces)) == len(selection.pieces)
    assert set(asked) == (set(selection.pieces) | set(selection.dropped)) & set(asked)
    assert not set(selection.dropped) & set(selection.pieces)
    added = {piece for parts in selection.repaired.values() for piece in parts}
    assert set(selection.pieces) <= set(asked) | added


@settings(max_examples=50, deadline=None)
@given(words=WORDS, texts=st.lists(PERIODIC, min_size=1, max_size=8))
def test_periodic_text_is_read_alike_and_never_gets_longer(words: list[str], texts: list[str]) -> None:
    """Overlapping occurrences of one piece are where merge lists and scores can part."""
    model = add_pieces(base_model(), select(base_model(), chinese_model([*words, *LETTERS])).pieces)
    new, fast = encoder(model), reader(model)
    for text in texts:
        ids = new.encode(text)
        assert ids == fast.encode(text, add_special_tokens=False).ids
        assert len(ids) <= len(base_encoder().encode(text))


@pytest.mark.parametrize(("words", "text"), [(["一二"], "三一二"), (["二二一", "二二"], "一二二一")])
def test_words_whose_characters_are_no_pieces_are_read_alike(words: list[str], text: str) -> None:
    """SentencePiece joins characters that are no pieces themselves; the other reader needs them."""
    model = add_pieces(base_model(), select(base_model(), chinese_model(words)).pieces)
    assert encoder(model).encode(text) == reader(model).encode(text, add_special_tokens=False).ids


def test_a_dead_piece_is_repaired_by_the_piece_it_lacks() -> None:
    selection = select(base_model(), chinese_model(["越来越多", *"越来多"]))
    assert "越来越多" in selection.pieces
    assert "越来越多" in selection.repaired
    assert set(selection.repaired["越来越多"]) <= set(selection.pieces)


def test_what_is_not_chinese_is_dropped_with_a_reason() -> None:
    asked = ["ab", "10", "中1", "Ａ", SPACE, f"{SPACE}a", "中 国"]
    selection = select(base_model(), chinese_model([*asked, "中"]))
    assert selection.pieces == ["中"]
    assert selection.dropped == dict.fromkeys(asked, "not Chinese")


def test_a_leading_space_mark_is_taken_off() -> None:
    assert select(base_model(), chinese_model([f"{SPACE}中", "中", f"{SPACE}国"])).pieces == ["中", "国"]


def test_pieces_of_other_kinds_and_pieces_of_the_base_are_left() -> None:
    assert select(base_model(), chinese_model(["中"], CONTROL)).pieces == []
    grown = add_pieces(base_model(), ["中"])
    assert select(grown, chinese_model(["中", "国"])).pieces == ["国"]


def test_the_order_is_the_score_with_single_characters_last() -> None:
    assert select(base_model(), chinese_model(["中", "国", "中国", "国中"])).pieces == [
        "中国",
        "国中",
        "中",
        "国",
    ]


def test_the_same_input_gives_the_same_selection() -> None:
    model = chinese_model(["中国人民", "人民", *"中国人民"])
    assert select(base_model(), model) == select(base_model(), model)


def test_new_scores_lie_below_the_base_and_stay_distinct() -> None:
    pieces = [chr(0x4E00 + number) for number in range(20_000)]
    model = add_pieces(base_model(), pieces)
    old, new = model.pieces[: -len(pieces)], model.pieces[-len(pieces) :]
    ranking = [piece.score for piece in old if piece.type == NORMAL]
    assert max(piece.score for piece in new) < min(ranking)
    assert all(a.score > b.score for a, b in pairwise(new))
    assert list(old) == list(base_model().pieces)


def test_whitespace_runs_do_not_push_the_scores_down() -> None:
    """LLaMA's whitespace runs score -1e9, where float32 cannot tell whole numbers apart."""
    model = model_pb2.ModelProto()
    model.CopyFrom(base_model())
    before = first_free_score(model)
    model.pieces.add(piece=SPACE * 9, score=-1e9, type=NORMAL)
    assert first_free_score(model) == before


def test_the_first_free_score_of_llama(data: Path) -> None:
    from chinese_llama.vocab.proto import read_base

    assert first_free_score(read_base(data / "tokenizers" / "llama")) == -31741.0
