"""extend-vocab: what is written, the published files to the byte, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.artifacts import read_manifest, sha256_file
from chinese_llama.directories import MANIFEST
from chinese_llama.errors import BadFile, OutputExists, UserError
from chinese_llama.vocab import merge
from chinese_llama.vocab.audit import dead_pieces
from chinese_llama.vocab.merge import append_missing, extend_vocab
from chinese_llama.vocab.proto import CONTROL, NORMAL, USER_DEFINED, read_base, read_chinese, read_model
from chinese_llama.vocab.readers import open_readers
from chinese_llama.vocab.report import PAGE, PICTURE, REPORT
from chinese_llama.vocab.scripts import is_chinese
from tests import tiny

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
    assert dead_pieces(open_readers(tokenizer)[0], size) == []
    assert new.trainer_spec == old.trainer_spec
    assert new.normalizer_spec == old.normalizer_spec


def test_the_directory_is_complete_and_says_what_it_was_made_from(
    base: Path, chinese_sp: Path, tokenizer: Path
) -> None:
    names = {path.name for path in tokenizer.iterdir()}
    files = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert names == files | {REPORT, PAGE, PICTURE, MANIFEST}
    manifest = read_manifest(tokenizer)
    report = json.loads((tokenizer / REPORT).read_text(encoding="utf-8"))
    assert manifest is not None
    assert manifest.kind == "tokenizer"
    assert manifest.inputs["base"]["sha256"] == sha256_file(base / "tokenizer.model")
    assert manifest.inputs["chinese_sp"]["sha256"] == sha256_file(chinese_sp)
    assert manifest.settings == {"policy": "strict", "pad_token": None, "size": None, "min_count": 0}
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
    assert dead_pieces(open_readers(tmp_path / "out")[0], 32_000) == []
    pieces = {piece.piece for piece in new.pieces}
    assert {"越来越", "国务院", "中华人民共和国"} <= pieces
    assert not {"10", "2023"} & pieces


@pytest.mark.parametrize(
    ("pad_token", "message"),
    [
        ("", r"--pad-token is empty; give a text such as '\[PAD\]'"),
        ("  ", "--pad-token is empty"),
        ("</s>", r"--pad-token '</s>' is a piece of .*tokenizer\.model already; give another"),
        ("a", r"--pad-token 'a' is a piece of .*tokenizer\.model already; give another"),
        ("<0x41>", r"--pad-token '<0x41>' is a piece of .*tokenizer\.model already; give another"),
        ("中", r"--pad-token '中' is a piece of the Chinese model \(id \d+\)"),
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
    with pytest.raises(
        BadFile, match=r"is extended already \(by extend-vocab\); extend .*base/tok.* instead"
    ):
        extend_vocab(tokenizer, chinese_sp, out)
    with pytest.raises(BadFile, match=r"has neither tokenizer|has no tokenizer\.model"):
        extend_vocab(tmp_path, chinese_sp, out)
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


def test_a_tokenizer_that_was_extended_elsewhere_has_nothing_new(
    chinese_sp: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Without its manifest it is a base like others."""
    shutil.copy(tokenizer / "tokenizer.model", tmp_path / "own.model")
    with pytest.raises(UserError, match=r"Nothing .*own\.model"):
        extend_vocab(tmp_path / "own.model", chinese_sp, tmp_path / "out")
    with pytest.raises(UserError, match=r"Nothing .*own\.model"):
        extend_vocab(tmp_path / "own.model", chinese_sp, tmp_path / "out", pad_token="[PAD]")
    assert left(tmp_path) == ["own.model"]


def test_an_extended_model_is_no_base(extended: Path, chinese_sp: Path, tmp_path: Path) -> None:
    for place in (extended, extended / "tokenizer.model"):
        with pytest.raises(BadFile, match=r"is extended already \(by extend-model\); extend .*base instead"):
            extend_vocab(place, chinese_sp, tmp_path / "out")


