"""extend-vocab with a corpus: which pieces are kept, what the report says, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import BadFile, OutputExists, UserError
from chinese_llama.vocab import corpus as corpus_module
from chinese_llama.vocab import merge
from chinese_llama.vocab.merge import extend_vocab
from chinese_llama.vocab.proto import read_model
from chinese_llama.vocab.readers import open_readers
from chinese_llama.vocab.report import PAGE, PICTURE, REPORT, summary
from chinese_llama.vocab.scripts import is_chinese
from chinese_llama.vocab.select import Selection
from tests import tiny
from tests.vocab.test_merge import left, work_file


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
