"""SentencePiece model files: reading, checking, and an encoder from a model in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.errors import BadFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
WHITESPACE_RUN_SCORE = -1e8  # LLaMA's whitespace-run pieces lie at -1e9, outside the ranking
_ENDS = {"bos": "beginning", "eos": "end"}
SPACE = "\u2581"  # what SentencePiece writes for a space


def read_model(path: Path) -> model_pb2.ModelProto:
    """The SentencePiece model in `path`. Raises BadFile if it is none."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error.strerror}).") from error
    model = model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise BadFile(path, "is not a SentencePiece model.") from error
    if not model.pieces or not model.trainer_spec.ByteSize():
        raise BadFile(path, "is not a SentencePiece model.")
    return model


def tokenizer_model(path: Path) -> Path:
    """The tokenizer.model at `path`: the file itself, or the one in a directory."""
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.model").is_file():
            what = "has no tokenizer.model; a SentencePiece-BPE tokenizer (LLaMA 1 or 2) is needed."
            raise BadFile(path, what)
        return path / "tokenizer.model"
    if not path.is_file():
        raise BadFile(path, "no such file.")
    return path


def read_chinese(path: Path) -> model_pb2.ModelProto:
    """A Chinese SentencePiece model, of whatever kind, whose pieces can be told apart."""
    model = read_model(path)
    _check_pieces(path, model)
    return model


def _check_pieces(path: Path, model: model_pb2.ModelProto) -> None:
    seen: dict[str, int] = {}
    for index, piece in enumerate(model.pieces):
        if not isinstance(piece.piece, str) or not math.isfinite(piece.score):
            raise BadFile(path, f"has a damaged piece (id {index}); get the file again.")
        if not piece.piece:
            raise BadFile(path, f"has an empty piece (id {index}); it is damaged, train it again.")
        if piece.piece in seen:
            twice = f"has the piece {piece.piece!r} twice (ids {seen[piece.piece]} and {index})"
            raise BadFile(path, f"{twice}; ids must be told apart by their pieces, train it again.")
        seen[piece.piece] = index


def read_base(path: Path) -> model_pb2.ModelProto:
    """A base tokenizer that can be extended: SentencePiece BPE with byte fallback, bos and eos.

    Raises BadFile for any other model, saying what it lacks.
    """
    file = tokenizer_model(path)
    model = read_model(file)
    _check_pieces(file, model)
    normalizer = model.normalizer_spec
    if model.trainer_spec.model_type != BPE:
        raise BadFile(file, "is not a BPE model; only SentencePiece-BPE bases can be extended.")
    if not normalizer.escape_whitespaces or model.trainer_spec.treat_whitespace_as_suffix:
        raise BadFile(file, "does not write spaces as LLaMA's does (a mark before the word).")
    pieces = {piece.piece for piece in model.pieces}
    for role in ("bos", "eos"):
        if getattr(model.trainer_spec, f"{role}_piece") not in pieces:
            raise BadFile(
                file, f"has no {role} piece; a base that marks the {_ENDS[role]} of a text is needed."
            )
    own = [piece.piece for piece in model.pieces if piece.type in (USER_DEFINED, UNUSED)]
    if own:
        what = (
            f"has user-defined or unused pieces ({own[0]!r}), which Hugging Face tokenizers read differently."
        )
        raise BadFile(file, what)
    if not any(piece.type == BYTE for piece in model.pieces):
        raise BadFile(file, "has no byte pieces; a base with byte fallback is needed.")
    if normalizer.precompiled_charsmap:
        what = f"normalises its text ({normalizer.name}), which Hugging Face tokenizers do otherwise"
        raise BadFile(file, f"{what}; only bases that take text as it is can be extended.")
    if model.trainer_spec.unk_piece not in pieces or not any(p.type == NORMAL for p in model.pieces):
        raise BadFile(file, "has no unknown piece, or no ordinary one.")
    try:
        encoder(model)
    except RuntimeError as error:
        raise BadFile(file, f"cannot be loaded by SentencePiece ({error}).") from error
    return model


def encoder(model: model_pb2.ModelProto, dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A processor for `model`; without the dummy prefix, text is not put behind a space, and spaces stay
    as they are."""
    if not dummy_prefix:
        copy = model_pb2.ModelProto()
        copy.CopyFrom(model)
        copy.normalizer_spec.add_dummy_prefix = False
        copy.normalizer_spec.remove_extra_whitespaces = False
        model = copy
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def first_free_score(model: model_pb2.ModelProto) -> float:
    """A whole number below every score that ranks merges in `model`.

    -31741 for LLaMA. Whole numbers stay distinct in float32 down to -16777216.
    """
    scores = [p.score for p in model.pieces if p.type == NORMAL and p.score > WHITESPACE_RUN_SCORE]
    return math.floor(min(scores)) - 1.0


def add_pieces(
    base: model_pb2.ModelProto, pieces: Sequence[str], score: float | None = None
) -> model_pb2.ModelProto:
    """A copy of `base` with `pieces` appended, ranked in that order below all that it has, from `score`
    (default: the first that is free) on."""
    model = model_pb2.ModelProto()
    model.CopyFrom(base)
    score = first_free_score(base) if score is None else score
    for rank, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=score - rank, type=NORMAL)
    return model
