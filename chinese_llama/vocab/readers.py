"""Tokenizers as they are read: tokenizer.model by SentencePiece, tokenizer.json by the tokenizers
library, which is what `AutoTokenizer` uses. Literal control tokens in a text are text to both."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.errors import BadFile
from chinese_llama.vocab.bytelevel import piece_bytes
from chinese_llama.vocab.proto import BYTE, NORMAL, SPACE, encoder, read_model, tokenizer_model

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


@dataclass
class Reader:
    """`pieces`: id -> how it is written; `lengths`: id -> bytes of text; `normal`: ids of ordinary
    pieces; `prefix`: bytes that are put before a text; `texts`: what ids of ordinary pieces spell;
    `plain`: encodes without putting anything before a text."""

    pieces: list[str]
    lengths: numpy.ndarray
    normal: list[int]
    prefix: int
    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[list[int]]], list[str]]
    texts: Callable[[list[int]], list[str]]
    plain: Callable[[list[str]], list[list[int]]]


def open_readers(path: Path) -> tuple[Reader, Reader | None]:
    """The readers of a tokenizer (a directory or a file): SentencePiece's and, where tokenizer.json lies
    beside it, the tokenizers library's; that one alone where there is no tokenizer.model."""
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    if path.name.endswith(".json") or (path.is_dir() and not (path / "tokenizer.model").is_file()):
        return fast_reader(path if path.is_file() else path / "tokenizer.json"), None
    model = read_model(tokenizer_model(path))
    other = directory / "tokenizer.json"
    reader = sp_reader(model)
    return reader, fast_reader(other, reader) if other.is_file() else None


def sp_reader(model: model_pb2.ModelProto) -> Reader:
    processor = encoder(model)

    def spelt(ids: list[int]) -> list[str]:
        return [model.pieces[index].piece.replace(SPACE, " ") for index in ids]

    def plain(texts: list[str]) -> list[list[int]]:
        return encoder(model, dummy_prefix=False).encode(texts)

    return Reader(
        [piece.piece for piece in model.pieces],
        _sp_lengths(model),
        [index for index, piece in enumerate(model.pieces) if piece.type == NORMAL],
        _prefix(model),
        processor.encode,
        processor.decode,
        spelt,
        plain,
    )


def _sp_lengths(model: model_pb2.ModelProto) -> numpy.ndarray:
    def length(piece: model_pb2.ModelProto.SentencePiece) -> int:
        if piece.type in (NORMAL, BYTE):
            return 1 if piece.type == BYTE else len(piece.piece.replace(SPACE, " ").encode())
        return 0

    return numpy.array([length(piece) for piece in model.pieces])


def _prefix(model: model_pb2.ModelProto) -> int:
    return int(model.normalizer_spec.add_dummy_prefix)


def load_json(file: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, reading literal control tokens as text. Raises BadFile if it is none."""
    if not file.is_file():
        raise BadFile(file.parent, "has neither tokenizer.model nor tokenizer.json.")
    try:
        reader = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise BadFile(file, f"is not a tokenizer ({error}).") from error
    reader.encode_special_tokens = True
    return reader


def fast_reader(file: Path, same: Reader | None = None) -> Reader:
    """A reader of tokenizer.json; `same` reads the SentencePiece form of the same tokenizer, if any."""
    reader = load_json(file)

    def encode(texts: list[str]) -> list[list[int]]:
        return [one.ids for one in reader.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(ids: list[list[int]]) -> list[str]:
        return reader.decode_batch(ids, skip_special_tokens=False)

    if same is not None:
        return replace(same, encode=encode, decode=decode)
    special = reader.get_added_tokens_decoder()
    size = max([*reader.get_vocab(with_added_tokens=True).values()], default=-1) + 1
    pieces = [reader.id_to_token(index) or "" for index in range(size)]
    content = json.loads(file.read_text(encoding="utf-8"))
    spelling, prefix = _spelling(content)
    known = {i: spelling(p) for i, p in enumerate(pieces) if p and i not in special}
    lengths: Any = numpy.zeros(size, dtype=int)
    lengths[list(known)] = [0 if spelt is None else len(spelt) for spelt in known.values()]
    whole = [index for index, spelt in known.items() if spelt is not None and _decoded(spelt) is not None]

    def texts(ids: list[int]) -> list[str]:
        return [known[index].decode() for index in ids]  # type: ignore[union-attr]

    def plain(texts: list[str]) -> list[list[int]]:
        bare = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(content)))
        bare.encode_special_tokens = True
        return [one.ids for one in bare.encode_batch_fast(texts, add_special_tokens=False)]

    return Reader(pieces, lengths, whole, prefix, encode, decode, texts, plain)


def _spelling(content: dict[str, Any]) -> tuple[Callable[[str], bytes | None], int]:
    """How pieces of a tokenizer.json spell bytes (None: they do not, as in WordPiece), and how many bytes
    it puts before a text."""
    steps = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    if '"ByteLevel"' in steps:
        spaced = '"add_prefix_space": true' in steps
        return piece_bytes, int(spaced)
    if '"Metaspace"' in steps or SPACE in str(content.get("normalizer")):
        spaced = '"Prepend"' in steps or '"prepend_scheme": "always"' in steps or '"first"' in steps
        return _marked_bytes, int(spaced)
    return lambda piece: None, 0


def _marked_bytes(piece: str) -> bytes:
    """The bytes of a piece that writes spaces as ▁ and bytes as <0x41>."""
    if BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _decoded(spelt: bytes) -> str | None:
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return None


def _without_prefix(content: Any) -> Any:
    """tokenizer.json without what puts a space before a text."""
    if isinstance(content, list):
        return [_without_prefix(item) for item in content]
    if not isinstance(content, dict):
        return content
    if content.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    changed = {"prepend_scheme": "never", "add_prefix_space": False}
    skip = ("vocab", "merges", "added_tokens")
    return {
        key: changed.get(key, value if key in skip else _without_prefix(value))
        for key, value in content.items()
    }
