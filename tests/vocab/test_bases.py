"""What can be extended, and what the choice of pieces asks of it: alike for both kinds of base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.errors import BadFile
from chinese_llama.vocab.bases import Base, SentencePieceBase, before_extension, open_base
from chinese_llama.vocab.bytelevel import ByteLevelBase
from chinese_llama.vocab.merge import extend_vocab
from chinese_llama.vocab.proto import CONTROL, add_pieces, encoder, read_base, read_model
from chinese_llama.vocab.readers import open_readers
from chinese_llama.vocab.select import select
from tests import tiny

TEXTS = [
    *tiny.ENGLISH[:5],
    *tiny.CHINESE[:5],
    "",
    " ",
    "a中 b",
    "😀é",
    "<s> <|end|>",
    "图书馆在学校，学校在图书馆",
]


@pytest.fixture(scope="module")
def byte_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_byte_level(tmp_path_factory.mktemp("base"), tiny.byte_level(vocab_size=600))


@pytest.fixture(params=["SentencePiece", "byte level"])
def directory(request: pytest.FixtureRequest, base: Path, byte_base: Path) -> Path:
    return base if request.param == "SentencePiece" else byte_base


@pytest.fixture
def opened(directory: Path) -> Base:
    return open_base(directory)


@pytest.fixture
def pieces(opened: Base) -> list[str]:
    """Pieces that are new to the base, and that it can make."""
    found = select(opened, tiny.chinese_model(["图书馆", "在学校", "馆在", "越来越多"])).pieces
    assert {"图书馆", "在学校", "越来越多"} <= set(found)
    return found


def test_a_directory_or_a_file_is_opened_as_what_it_is(base: Path, byte_base: Path) -> None:
    for place in (base, base / "tokenizer.model"):
        opened = open_base(place)
        assert isinstance(opened, SentencePieceBase)
        assert opened.file == base / "tokenizer.model"
    for place in (byte_base, byte_base / "tokenizer.json"):
        other = open_base(place)
        assert isinstance(other, ByteLevelBase)
        assert other.file == byte_base / "tokenizer.json"


def test_the_size_and_the_names_are_those_of_all_ids(directory: Path, opened: Base) -> None:
    reader, _ = open_readers(directory)
    assert opened.size == len(reader.pieces)
    assert opened.names == set(reader.pieces)
    controls = {"<s>", "</s>"} if (directory / "tokenizer.model").is_file() else set(tiny.CONTROLS)
    assert controls <= opened.names
    assert not controls & opened.known


def test_known_are_the_texts_that_are_pieces(directory: Path, opened: Base) -> None:
    reader, _ = open_readers(directory)
    spelt = reader.texts(reader.normal)
    assert {text.replace(" ", "▁") for text in spelt} == {text.replace(" ", "▁") for text in opened.known}
    assert ("中" in opened.known) == isinstance(opened, ByteLevelBase)


def test_without_pieces_it_encodes_as_it_is_read(directory: Path, opened: Base) -> None:
    reader, _ = open_readers(directory)
    assert opened.encode_with(())(TEXTS) == reader.plain(TEXTS)


def test_with_pieces_it_encodes_as_what_it_writes(
    directory: Path, opened: Base, pieces: list[str], tmp_path: Path
) -> None:
    opened.write(tmp_path, pieces, None)
    reader, _ = open_readers(tmp_path)
    assert opened.encode_with(pieces)(TEXTS) == reader.plain(TEXTS)
    assert reader.pieces[: opened.size] == open_readers(directory)[0].pieces
    new = list(range(opened.size, opened.size + len(pieces)))
    assert reader.texts(new) == pieces


def test_pieces_join_further_what_the_base_has_joined(opened: Base, pieces: list[str]) -> None:
    """Each new token spells some of the base's tokens in whole; so no text gets longer."""
    old, new = opened.encode_with(())(TEXTS), opened.encode_with(pieces)(TEXTS)
    for before, after in zip(old, new, strict=True):
        ends = {0}
        for index in before:
            ends.add(max(ends) + length(opened, pieces, index))
        at = 0
        for index in after:
            at += length(opened, pieces, index)
            assert at in ends
        assert at == max(ends)
    assert {"图书馆", "在学校"} <= {pieces[index - opened.size] for index in new[-1] if index >= opened.size}


def length(base: Base, pieces: list[str], index: int) -> int:
    """Bytes of the piece with that id, new ones after the base's."""
    if index >= base.size:
        return len(pieces[index - base.size].encode())
    text = base.text(index)
    if isinstance(base, SentencePieceBase):
        return 1 if text.startswith("<0x") else len(text.replace("▁", " ").encode())
    return len(text) if text in base.names else len(text.encode())


