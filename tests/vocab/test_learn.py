"""Learning pieces: byte-pair encoding as it is defined, and the joins that SentencePiece makes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.vocab import learn
from chinese_llama.vocab.learn import LONGEST_PIECE, continued_bpe, last_join, prune
from chinese_llama.vocab.proto import add_pieces, encoder
from tests import tiny

LETTERS = "一二三"
COUNTS = st.dictionaries(st.text("一二三四五", min_size=1, max_size=8), st.integers(1, 30), min_size=1, max_size=12)  # fmt: skip
PIECES = st.lists(st.text(LETTERS, min_size=2, max_size=7), unique=True, max_size=14)
RANKED = st.permutations([*LETTERS, "一二", "二三", "一二三", "三三", "三三三", "二三三", "一一", "二一二", "一二三三"])  # fmt: skip
USES = st.lists(st.integers(0, 20), min_size=30, max_size=30)


@cache
def base_model() -> model_pb2.ModelProto:
    return tiny.base_tokenizer()


def naive_bpe(split: Mapping[str, Sequence[str]], counts: Mapping[str, int], most: int) -> list[str]:
    """Byte-pair encoding as in the textbook: join the most frequent pair everywhere, while one occurs
    twice; of equals the pair whose parts came first."""
    words = {word: list(parts) for word, parts in split.items()}
    order = {part: index for index, part in enumerate(sorted({p for parts in words.values() for p in parts}))}
    joins: list[str] = []
    while len(joins) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]]), default=None)
        if best is None or pairs[best] < 2:
            break
        join = "".join(best)
        if join not in order:
            joins.append(join)
            order[join] = len(order)
        for parts in words.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = [join]
                at += 1
    return joins


@settings(max_examples=150, deadline=None)
@given(counts=COUNTS, most=st.integers(1, 20))
@example(counts={"一一一一一": 3, "一一二一一": 2}, most=5)
def test_joins_are_those_of_byte_pair_encoding(counts: dict[str, int], most: int) -> None:
    assert continued_bpe(counts, most, {}) == naive_bpe({w: w for w in counts}, counts, most)


@settings(max_examples=50, deadline=None)
@given(counts=COUNTS, cuts=st.lists(st.booleans(), min_size=8, max_size=8), most=st.integers(1, 20))
def test_joins_go_on_from_the_pieces_of_the_base(counts: dict[str, int], cuts: list[bool], most: int) -> None:
    """Each join is of whole pieces: what the base has joined is never cut again."""
    spell = {word: in_parts(word, cuts) for word in counts}
    joins = continued_bpe(counts, most, {w: parts for w, parts in spell.items() if len(parts) < len(w)})
    ends = {
        "".join(parts[start:stop])
        for parts in spell.values()
        for start in range(len(parts))
        for stop in range(start + 2, len(parts) + 1)
    }
    assert set(joins) <= ends
    assert len(joins) <= most
    if joins:
        pairs: Counter[str] = Counter()
        for word, parts in spell.items():
            for left, right in pairwise(parts):
                pairs[left + right] += counts[word]
        assert pairs[joins[0]] >= 2


def in_parts(word: str, cuts: Sequence[bool]) -> list[str]:
    parts = [word[0]]
    for character, cut in zip(word[1:], cuts, strict=False):
        if cut:
            parts.append(character)
        else:
            parts[-1] += character
    return parts


def test_a_word_of_the_base_is_learnt_on_as_one_symbol() -> None:
    counts = {"中国人民": 9, "人民": 5, "中国": 3}
    spell = {"中国人民": ["中国", "人", "民"], "中国": ["中国"]}
    assert continued_bpe(counts, 5, spell) == ["人民", "中国人民"]


def test_many_pieces_of_the_base_stay_apart() -> None:
    """More than one plane of private characters holds: 65,534."""
    words = {chr(0x4E00 + n % 300) + chr(0x5E00 + n // 300) + "的": 2 for n in range(66_000)}
    spell = {word: [word[:2], "的"] for word in words}
    joins = continued_bpe(words, 70_000, spell)
    assert sorted(joins) == sorted(words)


@settings(max_examples=30, deadline=None)
@given(counts=COUNTS, most=st.integers(0, 20))
def test_the_order_of_the_words_does_not_matter_and_joins_are_at_most_so_many(
    counts: dict[str, int], most: int
) -> None:
    joins = continued_bpe(counts, most, {})
    assert joins == continued_bpe(dict(reversed(counts.items())), most, {})
    assert len(joins) == len(set(joins)) <= most


def test_words_that_count_nothing_teach_nothing() -> None:
    assert continued_bpe({"一二三四": 10, "五六七八九": 0}, 1, {}) == ["一二"]


def test_a_piece_is_no_longer_than_the_longest() -> None:
    words = {"".join(chr(0x4E00 + n) for n in range(60)): 30, "一" * 60: 10}
    joins = continued_bpe(words, 500, {})
    assert max(map(len, joins)) <= LONGEST_PIECE


def test_large_counts_come_in_batches_that_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"一二三": 900, "二三": 1300, "三一": 801, "四" * 300: 7, "三二": 2}
    whole = continued_bpe(counts, 50, {})
    monkeypatch.setattr(learn, "BATCH", 100)
    assert continued_bpe(counts, 50, {}) == whole


def made(pieces: Sequence[str], text: str) -> list[str]:
    """What the real encoder makes of `text` when the base has these pieces added, in this order."""
    return encoder(add_pieces(base_model(), pieces), dummy_prefix=False).encode(text, out_type=str)


@settings(max_examples=150, deadline=None)
@given(pieces=PIECES)
@example(pieces=["一二三", "一二"])
@example(pieces=["一一一", "一一", "一一一一一"])
def test_a_piece_can_be_produced_exactly_where_it_has_a_last_join(pieces: list[str]) -> None:
    rank = {piece: index for index, piece in enumerate(pieces)}
    processor = encoder(add_pieces(base_model(), [*pieces, *LETTERS]), dummy_prefix=False)
    for piece, got in zip(pieces, processor.encode(pieces, out_type=str), strict=True):
        assert (got == [piece]) == (last_join(piece, rank) is not None)


@settings(max_examples=100, deadline=None)
@given(pieces=RANKED)
def test_the_last_join_is_what_the_encoder_stops_at_without_the_piece(pieces: list[str]) -> None:
    rank = {piece: index for index, piece in enumerate(pieces)}
    for piece in pieces:
        parts = last_join(piece, rank)
        if parts is not None:
            assert made([other for other in pieces if other != piece], piece) == list(parts)


@settings(max_examples=50, deadline=None)
@given(pieces=PIECES, word=st.text(LETTERS, min_size=2, max_size=9))
def test_the_parts_spell_the_word_and_are_pieces_or_characters(pieces: list[str], word: str) -> None:
    rank = {piece: index for index, piece in enumerate(pieces)}
    parts = last_join(word, rank)
    if parts is not None:
        assert "".join(parts) == word
        assert all(part in rank or len(part) == 1 for part in parts)
        assert word in rank


def test_joins_start_from_what_the_base_makes_of_the_word() -> None:
    rank = {"中国人": 0, "国人": 1}
    assert last_join("中国人", rank) == ("中", "国人")
    assert last_join(["中国", "人"], rank) == ("中国", "人")
    assert last_join(["中", "国"], rank) is None


@pytest.mark.parametrize("word", ["", "中"])
def test_what_needs_no_join_has_none(word: str) -> None:
    assert last_join(word, {"中": 0}) is None


def naive_prune(
    pieces: Sequence[str],
    uses: Mapping[str, float],
    parts: Mapping[str, Sequence[str]],
    price: Mapping[str, int],
    floor: float,
) -> list[str]:
    """The leaf that costs least goes, the last of equals first, until none costs less than `floor`."""
    left = {piece: uses.get(piece, 0) for piece in pieces}
    gone: list[str] = []
    while True:
        needed = {part for piece in left for part in parts.get(piece, ())}
        leaves = [piece for piece in left if piece not in needed]
        cost = {piece: left[piece] * price.get(piece, 1) for piece in leaves}
        if not leaves or min(cost.values()) >= floor:
            return gone
        piece = min(leaves, key=lambda piece: (cost[piece], -pieces.index(piece)))
        for part in parts.get(piece, ()):
            if part in left:
                left[part] += left[piece]
        del left[piece]
        gone.append(piece)


def alive(pieces: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """Those pieces that can be produced, and the parts of each."""
    kept = list(pieces)
    while True:
        rank = {piece: index for index, piece in enumerate(kept)}
        parts = {piece: last_join(piece, rank) for piece in kept if len(piece) > 1}
        dead = [piece for piece, found in parts.items() if found is None]
        if not dead:
            return kept, {piece: found for piece, found in parts.items() if found}
        kept = [piece for piece in kept if piece not in dead]


@settings(max_examples=150, deadline=None)
@given(pieces=PIECES, uses=USES, floor=st.sampled_from([0, 1, 5, 25, math.inf]))
def test_leaves_go_in_order_of_what_their_loss_costs(
    pieces: list[str], uses: list[int], floor: float
) -> None:
    kept, parts = alive([*pieces, *LETTERS])
    counts = dict(zip(kept, uses, strict=False))
    price = {"一": 2, "二": 1, "三": 3}
    gone = prune(kept, counts, parts, price, floor)
    assert gone == naive_prune(kept, counts, parts, price, floor)
    if floor == math.inf:
        assert sorted(gone) == sorted(kept)


@settings(max_examples=100, deadline=None)
@given(pieces=PIECES, uses=USES)
def test_whatever_is_left_holds_the_parts_of_all_its_pieces(pieces: list[str], uses: list[int]) -> None:
    kept, parts = alive([*pieces, *LETTERS])
    by_worth = prune(kept, dict(zip(kept, uses, strict=False)), parts, {})[::-1]
    for count in range(len(by_worth) + 1):
        first = set(by_worth[:count])
        needed = {part for piece in first for part in parts.get(piece, ())}
        assert needed & set(kept) <= first


def test_nothing_goes_that_costs_the_floor_and_parts_gain_the_uses_of_what_went() -> None:
    pieces = ["一二三", "一二", "二三", "三"]
    parts = {"一二三": ("一二", "三"), "一二": ("一", "二"), "二三": ("二", "三")}
    uses = {"一二三": 4, "一二": 0, "二三": 5, "三": 0}
    assert prune(pieces, uses, parts, {}, 4) == []
    assert prune(pieces, uses, parts, {}, 5) == ["一二三", "一二"]
    assert prune(pieces, uses, parts, {}, 6) == ["一二三", "一二", "二三"], "三 gains 4 and 5"
    assert prune(pieces, uses, parts, {"三": 2}) == ["一二三", "一二", "二三", "三"]


def test_a_part_that_stands_twice_gains_twice() -> None:
    assert prune(["一一", "一"], {"一一": 3, "一": 0}, {"一一": ("一", "一")}, {}, 6) == ["一一"]
    assert prune(["一一", "一"], {"一一": 3, "一": 0}, {"一一": ("一", "一")}, {}, 7) == ["一一", "一"]


def test_pieces_without_uses_and_parts_of_the_base_are_no_trouble() -> None:
    assert prune(["一二", "三"], {"三": 1}, {"一二": ("一", "二")}, {}) == ["一二", "三"]
    assert prune([], {}, {}, {}) == []
