"""The clauses of a corpus: which there are, and how they are counted when they are too many."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.errors import BadFile, UserError
from chinese_llama.vocab.corpus import HELD_OUT, LONGEST, MEASURED, clauses, read_corpus
from chinese_llama.vocab.scripts import CHINESE, SHARED
from tests import tiny

TEXT = st.text(f"中国の𠮷ㄅ，。！《》{SHARED}a1 é\n▁２\u3000😀", max_size=60)


def lines(path: Path, documents: list[str]) -> Path:
    path.write_text("\n".join(documents) + "\n", encoding="utf-8")
    return path


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_clauses_are_the_chinese_characters_in_order_with_shared_marks_beside_them(text: str) -> None:
    found = list(clauses(text))
    joined = "".join(found)
    chinese = [character for character in text if CHINESE.match(character)]
    assert [character for character in joined if character not in SHARED] == chinese
    assert all(CHINESE.search(clause) for clause in found)
    at = 0
    for clause in found:
        at = text.index(clause, at) + len(clause)  # each is a run of the text, after the one before


@settings(max_examples=50, deadline=None)
@given(times=st.integers(1, 700), unit=st.sampled_from(["中", "天地玄黄", "，", "。”"]))
def test_a_long_clause_is_cut_and_nothing_of_it_is_lost(times: int, unit: str) -> None:
    found = list(clauses(unit * times))
    assert "".join(found) == unit * times
    assert all(len(clause) == LONGEST for clause in found[:-1])
    assert 0 < len(found[-1]) <= LONGEST


def test_a_cut_leaves_no_clause_without_a_chinese_character() -> None:
    assert all(CHINESE.search(clause) for clause in clauses("。" + "…" * 2 * LONGEST + "。"))


@pytest.mark.parametrize("text", ["", "the 2023 price", "“Well,” she said—…", "한국어 １２ ＡＢ", "▁ \n😀"])
def test_text_without_chinese_has_no_clauses(text: str) -> None:
    assert list(clauses(text)) == []


def test_every_clause_of_a_small_corpus_is_counted(work: Path, tmp_path: Path) -> None:
    english = tiny.write_texts(tmp_path / "en.jsonl", tiny.ENGLISH)
    corpus = read_corpus([work / "zh.jsonl", english], held_out=0)
    assert corpus.counts == Counter(clause for text in tiny.CHINESE for clause in clauses(text))
    assert (corpus.documents, corpus.every, corpus.held_out) == (200, 1, [])


def test_one_document_in_fifty_is_kept_apart_over_all_files(tmp_path: Path) -> None:
    documents = [f"第{'一二三四五六七八九十'[n % 10] * (1 + n // 10)}篇" for n in range(130)]
    files = [lines(tmp_path / "a.txt", documents[:70]), lines(tmp_path / "b.txt", documents[70:])]
    corpus = read_corpus(files)
    assert HELD_OUT == 50
    assert corpus.held_out == [documents[49], documents[99]]
    assert corpus.documents == 130
    wanted = [document for n, document in enumerate(documents, 1) if n % 50]
    assert corpus.counts == Counter(clause for document in wanted for clause in clauses(document))


def test_what_is_kept_apart_is_bounded(tmp_path: Path) -> None:
    document = "中国，" * (MEASURED // 5)
    corpus = read_corpus([lines(tmp_path / "a.txt", [document] * 9)], held_out=2)
    assert len(corpus.held_out) == 2
    assert sum(corpus.counts.values()) == 5 * len(list(clauses(document)))


def of_one_length(count: int) -> list[str]:
    """Different clauses of four characters, in an order that says nothing of them."""
    words = ["".join(letters) for letters in product("天地玄黄宇宙洪荒日月", repeat=4)][:count]
    random.Random(1).shuffle(words)
    return words


def of_many_lengths(count: int) -> list[str]:
    numbers = (f"{number:b}".replace("0", "天").replace("1", "地") for number in range(1, count + 1))
    words = list(numbers)
    random.Random(2).shuffle(words)
    return words


@pytest.mark.parametrize("most", [2000, 1000, 500])
@pytest.mark.parametrize("words", [of_one_length(8000), of_many_lengths(8000)], ids=["one", "many"])
def test_halved_counts_stand_for_the_whole_corpus(tmp_path: Path, words: list[str], most: int) -> None:
    """Each clause comes once: whether it stays must be even, each time that counts are halved."""
    corpus = read_corpus([lines(tmp_path / "a.txt", words)], most, held_out=0)
    assert corpus.every >= 8000 / most
    assert len(corpus.counts) <= most
    assert sum(corpus.counts.values()) * corpus.every == pytest.approx(8000, rel=0.2)


def test_frequent_clauses_keep_their_share(tmp_path: Path) -> None:
    """Rare ones make the counts be halved; what is frequent is counted nearly as often as it is."""
    rare = of_one_length(6000)
    documents = [f"{word}，{'中国' if n % 3 else '人民'}" for n, word in enumerate(rare)]
    random.Random(3).shuffle(documents)
    corpus = read_corpus([lines(tmp_path / "a.txt", documents)], 1500, held_out=0)
    counted = {"中国": 0, "人民": 0}
    for clause, count in corpus.counts.items():
        for word in counted:
            counted[word] += count if clause.lstrip("，") == word else 0
    assert corpus.every >= 4
    assert counted["中国"] * corpus.every == pytest.approx(4000, rel=0.1)
    assert counted["人民"] * corpus.every == pytest.approx(2000, rel=0.15)


@pytest.mark.parametrize("most", [1, 10, 100, 1000])
def test_memory_is_bounded_and_the_same_files_give_the_same_counts(tmp_path: Path, most: int) -> None:
    words = of_many_lengths(3000)
    for size in (1, 7):  # a document may hold several clauses
        documents = [",".join(words[start : start + size]) for start in range(0, 3000, size)]
        file = lines(tmp_path / f"{size}.txt", documents)
        try:
            corpus = read_corpus([file], most)
        except UserError as error:  # of one clause, nothing may be left
            assert most == 1 and "Chinese" in str(error)
            continue
        assert len(corpus.counts) <= most
        assert corpus == read_corpus([file], most)


def test_a_large_corpus_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_corpus([lines(tmp_path / "small.txt", ["中国"])])
    assert "holds only 2 Chinese characters" in capsys.readouterr().err
    read_corpus([lines(tmp_path / "enough.txt", ["中国"] * 60_000)])
    assert capsys.readouterr().err == ""
    corpus = read_corpus([lines(tmp_path / "large.txt", of_one_length(100))], 50)
    assert f"pieces are chosen on one document in {corpus.every}." in capsys.readouterr().err


def test_a_file_of_one_very_long_line_is_counted(tmp_path: Path) -> None:
    line = "中国的首都是北京，长江 and more text 123 " * 50_000
    assert len(line.encode()) > 2_000_000
    corpus = read_corpus([lines(tmp_path / "long.txt", [line])])
    assert corpus.documents == 1
    assert corpus.counts == Counter(dict.fromkeys(clauses("中国的首都是北京，长江"), 50_000))


def test_a_long_line_without_any_break_is_counted(tmp_path: Path) -> None:
    corpus = read_corpus([lines(tmp_path / "long.txt", ["天地玄黄" * 175_000])])
    assert corpus.counts == {"天地玄黄" * (LONGEST // 4): 700_000 // LONGEST}


def test_a_corpus_without_chinese_is_refused(work: Path) -> None:
    with pytest.raises(UserError, match=r"--corpus .*en\.jsonl: holds no Chinese characters; give text"):
        read_corpus([work / "en.jsonl"])


def test_a_corpus_that_cannot_be_read_is_named(work: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"gone\.txt: no such file"):
        read_corpus([work / "zh.jsonl", tmp_path / "gone.txt"])


def test_instructions_and_conversations_are_text_too(work: Path) -> None:
    corpus = read_corpus([work / "ins.jsonl"], held_out=0)
    assert corpus.counts["北京"] == corpus.counts["大"] == 8


def test_a_sample_does_not_follow_the_order_of_the_corpus(tmp_path: Path) -> None:
    """Every second line English: a sample of every second document must not be all of one kind."""
    mixed = [text for clause in of_one_length(4000) for text in (clause, "the sea")]
    corpus = read_corpus([lines(tmp_path / "mixed.txt", mixed)], 500)
    assert corpus.every >= 4
    last = set(of_one_length(4000)[2000:])
    assert sum(clause in last for clause in corpus.counts) > 50
