"""Choose the Chinese pieces that enter the base's vocabulary, so that each of them can be produced.

SentencePiece BPE has no merge table: it joins the adjacent pair whose joined piece has the highest
score, leftmost on ties. A piece that no such sequence of joins ever makes is dead: it costs two
matrix rows and appears in no text. Here dead pieces are found with the encoder itself and repaired
by adding the intermediate piece that was missing, or dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.vocab.proto import NORMAL, SPACE, encoder
from chinese_llama.vocab.scripts import is_chinese

WHITESPACE_RUN_SCORE = -1e8  # LLaMA's whitespace-run pieces lie at -1e9, outside the ranking
ROUNDS = 8


@dataclass
class Selection:
    """The pieces that enter, in order of rank, and what happened to the others."""

    pieces: list[str]
    repaired: dict[str, list[str]] = field(default_factory=dict)  # piece -> added intermediates
    dropped: dict[str, str] = field(default_factory=dict)  # piece -> reason


def first_free_score(model: model_pb2.ModelProto) -> float:
    """A whole number below every score that ranks merges in `model`.

    -31741 for LLaMA. Whole numbers stay distinct in float32 down to -16777216.
    """
    scores = [p.score for p in model.pieces if p.type == NORMAL and p.score > WHITESPACE_RUN_SCORE]
    return math.floor(min(scores)) - 1.0


def add_pieces(base: model_pb2.ModelProto, pieces: list[str]) -> model_pb2.ModelProto:
    """A copy of `base` with `pieces` appended, ranked in that order below all that it has."""
    model = model_pb2.ModelProto()
    model.CopyFrom(base)
    score = first_free_score(base)
    for rank, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=score - rank, type=NORMAL)
    return model


def select(base: model_pb2.ModelProto, chinese: model_pb2.ModelProto) -> Selection:
    """The pieces of `chinese` that can be produced when they are added to `base`.

    Pieces with any character that is not Chinese are dropped: text without Chinese then is tokenised
    as before; a leading space mark is taken off, since no new piece holds one. The order is the Chinese
    model's own (by score), single characters last.
    """
    known = {piece.piece for piece in base.pieces}
    selection = Selection([])
    candidates: dict[str, float] = {}
    for piece in chinese.pieces:
        if piece.type != NORMAL:
            continue
        text = piece.piece.removeprefix(SPACE)
        if not is_chinese(text):
            selection.dropped[piece.piece] = "not Chinese"
        elif text not in known:
            candidates.setdefault(text, piece.score)
    lowest = min(candidates.values(), default=0.0)
    for text in list(candidates):  # a join starts from characters, so each must be a piece
        for character in text:
            if character not in known and character not in candidates:
                candidates[character] = lowest
                selection.repaired.setdefault(text, []).append(character)
    ranked = sorted(candidates, key=lambda piece: (len(piece) == 1, -candidates[piece]))
    selection.pieces = ranked
    for _ in range(ROUNDS):
        dead = _dead(base, selection.pieces)
        if not dead:
            return selection
        _repair(selection, dead)
    while dead := _dead(base, selection.pieces):  # and then what needed a dropped piece
        selection.pieces = [piece for piece in selection.pieces if piece not in dead]
        selection.dropped |= dict.fromkeys(dead, "cannot be produced")
    return selection


def _dead(base: model_pb2.ModelProto, pieces: list[str]) -> dict[str, list[str]]:
    """Pieces that the encoder does not make of their own text -> what it makes instead."""
    processor = encoder(add_pieces(base, pieces), dummy_prefix=False)
    encoded = processor.encode(pieces, out_type=str)
    return {piece: got for piece, got in zip(pieces, encoded, strict=True) if got != [piece]}


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
