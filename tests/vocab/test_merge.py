"""extend-vocab: what is written, the published files to the byte, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from chinese_llama.artifacts import read_manifest, sha256_file
from chinese_llama.directories import MANIFEST
from chinese_llama.errors import BadFile, OutputExists, UserError
from chinese_llama.vocab.audit import dead_pieces
from chinese_llama.vocab.merge import REPORT, append_missing, extend_vocab
from chinese_llama.vocab.proto import CONTROL, read_base, read_model
from chinese_llama.vocab.scripts import is_chinese

CHINESE_LLAMA = "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
CHINESE_ALPACA = "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8"


def left(folder: Path) -> list[str]:
    """Everything below `folder`, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_strict_appends_chinese_pieces_only(base: Path, tokenizer: Path) -> None:
    old, new = read_base(base), read_model(tokenizer / "tokenizer.model")
    size = len(old.pieces)
    assert list(new.pieces[:size]) == list(old.pieces)
    assert len(new.pieces) > size
    assert all(is_chinese(piece.piece) for piece in new.pieces[size:])
    assert dead_pieces(new, size) == []
    assert new.trainer_spec == old.trainer_spec
    assert new.normalizer_spec == old.normalizer_spec


def test_the_directory_is_complete_and_says_what_it_was_made_from(
    base: Path, chinese_sp: Path, tokenizer: Path
) -> None:
    names = {path.name for path in tokenizer.iterdir()}
    assert names == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", REPORT, MANIFEST}
    manifest = read_manifest(tokenizer)
    report = json.loads((tokenizer / REPORT).read_text(encoding="utf-8"))
    assert manifest is not None
    assert manifest.kind == "tokenizer"
    assert manifest.inputs["base"]["sha256"] == sha256_file(base / "tokenizer.model")
    assert manifest.inputs["chinese_sp"]["sha256"] == sha256_file(chinese_sp)
    assert manifest.settings == {"policy": "strict", "pad_token": None}
    size = len(read_model(tokenizer / "tokenizer.model").pieces)
    assert manifest.vocab_size == report["vocab_size"] == size
    assert report["new_pieces"] == size - report["base_vocab_size"] == manifest.metrics["new_pieces"]
    assert report["checks"]["broken"] == []


def test_the_base_may_be_a_file_and_the_bytes_are_the_same_every_time(
    base: Path, chinese_sp: Path, tokenizer: Path, tmp_path: Path
) -> None:
    extend_vocab(base / "tokenizer.model", chinese_sp, tmp_path / "again")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer / name).read_bytes()


@pytest.mark.parametrize("policy", ["strict", "reference"])
def test_a_pad_token_is_the_last_piece(base: Path, chinese_sp: Path, tmp_path: Path, policy: str) -> None:
    report = extend_vocab(base, chinese_sp, tmp_path / "out", policy=policy, pad_token="[PAD]")
    last = read_model(tmp_path / "out" / "tokenizer.model").pieces[-1]
    assert (last.piece, last.score) == ("[PAD]", 0.0)
    assert (last.type == CONTROL) == (policy == "strict")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["pad_token"] == "[PAD]"
    assert report["vocab_size"] == report["base_vocab_size"] + report["new_pieces"]


def test_reference_appends_every_missing_piece_in_file_order(base: Path, chinese_sp: Path) -> None:
    old, chinese = read_base(base), read_model(chinese_sp)
    model = append_missing(old, chinese)
    known = {piece.piece for piece in old.pieces}
    wanted = [piece.piece for piece in chinese.pieces if piece.piece not in known]
    new = model.pieces[len(old.pieces) :]
    assert [piece.piece for piece in new] == wanted
    assert all(piece.score == 0 and not piece.HasField("type") for piece in new)


