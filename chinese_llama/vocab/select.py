"""Choose the Chinese pieces that enter the base's vocabulary, so that each of them can be produced.

SentencePiece BPE has no merge table: it joins the adjacent pair whose joined piece has the highest
score, leftmost on ties. A piece that no such sequence of joins ever makes is dead: it costs two
matrix rows and appears in no text. Here dead pieces are found with the encoder itself and repaired
by adding the intermediate piece that was missing, or dropped.

Without a corpus, all of the Chinese model's pieces are wanted, in order of their scores. With one,
pieces are learnt from the corpus and from the Chinese model's own probabilities together: the model
counts as PRIOR words of text, so that a small corpus does not carry its subject into the vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.progress import say
from chinese_llama.vocab.bases import Base
from chinese_llama.vocab.learn import continued_bpe, last_join, prune
from chinese_llama.vocab.proto import NORMAL, SPACE, UNIGRAM, USER_DEFINED
from chinese_llama.vocab.scripts import is_chinese

ROUNDS = 8
PRIOR = 5_000_000  # words of text that the Chinese model's probabilities count as
SPARE = 1.3  # pieces learnt for each that is wanted; those of least worth go again
CHUNK = 100_000  # clauses encoded at once
FULL_WIDTH = {ord(mark): ord(mark) + 0xFEE0 for mark in "!(),:;?"}  # ！（），：；？


@dataclass
class Selection:
    """The pieces that enter, in order of rank, and what happened to the others.

    `by_worth` has the same pieces, those that save most tokens first: each beginning of it is a
    vocabulary of its own, in which everything can be produced.
    """

    pieces: list[str]
    by_worth: list[str] = field(default_factory=list)
    repaired: dict[str, list[str]] = field(default_factory=dict)  # piece -> added intermediates
    dropped: dict[str, str] = field(default_factory=dict)  # piece -> reason

    def first(self, count: int) -> list[str]:
        """The `count` pieces most worth having, in order of rank."""
        kept = set(self.by_worth[:count])
        return [piece for piece in self.pieces if piece in kept]


def select(
    base: Base,
    chinese: model_pb2.ModelProto,
    corpus: Mapping[str, int] | None = None,
    most: int | None = None,
    min_count: int = 0,
) -> Selection:
    """At most `most` pieces (None: as many as the Chinese model offers) that are worth adding to `base`.

    `corpus` counts clauses; a piece that the encoder uses fewer than `min_count` times on them is left
    out, unless another is joined from it. Pieces with a character that is not Chinese are dropped, so text without Chinese is tokenised
    as before; a leading space mark is taken off, since no new piece holds one.
    """
    selection = Selection([])
    offered = candidates(chinese, selection)
    taken = base.known | base.names
    new = [piece for piece in offered if piece not in taken]
    words = as_text(offered)
    if corpus is None:
        _take(base, new, selection)
    else:
        most = len(new) if most is None else most
        words.update(corpus)
        _learn(base, words, int(most * SPARE), selection)
        _fit(base, selection, words, int(most * SPARE**0.5))
    _fit(base, selection, words, most)
    if corpus is not None and min_count:
        _fit(base, selection, corpus, None, min_count)
    _drop_dead(base, selection)
    entered = set(selection.pieces)
    left = (piece for piece in new if piece not in entered)
    selection.dropped = {**dict.fromkeys(left, "worth less than those that entered"), **selection.dropped}
    return selection


def candidates(chinese: model_pb2.ModelProto, selection: Selection) -> dict[str, float]:
    """Pieces of the Chinese model -> their share of its text, best first.

    A unigram model's scores are logarithms of probabilities; the scores of a BPE model are ranks, to
    which Zipf's law gives probabilities. A model that was trained on NFKC-normalised text wrote
    ，！？（）：； in ASCII; they are written back.
    """
    folded = "nfkc" in chinese.normalizer_spec.name
    unigram = chinese.trainer_spec.model_type == UNIGRAM
    normal = [piece for piece in chinese.pieces if piece.type == NORMAL]
    for piece in chinese.pieces:
        if piece.type == USER_DEFINED:
            selection.dropped[piece.piece] = "user-defined: give it in a corpus, as often as it is worth"
    top = max([0.0, *(piece.score for piece in normal)])
    total = max(1.0, sum(math.exp(piece.score - top) for piece in normal)) if unigram else 1.0
    found: dict[str, float] = {}
    for rank, piece in enumerate(sorted(normal, key=lambda piece: -piece.score)):
        text = piece.piece.removeprefix(SPACE)
        if folded:
            text = text.translate(FULL_WIDTH)
        if is_chinese(text):
            share = math.exp(piece.score - top) / total if unigram else 0.1 / (rank + 10)
            found[text] = found.get(text, 0.0) + share
        else:
            selection.dropped[piece.piece] = "not Chinese"
    return found


def as_text(offered: Mapping[str, float]) -> Counter[str]:
    """The shares of pieces as a count of words, PRIOR in all."""
    return Counter({piece: round(share * PRIOR) for piece, share in offered.items()})


def _take(base: Base, offered: Sequence[str], selection: Selection) -> None:
    """All that is `offered`, in that order with single characters last; what is dead is repaired."""
    wanted = dict.fromkeys(offered)
    for piece in offered:  # a join starts from characters, so each must be a piece
        missing = [c for c in dict.fromkeys(piece) if c not in base.known and c not in wanted]
        if all(map(is_chinese, missing)):
            wanted |= dict.fromkeys(missing)
            if missing:
                selection.repaired[piece] = missing
        else:  # a mark that English text has too, which must stay what it is there
            del wanted[piece]
            selection.dropped[piece] = "holds a mark that the base has no piece for"
    selection.pieces = sorted(wanted, key=lambda piece: len(piece) == 1)
    for _ in range(ROUNDS):
        dead = _dead(base, selection.pieces)
        if not dead:
            return
        _repair(selection, dead)
    _drop_dead(base, selection)


def _learn(base: Base, words: Mapping[str, int], most: int, selection: Selection) -> None:
    """About `most` pieces that byte-pair encoding learns from `words`, and the characters they need."""
    say(f"learning pieces from {len(words):,} different clauses ...")
    joins = continued_bpe(words, most, base.spell(words))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    taken = base.known | base.names
    usable = {c for c, count in characters.items() if count > 1 and is_chinese(c) and c not in taken}
    new = [piece for piece in joins if piece not in taken and is_chinese(piece)]
    spelt = usable | base.known
    pieces = [piece for piece in new if len(piece) > 1 and all(c in spelt for c in piece)]
    selection.pieces = pieces + sorted(usable, key=lambda c: (-characters[c], c))
    _drop_dead(base, selection)


def _drop_dead(base: Base, selection: Selection) -> None:
    """Leave out what cannot be produced, and then what needed that."""
    while dead := _dead(base, selection.pieces):
        selection.pieces = [piece for piece in selection.pieces if piece not in dead]
        selection.by_worth = [piece for piece in selection.by_worth if piece not in dead]
        selection.dropped |= dict.fromkeys(dead, "cannot be produced")


def _fit(
    base: Base, selection: Selection, words: Mapping[str, int], most: int | None, least: int = 0
) -> None:
    """Rank the pieces by what they save on `words`; keep the `most` best, used at least `least` times."""
    pieces = selection.pieces
    rank = {piece: index for index, piece in enumerate(pieces)}
    spelt = base.spell(pieces)
    parts = {p: last_join(spelt.get(p, p), rank) or () for p in pieces if len(p) > 1}
    price = _price(base, [piece for piece in pieces if len(piece) == 1])
    uses = dict(zip(pieces, uses_of(base, pieces, words)[base.size :].tolist(), strict=True))
    if least:
        gone = set(prune(pieces, uses, parts, {}, least))
        selection.by_worth = [piece for piece in selection.by_worth if piece not in gone]
    else:
        selection.by_worth = prune(pieces, uses, parts, price)[::-1][:most]
    selection.pieces = selection.first(len(pieces))


def _price(base: Base, characters: Sequence[str]) -> dict[str, int]:
    """How many tokens more the base takes for each character than a piece of its own does."""
    encoded = base.encode_with(())(characters)
    return {c: max(1, len(ids) - 1) for c, ids in zip(characters, encoded, strict=True)}


def uses_of(base: Base, pieces: Sequence[str], words: Mapping[str, int]) -> Any:
    """How often the encoder uses each id on `words`, base's and new ones: float [base.size + pieces]."""
    encode = base.encode_with(pieces)
    counts = numpy.zeros(base.size + len(pieces))
    texts, weights = list(words), numpy.array(list(words.values()), dtype=float)
    for start in range(0, len(texts), CHUNK):
        batch = encode(texts[start : start + CHUNK])
        ids = numpy.fromiter(chain.from_iterable(batch), dtype=numpy.int64)
        each: Any = numpy.repeat(weights[start : start + CHUNK], [len(one) for one in batch])
        counts += numpy.bincount(ids, weights=each, minlength=len(counts))
    return counts


def _dead(base: Base, pieces: Sequence[str]) -> dict[str, list[str]]:
    """Pieces that the encoder does not make of their own text -> what it makes instead."""
    encoded = base.encode_with(pieces)(pieces)
    ids = range(base.size, base.size + len(pieces))
    dead = {piece: got for piece, index, got in zip(pieces, ids, encoded, strict=True) if got != [index]}
    return {
        piece: [base.text(i) if i < base.size else pieces[i - base.size] for i in got]
        for piece, got in dead.items()
    }


def _repair(selection: Selection, dead: dict[str, list[str]]) -> None:
    """Put before each dead piece the join of the first two parts that the encoder stops at."""
    known = set(selection.pieces)
    before: dict[str, str] = {}
    for piece, parts in dead.items():
        if len(parts) < 2:  # the normaliser makes another character of it
            continue
        joined = parts[0] + parts[1]
        if joined not in known and joined != piece and is_chinese(joined):
            known.add(joined)
            before[piece] = joined
            selection.repaired.setdefault(piece, []).append(joined)
    pieces = []
    for piece in selection.pieces:
        if piece in before:
            pieces.append(before[piece])
        pieces.append(piece)
    selection.pieces = pieces