def test_a_pad_token_is_the_last_id(opened: Base, pieces: list[str], tmp_path: Path) -> None:
    opened.write(tmp_path, pieces, "<pad>")
    reader, _ = open_readers(tmp_path)
    assert reader.pieces.index("<pad>") == len(reader.pieces) - 1 == opened.size + len(pieces)
    assert len(reader.pieces) - 1 not in reader.normal
    if (tmp_path / "tokenizer.model").is_file():
        assert read_model(tmp_path / "tokenizer.model").pieces[-1].type == CONTROL


def test_the_base_itself_is_left_as_it_is(opened: Base, pieces: list[str], tmp_path: Path) -> None:
    before = opened.encode_with(())(TEXTS)
    opened.encode_with(pieces)
    opened.write(tmp_path, pieces, "<pad>")
    opened.spell(["中国人民", "图"])
    assert opened.encode_with(())(TEXTS) == before
    assert "<pad>" not in opened.names


def test_a_base_without_chinese_words_spells_none(base: Path) -> None:
    assert open_base(base).spell(["中国", "北京", "，"]) == {}


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text("中国人民京龘", min_size=1, max_size=7), max_size=8))
def test_words_are_spelt_by_the_pieces_of_the_base(words: list[str]) -> None:
    """Characters that it has no piece for stay whole; what falls into characters is not told."""
    own = ["中国", "人民", "中国人民", "中", "国", "人", "民"]
    spelt = SentencePieceBase(add_pieces(tiny.base_tokenizer(), own), Path("x")).spell(words)
    for word in words:
        rest, wanted = word, []
        while rest:
            longest = max((p for p in own if rest.startswith(p)), key=len, default=rest[0])
            wanted.append(longest)
            rest = rest[len(longest) :]
        if len(wanted) < len(word):
            assert "".join(spelt[word]) == word
            assert all(len(part) == 1 or part in own for part in spelt[word])
        else:
            assert word not in spelt


def test_byte_level_words_are_spelt_by_its_pieces_too(byte_base: Path) -> None:
    opened = open_base(byte_base)
    words = ["中国的", "北京是", "龘", "中国龘", "的龘"]
    spelt = opened.spell(words)
    assert "中国" in opened.known
    assert spelt["中国的"][0].startswith("中国")
    assert spelt["中国龘"] == ["中国", "龘"]
    assert not {"龘", "的龘"} & set(spelt)
    assert all("".join(parts) == word for word, parts in spelt.items())


def test_the_text_of_an_id_is_its_piece(base: Path, byte_base: Path) -> None:
    model = read_base(base)
    opened = open_base(base)
    assert [opened.text(i) for i in range(opened.size)] == [piece.piece for piece in model.pieces]
    other = open_base(byte_base)
    assert other.text(other.encode_with(())(["中国"])[0][0]) == "中国"
    assert other.text(other.size - 1) == "<|pad|>"


@pytest.mark.parametrize("pad_token", [None, "<pad>"])
def test_the_encoder_before_an_extension_is_the_bases(
    directory: Path, opened: Base, pieces: list[str], tmp_path: Path, pad_token: str | None
) -> None:
    opened.write(tmp_path, pieces, pad_token)
    before = before_extension(tmp_path, opened.size)
    assert before(TEXTS) == opened.encode_with(())(TEXTS)
    if (tmp_path / "tokenizer.model").is_file():
        alone = before_extension(tmp_path / "tokenizer.model", opened.size)
        assert alone(TEXTS) == encoder(read_base(directory), dummy_prefix=False).encode(TEXTS)


def test_before_the_reference_extension_too(base: Path, chinese_sp: Path, tmp_path: Path) -> None:
    extend_vocab(base, chinese_sp, tmp_path / "out", policy="reference")
    opened = open_base(base)
    assert before_extension(tmp_path / "out", opened.size)(TEXTS) == opened.encode_with(())(TEXTS)


def test_what_cannot_be_extended_is_named(tmp_path: Path, base: Path) -> None:
    with pytest.raises(BadFile, match=r"has neither tokenizer\.model"):
        open_base(tmp_path)
    with pytest.raises(BadFile, match="gone: no such file"):
        open_base(tmp_path / "gone")
    shutil.copy(base / "tokenizer.json", tmp_path)
    with pytest.raises(BadFile, match=r"tokenizer\.json: is neither SentencePiece BPE .* nor byte-level"):
        open_base(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_a_token_that_only_the_other_files_have_is_not_overwritten(
    base: Path, tmp_path: Path, name: str
) -> None:
    """Chat models add control tokens beside tokenizer.model; a new piece would take their ids."""
    own = shutil.copytree(base, tmp_path / "own")
    file = own / name
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if name == "tokenizer.json":
        content["added_tokens"].append({**content["added_tokens"][-1], "id": 420, "content": "<|im_end|>"})
    elif name == "added_tokens.json":
        content["<|im_end|>"] = 420
    else:
        content["added_tokens_decoder"] = {"420": {"content": "<|im_end|>"}}
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BadFile, match=r"has the token '<\|im_end\|>' \(id 420\) that tokenizer.model lacks"):
        open_base(own)