@pytest.mark.parametrize(
    ("pad_token", "size", "digest"), [(None, 49_953, CHINESE_LLAMA), ("[PAD]", 49_954, CHINESE_ALPACA)]
)
def test_the_published_tokenizers_to_the_byte(
    data: Path, tmp_path: Path, pad_token: str | None, size: int, digest: str
) -> None:
    folder = data / "tokenizers"
    report = extend_vocab(
        folder / "llama", folder / "chinese_sp.model", tmp_path / "out", "reference", pad_token
    )
    written = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert hashlib.sha256(written).hexdigest() == digest
    assert report["vocab_size"] == len(read_model(tmp_path / "out" / "tokenizer.model").pieces) == size
    dead = [piece for piece in report["checks"]["dead"] if piece != "[PAD]"]
    assert len(dead) == 345, "the report says what the published vocabulary wastes"
    assert "越来越" in dead


def test_the_real_tokenizer_under_the_strict_policy(data: Path, tmp_path: Path) -> None:
    folder = data / "tokenizers"
    report = extend_vocab(folder / "llama", folder / "chinese_sp.model", tmp_path / "out")
    old, new = read_base(folder / "llama"), read_model(tmp_path / "out" / "tokenizer.model")
    assert report["new_pieces"] > 17_000
    assert list(new.pieces[:32_000]) == list(old.pieces)
    assert dead_pieces(new, 32_000) == []
    pieces = {piece.piece for piece in new.pieces}
    assert {"越来越", "国务院", "中华人民共和国"} <= pieces
    assert not {"10", "2023"} & pieces


@pytest.mark.parametrize(
    ("pad_token", "message"),
    [
        ("", r"--pad-token is empty; give a text such as '\[PAD\]'"),
        ("  ", "--pad-token is empty"),
        ("</s>", r"--pad-token '</s>' is a special piece already \(id 2\)"),
        ("a", r"--pad-token 'a' is a piece already \(id \d+\)"),
        ("中", r"--pad-token '中' is a piece already \(id \d+\)"),
    ],
)
def test_pad_tokens_that_cannot_be(
    base: Path, chinese_sp: Path, tmp_path: Path, pad_token: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        extend_vocab(base, chinese_sp, tmp_path / "out", pad_token=pad_token)
    assert left(tmp_path) == []


def test_what_cannot_be_extended_is_refused_and_leaves_nothing(
    base: Path, chinese_sp: Path, tokenizer: Path, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(UserError, match="--policy 'lax': known are strict, reference"):
        extend_vocab(base, chinese_sp, out, policy="lax")
    with pytest.raises(BadFile, match=r"zh\.jsonl: is not a SentencePiece model"):
        extend_vocab(base, work / "zh.jsonl", out)
    with pytest.raises(BadFile, match="gone: no such file"):
        extend_vocab(tmp_path / "gone", chinese_sp, out)
    with pytest.raises(BadFile, match="gone: cannot be read"):
        extend_vocab(base, tmp_path / "gone", out)
    with pytest.raises(UserError, match=r"adds no piece to .*: is that tokenizer already extended"):
        extend_vocab(tokenizer, chinese_sp, out)
    assert left(tmp_path) == []


def test_an_output_that_stands_is_kept_or_refused(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = extend_vocab(base, chinese_sp, out)
    created = (out / MANIFEST).stat().st_mtime_ns
    with pytest.raises(OutputExists, match="out exists; --force replaces it"):
        extend_vocab(base, chinese_sp, out)
    assert extend_vocab(base, chinese_sp, out, keep=True) == first
    with pytest.raises(OutputExists, match=r"with pad_token .*: chinese-llama extend-vocab --force"):
        extend_vocab(base, chinese_sp, out, pad_token="[PAD]", keep=True)
    assert (out / MANIFEST).stat().st_mtime_ns == created
    forced = extend_vocab(base, chinese_sp, out, pad_token="[PAD]", force=True)
    assert forced["vocab_size"] == first["vocab_size"] + 1
    assert left(tmp_path) == sorted(["out", *(f"out/{path.name}" for path in out.iterdir())])
