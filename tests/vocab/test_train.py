"""Training the Chinese pieces: what is in them, and what is said of a corpus that will not do."""

from __future__ import annotations

from pathlib import Path

import pytest

from chinese_llama.artifacts import read_manifest
from chinese_llama.directories import MANIFEST
from chinese_llama.errors import BadFile, OutputExists, UserError
from chinese_llama.vocab.corpus import LONGEST, clauses
from chinese_llama.vocab.proto import NORMAL, encoder, read_model
from chinese_llama.vocab.scripts import SHARED, is_chinese
from chinese_llama.vocab.train import MODEL, train_vocab
from tests import tiny


def pieces(directory: Path) -> list[str]:
    model = read_model(directory / MODEL)
    return [piece.piece for piece in model.pieces if piece.type == NORMAL]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_pieces_hold_chinese_only(work: Path, tmp_path: Path, model_type: str) -> None:
    """Spaces, digits and Latin letters of the corpus never reach the trainer; of marks that English has
    too, those beside a Chinese character do."""
    mixed = tiny.write_texts(tmp_path / "mixed.jsonl", [f"Hello {text} 2023 年 GDP" for text in tiny.CHINESE])
    manifest = train_vocab([mixed, work / "en.jsonl"], tmp_path / "out", 100, model_type)
    found = pieces(tmp_path / "out")
    assert found
    assert all(is_chinese(character) or character in SHARED for character in "".join(found))
    assert all(is_chinese(piece) for piece in found if not set(piece) <= set(SHARED))
    assert {"，", "。", "！"} <= set(found), "full-width punctuation is not normalised away"
    assert manifest.vocab_size == len(read_model(tmp_path / "out" / MODEL).pieces) <= 100


def test_frequent_words_become_pieces(chinese_sp: Path) -> None:
    assert {"中国", "北京", "越来越", "图书馆在"} <= set(pieces(chinese_sp.parent)), (
        "在 always follows 图书馆"
    )
    assert encoder(read_model(chinese_sp)).encode("图书馆在", out_type=str) == ["图书馆在"]


def test_the_manifest_says_what_was_read(work: Path, chinese_sp: Path) -> None:
    manifest = read_manifest(chinese_sp.parent)
    assert manifest is not None
    assert (manifest.kind, manifest.command) == ("sentencepiece", "train-vocab")
    assert manifest.settings == {"vocab_size": 160, "model_type": "bpe"}
    assert manifest.metrics["characters"] == sum(len(c) for text in tiny.CHINESE for c in clauses(text))
    assert manifest.inputs["corpus:0"]["path"] == str(work / "zh.jsonl")


def test_the_same_corpus_gives_the_same_bytes(work: Path, chinese_sp: Path, tmp_path: Path) -> None:
    train_vocab([work / "zh.jsonl"], tmp_path / "out", vocab_size=160)
    assert (tmp_path / "out" / MODEL).read_bytes() == chinese_sp.read_bytes()


def test_a_small_corpus_gives_fewer_pieces(work: Path, tmp_path: Path) -> None:
    manifest = train_vocab([work / "zh.jsonl"], tmp_path / "out", vocab_size=20_000)
    assert manifest.vocab_size is not None
    assert 100 < manifest.vocab_size < 1000


def test_a_mark_and_what_follows_it_may_be_one_piece_with_marks_that_english_has_too(
    chinese_sp: Path,
) -> None:
    found = pieces(chinese_sp.parent)
    assert any("”" in piece and is_chinese(piece) for piece in found)


def test_records_of_any_kind_are_read(work: Path, tmp_path: Path) -> None:
    """A vocabulary looks at characters only: an instruction and its answer will do."""
    manifest = train_vocab([work / "ins.jsonl"], tmp_path / "out", 40)
    assert manifest.metrics["characters"] == 8 * len("中国的首都是哪里？北京。写出反义词。大小。")
    assert set("首都反义词") <= set("".join(pieces(tmp_path / "out")))


def test_a_long_run_without_punctuation_is_not_lost(tmp_path: Path) -> None:
    """SentencePiece drops long "sentences" without a word."""
    corpus = tiny.write_texts(tmp_path / "long.jsonl", ["天地玄黄" * LONGEST])
    manifest = train_vocab([corpus], tmp_path / "out", 30)
    assert manifest.metrics["characters"] == 4 * LONGEST
    assert set("天地玄黄") <= set(pieces(tmp_path / "out"))


def test_a_corpus_without_chinese_is_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no Chinese characters; give one that does"):
        train_vocab([work / "en.jsonl"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "word"}, "--model-type 'word': known are bpe and unigram"),
        ({"vocab_size": 3}, "--vocab-size 3: give 16 to 1,000,000 pieces"),
        ({"vocab_size": 2_000_000_000}, "give 16 to 1,000,000 pieces"),
        ({"vocab_size": -1}, "--vocab-size -1"),
    ],
)
def test_options_that_cannot_be(
    work: Path, tmp_path: Path, options: dict[str, int | str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_vocab([work / "zh.jsonl"], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_too_few_pieces_for_the_characters_asks_for_more(work: Path, tmp_path: Path) -> None:
    """Every character needs a piece: here a larger --vocab-size helps, a smaller one does not."""
    with pytest.raises(UserError, match=r"--vocab-size 16\b.*(larger|at least)"):
        train_vocab([work / "zh.jsonl"], tmp_path / "out", 16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"text": "中国的首都"}\n{"text": \n', r"bad\.jsonl, line 2: is not valid JSON"),
        ("bad.jsonl", '{"content": 3}\n', r"bad\.jsonl, line 1: has no field with text \(found: content\)"),
        ("bad.jsonl", '{"text": 3}\n', r"bad\.jsonl, line 1: the field 'text' is not text"),
        ("empty.txt", "", r"empty\.txt: holds no text"),
        ("table.csv", "中国", r"table\.csv: unknown format"),
    ],
)
def test_a_corpus_that_cannot_be_read_says_where(
    work: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    """Also when the trainer has begun on a good file before."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    for corpus in ([tmp_path / name], [work / "zh.jsonl", tmp_path / name]):
        with pytest.raises(BadFile, match=message):
            train_vocab(corpus, tmp_path / "out", 100)
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"gone\.jsonl: no such file"):
        train_vocab([tmp_path / "gone.jsonl"], tmp_path / "out")


def test_an_output_that_stands_is_kept_or_refused(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_vocab([work / "zh.jsonl"], out, 100)
    written = (out / MANIFEST).stat().st_mtime_ns
    with pytest.raises(OutputExists, match="out exists; --force replaces it"):
        train_vocab([work / "zh.jsonl"], out, 100)
    train_vocab([work / "zh.jsonl"], out, 100, keep=True)
    with pytest.raises(OutputExists, match="with vocab_size 100, and 120 is asked for"):
        train_vocab([work / "zh.jsonl"], out, 120, keep=True)
    assert (out / MANIFEST).stat().st_mtime_ns == written
    assert train_vocab([work / "zh.jsonl"], out, 120, force=True).vocab_size == 120


def test_a_changed_corpus_is_noticed_in_a_file_and_in_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    file = tiny.write_texts(folder / "zh.jsonl", tiny.CHINESE)
    train_vocab([file], tmp_path / "of_file", 100)
    train_vocab([folder], tmp_path / "of_folder", 100)
    tiny.write_texts(file, tiny.CHINESE * 2)
    for corpus, out in ((file, "of_file"), (folder, "of_folder")):
        with pytest.raises(OutputExists, match="from another corpus:0 than"):
            train_vocab([corpus], tmp_path / out, 100, keep=True)
