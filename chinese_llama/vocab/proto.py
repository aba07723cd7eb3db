"""SentencePiece model files: reading, checking, and an encoder from a model in memory."""

from __future__ import annotations

from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.errors import BadFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2
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


def read_base(path: Path) -> model_pb2.ModelProto:
    """A base tokenizer that can be extended: SentencePiece BPE with byte fallback, bos and eos.

    Raises BadFile for any other model, saying what it lacks.
    """
    file = tokenizer_model(path)
    model = read_model(file)
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
    own = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    if own:
        raise BadFile(
            file, f"has user-defined pieces ({own[0]!r}), which Hugging Face tokenizers read differently."
        )
    if not any(piece.type == BYTE for piece in model.pieces):
        raise BadFile(file, "has no byte pieces; a base with byte fallback is needed.")
    return model


def encoder(model: model_pb2.ModelProto, dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A processor for `model`; without the dummy prefix, text is not put behind a space."""
    if not dummy_prefix:
        copy = model_pb2.ModelProto()
        copy.CopyFrom(model)
        copy.normalizer_spec.add_dummy_prefix = False
        model = copy
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
