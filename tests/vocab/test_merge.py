"""extend-vocab: what is written, the published files to the byte, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.artifacts import read_manifest, sha256_file
from chinese_llama.directories import MANIFEST
from chinese_llama.errors import BadFile, OutputExists, UserError
from chinese_llama.vocab import corpus as corpus_module
from chinese_llama.vocab import merge
from chinese_llama.vocab.audit import dead_pieces
from chinese_llama.vocab.merge import append_missing, extend_vocab
from chinese_llama.vocab.proto import CONTROL, NORMAL, USER_DEFINED, read_base, read_chinese, read_model
from chinese_llama.vocab.readers import open_readers
from chinese_llama.vocab.report import PAGE, PICTURE, REPORT, summary
from chinese_llama.vocab.scripts import is_chinese
from chinese_llama.vocab.select import Selection
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


def test_a_corpus_that_cannot_be_used_leaves_nothing(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(UserError, match=r"en\.jsonl: holds no Chinese characters"):
        extend_vocab(base, chinese_sp, out, corpus=[work / "en.jsonl"])
    with pytest.raises(BadFile, match=r"gone\.jsonl: no such file"):
        extend_vocab(base, chinese_sp, out, corpus=[work / "zh.jsonl", tmp_path / "gone.jsonl"])
    assert left(tmp_path) == []


def test_a_probe_that_cannot_be_read_leaves_nothing(base: Path, chinese_sp: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"gone\.txt: no such file"):
        extend_vocab(base, chinese_sp, tmp_path / "out", probe=tmp_path / "gone.txt")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["中", "20"], "text without Chinese is tokenised differently than by the base"),
        (["”", "。”", "。"], "text without Chinese is tokenised differently than by the base"),
    ],
)
def test_a_strict_tokenizer_that_changes_english_is_not_written(
    base: Path,
    chinese_sp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pieces: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(merge, "select", lambda *_: Selection(pieces))
    with pytest.raises(UserError, match=f"The extended tokenizer breaks its contract: {message}"):
        extend_vocab(base, chinese_sp, tmp_path / "out")
    assert left(tmp_path) == []


def test_a_probe_file_is_part_of_the_contract(
    base: Path, chinese_sp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built-in texts do not hold every pair of characters; the user's may."""
    monkeypatch.setattr(merge, "select", lambda *_: Selection(["qz", "中"]))
    extend_vocab(base, chinese_sp, tmp_path / "out")
    probe = tiny.write_texts(tmp_path / "probe.jsonl", ["fine", "the aqz sea"])
    with pytest.raises(UserError, match=r"breaks its contract: .* 'the aqz sea'\."):
        extend_vocab(base, chinese_sp, tmp_path / "other", probe=probe)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("pad_token", [None, "[PAD]"])
@pytest.mark.parametrize("with_corpus", [False, True])
def test_the_size_is_kept_with_the_pad_token_in_it(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path, pad_token: str | None, with_corpus: bool
) -> None:
    corpus = [work / "zh.jsonl"] if with_corpus else []
    out = tmp_path / "out"
    report = extend_vocab(base, chinese_sp, out, pad_token=pad_token, corpus=corpus, size=450)
    assert report["vocab_size"] == len(read_model(out / "tokenizer.model").pieces) == 450
    assert report["checks"]["broken"] == []


def test_the_size_may_leave_room_for_one_piece(base: Path, chinese_sp: Path, tmp_path: Path) -> None:
    report = extend_vocab(base, chinese_sp, tmp_path / "out", pad_token="[PAD]", size=422)
    [piece, pad] = read_model(tmp_path / "out" / "tokenizer.model").pieces[420:]
    assert (is_chinese(piece.piece), pad.piece, report["vocab_size"]) == (True, "[PAD]", 422)


def test_a_size_that_is_not_reached_takes_all_there_is(
    base: Path, chinese_sp: Path, tokenizer: Path, tmp_path: Path
) -> None:
    extend_vocab(base, chinese_sp, tmp_path / "out", size=100_000)
    name = "tokenizer.model"
    assert (tmp_path / "out" / name).read_bytes() == (tokenizer / name).read_bytes()