def test_a_pad_token_of_the_chinese_model_is_refused_whatever_its_kind(base: Path, tmp_path: Path) -> None:
    model = tiny.chinese_model(["中", "国"])
    for piece, kind in (("[PAD]", CONTROL), ("<sep>", USER_DEFINED)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    path = tiny.write_model(tmp_path / "zh.model", model)
    for pad_token, index in (("[PAD]", 2), ("<sep>", 3)):
        with pytest.raises(UserError, match=rf"is a special piece of the Chinese model \(id {index}\)"):
            extend_vocab(base, path, tmp_path / "out", pad_token=pad_token)
    extend_vocab(base, path, tmp_path / "out", pad_token="<pad>")


@pytest.mark.parametrize(
    ("chinese", "pad_token"),
    [(["▁中", "国", "▁中国"], "中"), (["中国", "国"], "中")],
    ids=["written with a space mark", "added as what a piece needs"],
)
def test_a_pad_token_that_becomes_a_piece_is_refused_too(
    base: Path, tmp_path: Path, chinese: list[str], pad_token: str
) -> None:
    path = tiny.write_model(tmp_path / "zh.model", tiny.chinese_model(chinese))
    with pytest.raises(UserError, match="--pad-token '中' is a piece"):
        extend_vocab(base, path, tmp_path / "out", pad_token=pad_token)
    assert left(tmp_path) == ["zh.model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy": "reference", "corpus": True},
            "--policy reference takes every piece: no --corpus, --size",
        ),
        ({"policy": "reference", "size": 500}, "--policy reference takes every piece"),
        ({"policy": "reference", "corpus": True, "min_count": 2}, "--policy reference takes every piece"),
        ({"size": 419}, r"--size 419: .*tokenizer\.model has 420 pieces already; give a larger size"),
        ({"size": 420}, "--size 420: "),
        ({"size": 0}, "--size 0: "),
        ({"size": -1}, "--size -1: "),
        ({"size": 421, "pad_token": "[PAD]"}, "--size 421: "),
        ({"corpus": True, "min_count": -1}, "--min-count -1: give 0 or more"),
        ({"min_count": -1}, "--min-count -1: give 0 or more"),
        ({"min_count": 1}, "--min-count counts pieces in a corpus; give one with --corpus"),
    ],
)
def test_options_that_cannot_be(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if options.get("corpus"):
        options = {**options, "corpus": [work / "zh.jsonl"]}
    with pytest.raises(UserError, match=message):
        extend_vocab(base, chinese_sp, tmp_path / "out", **options)
    assert left(tmp_path) == []


def test_bases_and_chinese_models_that_cannot_be(base: Path, chinese_sp: Path, tmp_path: Path) -> None:
    """A text file, a unigram base, Chinese models with an empty piece and with one twice."""
    text = tmp_path / "text.model"
    text.write_text("中国的首都是北京。", encoding="utf-8")
    unigram = read_base(base)
    unigram.trainer_spec.model_type = 1
    bad = {
        "unigram.model": unigram,
        "empty.model": tiny.chinese_model(["中", "", "国"]),
        "twice.model": tiny.chinese_model(["中", "国", "中"]),
    }
    paths = {name: tiny.write_model(tmp_path / name, model) for name, model in bad.items()}
    for arguments, message in (
        ((text, chinese_sp), r"text\.model: is not a SentencePiece model"),
        ((base, text), r"text\.model: is not a SentencePiece model"),
        ((paths["unigram.model"], chinese_sp), r"unigram\.model: is not a BPE model"),
        ((paths["empty.model"], chinese_sp), r"empty\.model: has an empty piece \(id 1\)"),
        ((paths["twice.model"], chinese_sp), r"twice\.model: has the piece '中' twice \(ids 0 and 2\)"),
        ((base, paths["empty.model"]), r"empty\.model: has an empty piece \(id 1\)"),
        ((base, paths["twice.model"]), r"twice\.model: has the piece '中' twice \(ids 0 and 2\)"),
    ):
        with pytest.raises(BadFile, match=message):
            extend_vocab(*arguments, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_control_and_user_defined_pieces_of_the_chinese_model_do_not_enter(
    base: Path, work: Path, tmp_path: Path
) -> None:
    model = tiny.chinese_model(["中", "国", "中国"])
    for piece, kind in (("<s>", CONTROL), ("京", CONTROL), ("北京", USER_DEFINED), ("<sep>", USER_DEFINED)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    path = tiny.write_model(tmp_path / "zh.model", model)
    report = extend_vocab(base, path, tmp_path / "out")
    new = [piece.piece for piece in read_model(tmp_path / "out" / "tokenizer.model").pieces[420:]]
    assert new == ["中国", "中", "国"]
    assert set(report["dropped"]) == {"北京", "<sep>"}
    assert all(reason.startswith("user-defined") for reason in report["dropped"].values())


def test_an_output_that_is_there_is_refused_before_anything_is_read(
    base: Path, chinese_sp: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputExists, match="out exists; --force replaces it"):
        extend_vocab(base, chinese_sp, tmp_path / "out", corpus=[work_file(tmp_path)])
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def work_file(folder: Path) -> Path:
    return tiny.write_texts(folder / "zh.jsonl", tiny.CHINESE)


def test_without_a_chinese_model_the_shipped_pieces_are_taken(base: Path, tmp_path: Path) -> None:
    from chinese_llama.resources import shipped

    own = shipped("vocab") / f"chinese_{merge.SHIPPED[0]}.model"
    chinese = read_chinese(own)
    assert sum(piece.type == NORMAL for piece in chinese.pieces) > 15_000
    report = extend_vocab(base, None, tmp_path / "out", size=1500)
    assert report["chinese_sp"] == str(own)
    assert report["vocab_size"] == 1500
    pieces = set(open_readers(tmp_path / "out")[0].pieces)
    assert {"的", "中国", "我们", "可以", "，"} <= pieces


def test_chinese_models_that_come_along_have_names(base: Path, tmp_path: Path) -> None:
    told = extend_vocab(base, Path("8k"), tmp_path / "out", size=800)
    assert told["chinese_sp"].endswith("chinese_8k.model")
    (tmp_path / "8k").mkdir()
    assert merge.chinese_model(tmp_path / "8k") == tmp_path / "8k" / "chinese_sp.model"


def test_the_reference_is_merged_from_a_model_that_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--policy reference needs --chinese-sp"):
        extend_vocab(base, None, tmp_path / "out", policy="reference")
