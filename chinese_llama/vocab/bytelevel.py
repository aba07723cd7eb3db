"""A base whose tokenizer.json is byte-level BPE (Llama-3, Qwen): the same choice of pieces, the same
contract.

Bytes, not characters, are what merges start from, and a merge names its two parts. New merges come
after all of the base's, one for each way in which a new piece falls into two known ones; so a text is
first joined as by the base, and new merges only join further. A merge whose result is whole
characters, at least one of them Chinese, cannot fire in a text without Chinese.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from chinese_llama.directories import write_text
from chinese_llama.errors import BadFile, UserError

TEMPLATE = "chat_template.jinja"
BETWEEN_DOCUMENTS = "<|endoftext|>"  # Qwen's, which names no bos: it begins a document here, too
Encode = Callable[[Sequence[str]], list[list[int]]]


def _byte_characters() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table): printable
    Latin-1 for itself, the others moved to U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


CHARACTER = _byte_characters()
BYTE_OF = {character: byte for byte, character in CHARACTER.items()}


def to_bytes(text: str) -> str:
    """`text` as a byte-level vocabulary writes it."""
    return "".join(CHARACTER[byte] for byte in text.encode())


def piece_bytes(piece: str) -> bytes | None:
    """The bytes of a byte-level piece, None if it is not written in that alphabet."""
    try:
        return bytes(BYTE_OF[character] for character in piece)
    except KeyError:
        return None


def to_text(piece: str) -> str | None:
    """The text of a byte-level piece, None if it is no whole characters."""
    try:
        spelt = piece_bytes(piece)
        return None if spelt is None else spelt.decode()
    except UnicodeDecodeError:
        return None


def by_merges(content: dict[str, Any]) -> Encode:
    """An encoder of a tokenizer.json that makes every piece by merges, inside a word as well: Llama-3's
    looks a whole word up first, so that a piece that no merges make could pass for one that is made."""
    model = content["model"]
    shell = {**content, "added_tokens": [], "model": {**model, "vocab": {}, "merges": []}}
    reader = tokenizers.Tokenizer.from_str(json.dumps(shell))
    reader.model = models.BPE(model["vocab"], model["merges"])  # much faster than by way of JSON

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in reader.encode_batch_fast(list(texts), add_special_tokens=False)]

    return encode


class ByteLevelBase:
    """tokenizer.json with a byte-level BPE model; with `size`, without the ids from there on. New ids
    follow the highest id that the base has, its control tokens included."""

    def __init__(self, file: Path, size: int | None = None) -> None:
        self.file = file
        self.json = read_json(file)
        try:
            self._read(size)
        except Exception as error:  # the file may hold anything, and the library raises bare Exception
            raise BadFile(file, f"is not a tokenizer that loads ({error}).") from error

    def _read(self, size: int | None) -> None:
        merges = self.json["model"]["merges"]
        pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
        self.json["model"]["merges"] = pairs
        if size is not None:
            self.json = _without(self.json, size)
        vocab: dict[str, int] = self.json["model"]["vocab"]
        added = _ids(self.json.get("added_tokens") or [])
        self.size = max([*vocab.values(), *added.values()]) + 1
        self.names = {*vocab, *added}
        self.known = {text for piece in vocab if (text := to_text(piece)) is not None}
        self._alone = by_merges(self.json)
        self._texts = {index: piece for piece, index in {**vocab, **added}.items()}

    def encode_with(self, pieces: Sequence[str], as_text: bool = False) -> Encode:
        if pieces:
            return by_merges(self._extended(pieces))
        return self._alone

    def _extended(self, pieces: Sequence[str]) -> dict[str, Any]:
        """The content of tokenizer.json with `pieces` added."""
        model = self.json["model"]
        spelt = [to_bytes(piece) for piece in pieces]
        # control tokens too: the library gives those that the model does not know ids after all others
        vocab = {**model["vocab"], **_ids(self.json.get("added_tokens") or [])}
        vocab |= {piece: self.size + index for index, piece in enumerate(spelt)}
        merges = list(model["merges"])
        by_rank = sorted(pieces, key=lambda piece: len(piece) > 1)  # a word is joined from characters
        for piece in map(to_bytes, by_rank):
            for cut in range(1, len(piece)):
                if piece[:cut] in vocab and piece[cut:] in vocab:
                    merges.append((piece[:cut], piece[cut:]))
        return {**self.json, "model": {**model, "vocab": vocab, "merges": merges}}

    def spell(self, words: Iterable[str]) -> dict[str, list[str]]:
        words = list(words)
        spelt = zip(words, self.encode_with(())(words), strict=True)
        parts = ((word, _whole(self._texts[index] for index in ids)) for word, ids in spelt)
        return {word: found for word, found in parts if len(found) < len(word) and "".join(found) == word}

    def text(self, index: int) -> str:
        piece = self._texts[index]
        return to_text(piece) or piece

    def write(self, directory: Path, pieces: Sequence[str], pad_token: str | None) -> None:
        content = self._extended(pieces)
        config = _config(self.file.parent)
        if pad_token is not None:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            token = {"id": self.size + len(pieces), "content": pad_token, **flags, "special": True}
            content["added_tokens"] = [*(content.get("added_tokens") or []), token]
            content["model"]["vocab"][pad_token] = token["id"]
        pad_token = pad_token or config.get("pad_token") or config.get("unk_token")
        if pad_token is None:
            raise UserError(f"{self.file.parent} names no pad token; add one with --pad-token '<|pad|>'.")
        if not config.get("bos_token") and BETWEEN_DOCUMENTS in self.names:
            config["bos_token"] = BETWEEN_DOCUMENTS
        for role in ("bos_token", "eos_token"):
            if config.get(role) not in self.names:
                what = f"tokenizer_config.json names no {role} that tokenizer.json has; add it there."
                raise UserError(f"{self.file.parent}: {what}")
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad_token,
            # a base with a chat template goes on reading the control tokens that the template writes
            "split_special_tokens": not _has_template(self.file.parent, config),
            "clean_up_tokenization_spaces": False,
        }
        if (self.file.parent / TEMPLATE).is_file():
            shutil.copyfile(self.file.parent / TEMPLATE, directory / TEMPLATE)
        for name, value in (("tokenizer.json", content), ("tokenizer_config.json", config)):
            write_text(directory / name, json.dumps(value, ensure_ascii=False) + "\n")


def _without(content: dict[str, Any], size: int) -> dict[str, Any]:
    """The content of tokenizer.json without the ids from `size` on and what merges to them."""
    model = content["model"]
    vocab = {piece: index for piece, index in model["vocab"].items() if index < size}
    merges = [pair for pair in model["merges"] if all(piece in vocab for piece in (*pair, "".join(pair)))]
    added = [token for token in (content.get("added_tokens") or []) if token["id"] < size]
    return {**content, "added_tokens": added, "model": {**model, "vocab": vocab, "merges": merges}}


def _ids(added_tokens: list[dict[str, Any]]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in added_tokens}


def _has_template(directory: Path, config: dict[str, Any]) -> bool:
    return bool(config.get("chat_template")) or (directory / TEMPLATE).is_file()


def _whole(pieces: Iterable[str]) -> list[str]:
    """Pieces of the base as texts; those that end inside a character are joined with what follows."""
    parts, rest = [], ""
    for piece in pieces:
        rest += piece
        if (text := to_text(rest)) is not None:
            parts.append(text)
            rest = ""
    return parts


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model, steps = content["model"], json.dumps(content["pre_tokenizer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFile(file, f"is not a tokenizer ({error}).") from error
    if not isinstance(model, dict) or model.get("type") != "BPE" or "ByteLevel" not in steps:
        what = "is neither SentencePiece BPE (tokenizer.model) nor byte-level BPE; it cannot be extended."
        raise BadFile(file, what)
    if '"add_prefix_space": true' in steps:
        raise BadFile(file, "puts a space before every text, so no Chinese piece would begin one.")
    return content


def _config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json of the base, tokens as plain texts."""
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadFile(directory / "tokenizer_config.json", f"is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise BadFile(directory / "tokenizer_config.json", "does not hold a table of settings.")
    for name, value in config.items():
        if name.endswith("_token") and isinstance(value, dict):
            config[name] = value.get("content")
    return {name: value for name, value in config.items() if name not in ("added_tokens_decoder", "auto_map")}
