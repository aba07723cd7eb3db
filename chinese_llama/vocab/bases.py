"""The tokenizer that is extended, whatever its kind: what the choice of pieces needs to know of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.errors import BadFile
from chinese_llama.vocab.bytelevel import ByteLevelBase, Encode
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.proto import (
    CONTROL,
    NORMAL,
    add_pieces,
    encoder,
    first_free_score,
    read_base,
    read_model,
    tokenizer_model,
)
from chinese_llama.vocab.scripts import is_chinese


class Base(Protocol):
    """`size`: ids of the base, new pieces get the ids from there on; `names`: what its ids are called,
    control tokens too; `known`: texts that are pieces."""

    file: Path
    size: int
    names: set[str]
    known: set[str]

    def encode_with(self, pieces: Sequence[str], as_text: bool = False) -> Encode:
        """An encoder (texts -> ids) of the base with `pieces` added, in order of rank below all that it
        has. Without the dummy prefix, unless `as_text`."""

    def spell(self, words: Iterable[str]) -> dict[str, list[str]]:
        """The base's pieces of those words that do not fall into single characters."""

    def text(self, index: int) -> str:
        """The piece of the base with that id."""

    def write(self, directory: Path, pieces: Sequence[str], pad_token: str | None) -> None:
        """Write the tokenizer with `pieces` and the pad token added into `directory`."""


def open_base(path: Path) -> Base:
    """The base at `path` (a directory or a file). Raises BadFile for one that cannot be extended."""
    path = Path(path)
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise BadFile(
            path, "has neither tokenizer.model (SentencePiece BPE) nor tokenizer.json (byte-level BPE)."
        )
    fast = path if path.name.endswith(".json") else path / "tokenizer.json"
    if fast.is_file() and not (path / "tokenizer.model").is_file():
        return ByteLevelBase(fast)
    base = SentencePieceBase(read_base(path), tokenizer_model(path))
    _check_added(base)
    return base


def _check_added(base: SentencePieceBase) -> None:
    """Refuse a base whose Hugging Face files have tokens that tokenizer.model lacks, as chat models'
    often do: the new pieces would take their ids."""
    directory = base.file.parent
    found: dict[str, int] = {}
    for name, read in (
        ("tokenizer.json", lambda c: {token["content"]: token["id"] for token in c["added_tokens"]}),
        ("added_tokens.json", dict),
        (
            "tokenizer_config.json",
            lambda c: {t["content"]: int(i) for i, t in c["added_tokens_decoder"].items()},
        ),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found |= read(json.loads((directory / name).read_text(encoding="utf-8")))
    for token, index in sorted(found.items(), key=lambda item: item[1]):
        if index >= base.size:
            raise BadFile(
                directory,
                f"has the token {token!r} (id {index}) that tokenizer.model lacks; new pieces would take its "
                "id: extend the base that it was made from.",
            )


def before_extension(path: Path, size: int) -> Encode:
    """The encoder (without the dummy prefix) of an extended tokenizer as it was before the ids from
    `size` on were added."""
    path = Path(path)
    if path.is_dir() and not (path / "tokenizer.model").is_file():
        return ByteLevelBase(path / "tokenizer.json", size).encode_with(())
    model = read_model(tokenizer_model(path))
    del model.pieces[size:]
    return encoder(model, dummy_prefix=False).encode


class SentencePieceBase:
    """A SentencePiece-BPE model with byte fallback, as LLaMA 1 and 2 have it."""

    def __init__(self, model: model_pb2.ModelProto, file: Path) -> None:
        self.file = file
        self.model = model
        self.size = len(self.model.pieces)
        self.score = first_free_score(model)
        self.names = {piece.piece for piece in self.model.pieces}
        self.known = {piece.piece for piece in self.model.pieces if piece.type == NORMAL}

    def encode_with(self, pieces: Sequence[str], as_text: bool = False) -> Encode:
        return encoder(add_pieces(self.model, pieces, self.score), dummy_prefix=as_text).encode

    def spell(self, words: Iterable[str]) -> dict[str, list[str]]:
        longer = (p.piece for p in self.model.pieces if p.type == NORMAL and len(p.piece) > 1)
        if not any(map(is_chinese, longer)):
            return {}
        words = list(words)
        # characters that the base has no piece for are added to it here, so that they stay whole
        missing = sorted({c for word in words for c in word} - self.names)
        processor = encoder(add_pieces(self.model, missing, self.score), dummy_prefix=False)
        spelt = zip(words, processor.encode(words, out_type=str), strict=True)
        return {word: parts for word, parts in spelt if len(parts) < len(word)}

    def text(self, index: int) -> str:
        return self.model.pieces[index].piece

    def write(self, directory: Path, pieces: Sequence[str], pad_token: str | None) -> None:
        model = add_pieces(self.model, pieces, self.score)
        if pad_token is not None:
            model.pieces.add(piece=pad_token, score=0.0, type=CONTROL)
        write_tokenizer(directory, model, pad_token)