def test_a_smaller_vocabulary_keeps_the_pieces_that_save_most(
    base: Path, chinese_sp: Path, tokenizer: Path, tmp_path: Path
) -> None:
    extend_vocab(base, chinese_sp, tmp_path / "out", size=480)
    small, large = (open_readers(place)[0] for place in (tmp_path / "out", tokenizer))
    assert set(small.pieces) < set(large.pieces)
    lengths = [sum(map(len, reader.encode(tiny.CHINESE))) for reader in (large, small)]
    assert lengths[0] < lengths[1] < sum(map(len, open_readers(base)[0].encode(tiny.CHINESE)))


@pytest.fixture(scope="module")
def learnt(
    base: Path, chinese_sp: Path, work: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A tokenizer learnt from a corpus of two files, and its report."""
    out = tmp_path_factory.mktemp("learnt") / "out"
    files = [work / "zh.jsonl", work / "ins.jsonl"]
    return out, extend_vocab(base, chinese_sp, out, corpus=files, size=520, min_count=2, pad_token="[PAD]")


def test_the_report_of_a_corpus_says_what_was_read(learnt: tuple[Path, dict[str, Any]], work: Path) -> None:
    out, report = learnt
    assert report["corpus"] == {
        "files": [str(work / "zh.jsonl"), str(work / "ins.jsonl")],
        "documents": 116,
        "clauses": report["corpus"]["clauses"],
        "one_document_in": 1,
    }
    assert report["corpus"]["clauses"] > 10
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.settings == {"policy": "strict", "pad_token": "[PAD]", "size": 520, "min_count": 2}
    assert [manifest.inputs[f"corpus:{number}"]["path"] for number in (0, 1)] == report["corpus"]["files"]
    assert report == json.loads((out / REPORT).read_text(encoding="utf-8"))


def test_documents_kept_apart_are_measured(learnt: tuple[Path, dict[str, Any]], base: Path) -> None:
    out, report = learnt
    texts = [tiny.CHINESE[49], tiny.CHINESE[99]]
    figures = report["held_out"]
    assert figures["documents"] == 2
    assert figures["tokens"] == sum(map(len, open_readers(out)[0].encode(texts)))
    assert figures["base_tokens"] == sum(map(len, open_readers(base)[0].encode(texts)))
    assert (figures["changed"], figures["longer"], figures["disagreements"]) == (0, 0, 0)
    assert figures["characters_per_token"] > 1.5 * figures["base_characters_per_token"]


def test_the_curve_goes_from_the_base_to_all_pieces_and_hardly_falls(
    learnt: tuple[Path, dict[str, Any]], tokenizer: Path
) -> None:
    standard = json.loads((tokenizer / REPORT).read_text(encoding="utf-8"))
    for report, pad, on in ((learnt[1], 1, "documents kept apart"), (standard, 0, "the probe texts")):
        sizes = [point["size"] for point in report["curve"]]
        lengths = [point["characters_per_token"] for point in report["curve"]]
        assert (sizes[0], sizes[-1]) == (420, report["vocab_size"] - pad)
        assert sizes == sorted(set(sizes))
        assert all(later > 0.95 * length for length, later in pairwise(lengths))
        assert lengths[-1] > lengths[0]
        assert report["curve_on"].startswith(on)


def test_a_small_corpus_keeps_nothing_apart_and_is_measured_on_the_probes(
    base: Path, chinese_sp: Path, tmp_path: Path
) -> None:
    from chinese_llama.vocab import report as told

    corpus = tiny.write_texts(tmp_path / "small.jsonl", tiny.CHINESE[:5])
    report = extend_vocab(base, chinese_sp, tmp_path / "out", corpus=[corpus], size=500)
    assert report["curve_on"] == "the probe texts"
    assert report["corpus"]["documents"] == 5
    assert "5 documents" in (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "500 pieces" in told.summary(report)


def test_min_count_leaves_out_what_the_corpus_hardly_uses(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path
) -> None:
    corpus = tiny.write_texts(tmp_path / "zh.jsonl", [*tiny.CHINESE, "罕见罕见的词"])
    sizes = [
        extend_vocab(base, chinese_sp, tmp_path / str(n), corpus=[corpus], size=560, min_count=n)[
            "vocab_size"
        ]
        for n in (0, 30)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    few = open_readers(tmp_path / "30")[0].pieces
    assert "图书馆在" in few or "图书馆" in few
    assert not [piece for piece in few if "罕" in piece]


def test_a_large_corpus_says_which_part_of_it_was_counted(
    base: Path, chinese_sp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [a + b + c for a in "天地玄黄宇宙" for b in "天地玄黄宇宙" for c in "天地玄黄宇宙"]
    corpus = tiny.write_texts(tmp_path / "zh.jsonl", words)
    monkeypatch.setattr(merge, "read_corpus", lambda files: corpus_module.read_corpus(files, most=60))
    report = extend_vocab(base, chinese_sp, tmp_path / "out", corpus=[corpus])
    assert report["corpus"]["one_document_in"] >= 4
    assert report["corpus"]["clauses"] <= 60


@pytest.mark.parametrize("chosen", ["learnt", "standard", "reference"])
def test_the_page_and_the_picture_are_written(
    base: Path,
    chinese_sp: Path,
    tokenizer: Path,
    learnt: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    chosen: str,
) -> None:
    places: dict[str, Callable[[], Path]] = {
        "learnt": lambda: learnt[0],
        "standard": lambda: tokenizer,
        "reference": lambda: tmp_path / "out",
    }
    if chosen == "reference":
        extend_vocab(base, chinese_sp, tmp_path / "out", policy="reference")
    place = places[chosen]()
    assert (place / PICTURE).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (place / PAGE).read_text(encoding="utf-8")
    assert page.startswith("# Vocabulary report\n")
    assert f"({PICTURE})" in page
    assert "hidden size 32" in page or "| 32 | 64 |" in page, "the base's own"


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


def test_the_same_corpus_gives_the_same_bytes(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        extend_vocab(base, chinese_sp, tmp_path / name, corpus=[work / "zh.jsonl"], size=480)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", REPORT, PAGE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_changed_corpus_or_setting_is_noticed(base: Path, chinese_sp: Path, tmp_path: Path) -> None:
    corpus = work_file(tmp_path)
    first = extend_vocab(base, chinese_sp, tmp_path / "out", corpus=[corpus], size=480)
    again = extend_vocab(base, chinese_sp, tmp_path / "out", corpus=[corpus], size=480, keep=True)
    assert again == first
    with pytest.raises(OutputExists, match="with size 480, and 470 is asked for"):
        extend_vocab(base, chinese_sp, tmp_path / "out", corpus=[corpus], size=470, keep=True)
    with pytest.raises(OutputExists, match=r"from a corpus:0 .* too"):
        extend_vocab(base, chinese_sp, tmp_path / "out", size=480, keep=True)
    tiny.write_texts(corpus, tiny.CHINESE * 2)
    with pytest.raises(OutputExists, match="from another corpus:0 than"):
        extend_vocab(base, chinese_sp, tmp_path / "out", corpus=[corpus], size=480, keep=True)


def test_chinese_models_that_come_along_have_names(base: Path, tmp_path: Path) -> None:
    told = extend_vocab(base, Path("8k"), tmp_path / "out", size=800)
    assert told["chinese_sp"].endswith("chinese_8k.model")
    (tmp_path / "8k").mkdir()
    assert merge.chinese_model(tmp_path / "8k") == tmp_path / "8k" / "chinese_sp.model"


def test_the_reference_is_merged_from_a_model_that_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--policy reference needs --chinese-sp"):
        extend_vocab(base, None, tmp_path / "out", policy="reference")


def test_fewer_pieces_than_the_size_allows_are_told(base: Path, chinese_sp: Path, tmp_path: Path) -> None:
    told = extend_vocab(base, chinese_sp, tmp_path / "out", size=90_000)
    assert "Fewer than the 90,000 that --size allows" in summary(told)


def test_a_result_that_was_not_probed_on_a_text_is_not_kept_for_it(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path
) -> None:
    extend_vocab(base, chinese_sp, tmp_path / "out", keep=True)
    with pytest.raises(OutputExists, match="from another probe than"):
        extend_vocab(base, chinese_sp, tmp_path / "out", probe=work / "en.jsonl", keep=True)


def test_sizes_beyond_all_use_and_files_given_twice_are_refused(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path
) -> None:
    zh = work / "zh.jsonl"
    with pytest.raises(UserError, match="give at most 1,000,000"):
        extend_vocab(base, chinese_sp, tmp_path / "out", corpus=[zh], size=10**11)
    with pytest.raises(UserError, match="a file is given twice"):
        extend_vocab(base, chinese_sp, tmp_path / "out", corpus=[zh, zh])
    assert not (tmp_path / "out").exists()
