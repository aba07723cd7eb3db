"""Which byte-level bases can be extended, the roles of their control tokens, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from chinese_llama.errors import BadFile, UserError
from chinese_llama.model.load import load_tokenizer
from chinese_llama.vocab.bases import open_base
from chinese_llama.vocab.bytelevel import ByteLevelBase
from chinese_llama.vocab.merge import extend_vocab
from tests import tiny
from tests.vocab.test_bytelevel import gpt2


def test_the_reference_policy_is_for_sentencepiece(tmp_path: Path, chinese_sp: Path) -> None:
    source = gpt2(tmp_path / "base")
    with pytest.raises(UserError, match=r"--policy reference extends SentencePiece models, which .*json is"):
        extend_vocab(source, chinese_sp, tmp_path / "out", policy="reference")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token": None}, r"names no pad token; add one with --pad-token '<\|pad\|>'"),
        (
            {"eos_token": None},
            r"tokenizer_config\.json names no eos_token that tokenizer.json has; add it there",
        ),
        (
            {"bos_token": None},
            r"tokenizer_config\.json names no bos_token that tokenizer.json has; add it there",
        ),
    ],
)
def test_roles_that_are_missing_are_named(
    tmp_path: Path, chinese_sp: Path, config: dict[str, None], message: str
) -> None:
    source = gpt2(tmp_path / "base", **config)
    with pytest.raises(UserError, match=message):
        extend_vocab(source, chinese_sp, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_pad_token_that_is_given_takes_the_place_of_a_missing_one(tmp_path: Path, chinese_sp: Path) -> None:
    source = gpt2(tmp_path / "base", pad_token=None)
    told = extend_vocab(source, chinese_sp, tmp_path / "out", pad_token="<|padding|>")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.pad_token == "<|padding|>"
    assert tokenizer.pad_token_id == told["vocab_size"] - 1
    ids = tokenizer("a<|padding|>中国", add_special_tokens=False)["input_ids"]
    assert tokenizer.pad_token_id not in ids


def test_without_a_pad_token_unk_takes_its_place(tmp_path: Path, chinese_sp: Path) -> None:
    source = gpt2(tmp_path / "base", pad_token=None, unk_token="<|pad|>")
    extend_vocab(source, chinese_sp, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").pad_token == "<|pad|>"


def test_roles_written_as_records_are_read(tmp_path: Path, chinese_sp: Path) -> None:
    """transformers writes them so where a token has flags."""
    record = {"__type": "AddedToken", "content": "<|end|>", "lstrip": False, "special": True}
    source = gpt2(tmp_path / "base", eos_token=record)
    extend_vocab(source, chinese_sp, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").eos_token == "<|end|>"


def test_qwen_has_no_bos_token_but_one_between_documents(tmp_path: Path, chinese_sp: Path) -> None:
    tokenizer = tiny.byte_level("gpt2")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    source = tiny.write_byte_level(tmp_path / "base", tokenizer, bos_token=None)
    extend_vocab(source, chinese_sp, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").bos_token == "<|endoftext|>"


@pytest.mark.parametrize("pad_token", ["<|end|>", "a", "Ġthe"])
def test_a_pad_token_that_the_base_has_is_refused(tmp_path: Path, chinese_sp: Path, pad_token: str) -> None:
    source = gpt2(tmp_path / "base")
    with pytest.raises(UserError, match=r"--pad-token .* is a piece of .*tokenizer\.json already"):
        extend_vocab(source, chinese_sp, tmp_path / "out", pad_token=pad_token)


def test_a_space_before_every_text_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level("gpt2")
    for pre_tokenizer in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]),
    ):
        tokenizer.pre_tokenizer = pre_tokenizer
        with pytest.raises(BadFile, match=r"tokenizer\.json: puts a space before every text"):
            open_base(tiny.write_byte_level(tmp_path, tokenizer))


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    from tokenizers import models

    plain = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    pieces = tokenizers.Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words = tokenizers.Tokenizer(models.WordLevel(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    for tokenizer in (plain, pieces, words):
        with pytest.raises(BadFile, match=r"tokenizer\.json: is neither SentencePiece BPE .* nor byte-level"):
            ByteLevelBase(tiny.write_byte_level(tmp_path, tokenizer) / "tokenizer.json")


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"model": {"type": "BPE"}}', '"text"', "中国"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(BadFile, match=r"tokenizer\.json: is not a tokenizer"):
        open_base(tmp_path)


def test_a_damaged_configuration_is_named(tmp_path: Path, chinese_sp: Path) -> None:
    source = gpt2(tmp_path / "base")
    (source / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadFile, match=r"tokenizer_config\.json: is not valid JSON"):
        extend_vocab(source, chinese_sp, tmp_path / "out")
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="names no pad token"):
        extend_vocab(source, chinese_sp, tmp_path / "out")


def test_a_base_that_cannot_spell_chinese_in_merges_says_so(tmp_path: Path, chinese_sp: Path) -> None:
    """Trained on English only, it has no piece of two bytes of a Chinese character to join from."""
    source = tiny.write_byte_level(tmp_path / "base", tiny.byte_level("gpt2", tiny.ENGLISH))
    try:
        told = extend_vocab(source, chinese_sp, tmp_path / "out")
    except UserError as error:
        assert "already extended" not in str(error), "that is not what is wrong here"
    else:
        assert told["new_pieces"] > 50


def test_a_pad_token_that_texts_hold_as_a_word_is_refused(chinese_sp: Path, tmp_path: Path) -> None:
    """Llama-3 looks a whole word up before it merges, so "pad" in a text would become the control id."""
    base = tiny.write_byte_level(tmp_path / "base", tiny.byte_level("llama3"))
    with pytest.raises(UserError, match=r"breaks its contract: .* 'pad'"):
        extend_vocab(base, chinese_sp, tmp_path / "out", pad_token="pad")
    assert not (tmp_path / "out").exists()
    extend_vocab(base, chinese_sp, tmp_path / "out", pad_token="<pad>")


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_stays_and_its_control_tokens_are_read(
    chinese_sp: Path, tmp_path: Path, where: str
) -> None:
    template = "{% for m in messages %}<|begin|>{{ m.content }}<|end|>{% endfor %}"
    config = {"chat_template": template} if where.endswith("json") else {}
    base = tiny.write_byte_level(tmp_path / "base", tiny.byte_level("llama3"), **config)
    if not config:
        (base / where).write_text(template, encoding="utf-8")
    extend_vocab(base, chinese_sp, tmp_path / "out")
    talk = [{"role": "user", "content": "the sea"}]
    before, after = (load_tokenizer(place) for place in (base, tmp_path / "out"))
    assert after.apply_chat_template(talk)["input_ids"] == before.apply_chat_template(talk)["input_ids"]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: c.update(model=None),
        lambda c: c["model"].pop("vocab"),
        lambda c: c["model"].update(merges=[["no", "such"]]),
        lambda c: c["model"].update(merges=["one"]),
        lambda c: c["model"].update(merges=[5]),
        lambda c: c.update(pre_tokenizer={"type": "ByteLevel of nobody"}),
    ],
)
def test_a_damaged_tokenizer_json_is_one_sentence(break_it: Any, chinese_sp: Path, tmp_path: Path) -> None:
    base = tiny.write_byte_level(tmp_path / "base", tiny.byte_level("gpt2"))
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    break_it(content)
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BadFile):
        extend_vocab(base, chinese_sp, tmp_path / "out")
