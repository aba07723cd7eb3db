"""The figures of texts, against the same counted one character at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.vocab.bytelevel import BYTE_OF
from chinese_llama.vocab.measure import SCRIPTS, Lengths, figures, script_of
from chinese_llama.vocab.proto import BYTE, SPACE, UNUSED, add_pieces
from chinese_llama.vocab.readers import Reader, fast_reader, sp_reader
from chinese_llama.vocab.scripts import LETTERS, MARKS
from tests import tiny

PIECES = ["中国", "北京", "。”", "，但", "中", "国", "首都", "。", "，", "𠮷", "の"]
PARTS = st.one_of(
    st.text("中国北京首都但。，”“—…𠮷龘豈のｱ", max_size=10),
    st.text(st.characters(codec="ascii"), max_size=10),
    st.text("😀👨‍👩‍👧❤️é\u0301한ﬁ×²①", max_size=6),
    st.text("１２ＡＢ！，。　", max_size=6),
    st.text(" \t\n\r", max_size=8),
    st.text(max_size=6),
    st.sampled_from(["the", "In 2023", "<s>", "", "\0", "\xa0", "\x7f\x80", "\u07ff\u0800", "\uffff"]),
)
PLAIN = st.lists(PARTS, max_size=5).map(lambda parts: "".join(parts).replace(SPACE, ""))
TEXTS = st.lists(PLAIN, min_size=1, max_size=6)


@cache
def model() -> model_pb2.ModelProto:
    return add_pieces(tiny.base_tokenizer(), PIECES)


@cache
def extended() -> Reader:
    return sp_reader(model())


@cache
def base() -> Reader:
    return sp_reader(tiny.base_tokenizer())


def script(character: str) -> str:
    """The name of the script that a character belongs to."""
    code = ord(character)
    for name, ranges in (("Han and kana", LETTERS), ("Chinese marks", MARKS)):
        if any(low <= code <= high for low, high in ranges):
            return name
    if not character.isascii():
        return "other"
    if character.isalpha():
        return "Latin letters"
    if character == " ":
        return "spaces"
    return "digits" if character.isdigit() else "other ASCII"


def spelt(piece: model_pb2.ModelProto.SentencePiece) -> bytes:
    if piece.type == BYTE:
        return bytes([int(piece.piece[3:5], 16)])
    return piece.piece.replace(SPACE, " ").encode()


def counted(tokens: Sequence[bytes], text: str, prefix: str) -> tuple[Counter[str], int] | None:
    """Tokens by the script of their first character (of the second, behind a space), and those that touch
    a non-ASCII one; None where they do not spell the text behind the prefix."""
    if b"".join(tokens) != (prefix + text).encode():
        return None
    owner = [character for character in prefix + text for _ in character.encode()]
    by_script: Counter[str] = Counter()
    non_ascii = at = 0
    for token in tokens:
        own = owner[max(at, len(prefix)) : at + len(token)]
        at += len(token)
        if own:
            by_script[script(own[own[0] == " " and len(own) > 1])] += 1
            non_ascii += any(not character.isascii() for character in own)
    return by_script, non_ascii


def measured(texts: list[str], **readers: Reader) -> Lengths:
    """`texts` counted in two batches by each of the readers."""
    lengths = Lengths()
    for batch in (texts[:2], texts[2:]):
        if batch:
            lengths.add(batch, {name: (r.encode(batch), r.lengths, r.prefix) for name, r in readers.items()})
    return lengths


def named(counts: numpy.ndarray) -> Counter[str]:
    return +Counter(dict(zip(SCRIPTS, counts.tolist(), strict=True)))


@settings(max_examples=300, deadline=None)
@given(texts=TEXTS)
@example(texts=[""])
@example(texts=["", " ", "  ", "中", "\t"])
@example(texts=["京", "a京b", "京" * 40, "😀a"])
def test_the_sums_are_those_counted_by_hand(texts: list[str]) -> None:
    lengths = measured(texts, new=extended())
    tokens = lengths.tokens["new"]
    by_script: Counter[str] = Counter()
    non_ascii = 0
    for text, ids in zip(texts, extended().encode(texts), strict=True):
        found = counted([spelt(model().pieces[index]) for index in ids], text, " ")
        if found:
            by_script += found[0]
            non_ascii += found[1]
        else:
            assert text == "", "SentencePiece puts nothing before an empty text"
    assert named(tokens.by_script) == by_script
    assert tokens.non_ascii == non_ascii
    ids = [index for text in extended().encode(texts) for index in text]
    assert tokens.total == len(ids)
    assert tokens.used.tolist() == [Counter(ids)[index] for index in range(len(model().pieces))]
    characters = [character for text in texts for character in text]
    assert named(lengths.by_script) == Counter(map(script, characters))
    assert lengths.characters == len(characters)
    assert lengths.bytes == len("".join(texts).encode())
    assert lengths.non_ascii == sum(not character.isascii() for character in characters)
    assert lengths.documents == len(texts)


@settings(max_examples=100, deadline=None)
@given(texts=TEXTS, seen=st.text("▁ a中", min_size=1, max_size=5), at=st.integers(0, 6))
def test_a_document_with_a_literal_space_mark_counts_in_the_total_only(
    texts: list[str], seen: str, at: int
) -> None:
    """Its tokens do not spell it: which of them is which character's cannot be told. So its characters
    are not counted by script either, and characters per token stay what they are."""
    marked = f"{seen}{SPACE}b"
    with_it, without = (
        measured(batch, new=extended(), base=base()) for batch in ([*texts[:at], marked, *texts[at:]], texts)
    )
    for name, reader in (("new", extended()), ("base", base())):
        one, two = with_it.tokens[name], without.tokens[name]
        [ids] = reader.encode([marked])
        assert one.total == two.total + len(ids)
        assert one.used.sum() == one.total
        assert one.by_script.tolist() == two.by_script.tolist()
        assert one.non_ascii == two.non_ascii
    assert with_it.bytes == without.bytes + len(marked.encode())
    assert with_it.characters == without.characters + len(marked)
    assert with_it.by_script.tolist() == without.by_script.tolist()
    assert with_it.non_ascii == without.non_ascii
    assert with_it.documents == without.documents + 1


def test_a_text_that_one_tokenizer_does_not_spell_counts_by_script_for_none() -> None:
    """Else the two could not be compared. A unigram model without byte fallback cannot spell 龘."""
    without_bytes = model_pb2.ModelProto()
    without_bytes.CopyFrom(model())
    for piece in without_bytes.pieces:
        piece.type = UNUSED if piece.type == BYTE else piece.type
    without_bytes.trainer_spec.byte_fallback = False
    texts = ["中国", "龘中", "the"]
    both = measured(texts, new=extended(), other=sp_reader(without_bytes))
    alone = measured(["中国", "the"], new=extended())
    assert both.tokens["new"].by_script.tolist() == alone.tokens["new"].by_script.tolist()
    assert both.by_script.tolist() == alone.by_script.tolist()
    assert (both.characters, both.documents) == (7, 3)
    assert both.tokens["new"].total == sum(map(len, extended().encode(texts)))


@settings(max_examples=50, deadline=None)
@given(texts=TEXTS)
def test_tokenizers_are_counted_side_by_side_and_in_any_batches(texts: list[str]) -> None:
    both = measured(texts, new=extended(), base=base())
    for name, reader in (("new", extended()), ("base", base())):
        alone = Lengths()
        alone.add(texts, {name: (reader.encode(texts), reader.lengths, reader.prefix)})
        for key, value in vars(alone.tokens[name]).items():
            assert numpy.array_equal(value, getattr(both.tokens[name], key)), key
    assert figures(both)["new_tokens"] <= figures(both)["base_tokens"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    directory = tiny.write_byte_level(tmp_path_factory.mktemp("bytes"), tiny.byte_level())
    return fast_reader(directory / "tokenizer.json")


@settings(max_examples=100, deadline=None)
@given(texts=TEXTS)
def test_byte_level_tokens_are_counted_by_hand_too(byte_level: Reader, texts: list[str]) -> None:
    tokens = measured(texts, new=byte_level).tokens["new"]
    by_script: Counter[str] = Counter()
    non_ascii = 0
    for text, ids in zip(texts, byte_level.encode(texts), strict=True):
        found = counted([bytes(BYTE_OF[c] for c in byte_level.pieces[i]) for i in ids], text, "")
        assert found is not None
        by_script += found[0]
        non_ascii += found[1]
    assert named(tokens.by_script) == by_script
    assert tokens.non_ascii == non_ascii


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=50))
def test_the_script_of_any_character(text: str) -> None:
    code = numpy.array([ord(character) for character in text], dtype=numpy.uint32)
    assert [SCRIPTS[index] for index in script_of(code)] == [script(character) for character in text]


def test_the_script_of_every_bound() -> None:
    bounds = {bound + step for pair in (*LETTERS, *MARKS) for bound in pair for step in (-1, 0, 1)}
    text = "".join(map(chr, sorted(bounds | set(range(0x180)) | {0x10FFFF})))
    code = numpy.array([ord(character) for character in text])
    assert [SCRIPTS[index] for index in script_of(code)] == [script(character) for character in text]


@pytest.mark.parametrize(
    ("text", "by_script", "non_ascii"),
    [
        ("中国", {"Han and kana": 1}, 1),
        ("京", {"Han and kana": 3}, 3),
        ("北京。”", {"Han and kana": 1, "Chinese marks": 1}, 2),
        ("”。", {"other": 3, "Chinese marks": 1}, 4),
        ("2023", {"digits": 4}, 0),
        ("sea the 1 ", {"Latin letters": 2, "digits": 1, "spaces": 2}, 0),
        ("\t,中", {"other ASCII": 2, "Han and kana": 1}, 1),
        ("é😀", {"other": 6}, 6),
        ("　１", {"other": 6}, 6),
        ("", {}, 0),
    ],
)
def test_a_token_counts_for_its_first_character_behind_a_space(
    text: str, by_script: dict[str, int], non_ascii: int
) -> None:
    tokens = measured([text], new=extended()).tokens["new"]
    assert named(tokens.by_script) == Counter(by_script)
    assert tokens.non_ascii == non_ascii


def test_figures_are_the_sums_and_their_ratios() -> None:
    texts = ["中国北京", "the 2023", "京"]
    lengths = Lengths()
    readers = {"": extended(), "base": base()}
    lengths.add(texts, {name: (r.encode(texts), r.lengths, r.prefix) for name, r in readers.items()})
    told = figures(lengths)
    tokens, before = (sum(map(len, reader.encode(texts))) for reader in readers.values())
    wanted: dict[str, Any] = {
        "documents": 3,
        "characters": 13,
        "bytes": 23,
        "tokens": tokens,
        "characters_per_token": 13 / tokens,
        "bytes_per_token": 23 / tokens,
        "non_ascii_per_token": 5 / 5,
        "base_tokens": before,
        "base_characters_per_token": 13 / before,
        "base_bytes_per_token": 23 / before,
        "base_non_ascii_per_token": 5 / 15,
    }
    assert {key: told[key] for key in wanted} == wanted
    assert told["scripts"]["Han and kana"] == {"characters": 5, "tokens": 5, "base_tokens": 15}
    assert told["scripts"]["digits"] == {"characters": 4, "tokens": 4, "base_tokens": 4}
    assert set(told) == {*wanted, "scripts"}
    assert list(told["scripts"]) == [name for name in SCRIPTS if name in told["scripts"]]
    assert "other" not in told["scripts"]


def test_nothing_counted_divides_nothing() -> None:
    lengths = Lengths()
    lengths.add([""], {"": (extended().encode([""]), extended().lengths, extended().prefix)})
    told = figures(lengths)
    assert (told["tokens"], told["characters_per_token"], told["scripts"]) == (0, 0.0, {})
    assert figures(Lengths())["documents"] == 0


def test_real_documents_are_counted_by_hand(data: Path) -> None:
    """What holds of made-up texts holds of real ones with the real tokenizer."""
    from itertools import islice

    from chinese_llama.data.formats import documents
    from chinese_llama.vocab.proto import read_base

    llama = read_base(data / "tokenizers" / "llama")
    reader = sp_reader(llama)
    texts = [text[:500] for text in islice(documents(data / "zh_pretrain.jsonl.gz"), 30)]
    tokens = measured(texts, new=reader).tokens["new"]
    by_script: Counter[str] = Counter()
    for text, ids in zip(texts, reader.encode(texts), strict=True):
        found = counted([spelt(llama.pieces[index]) for index in ids], text, " ")
        by_script += found[0] if found else Counter()
    assert named(tokens.by_script) == by_script
