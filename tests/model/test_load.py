"""Models and tokenizers from directories: what loads is right, what is not is told in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.model.load import (
    check_pair,
    check_rows,
    check_tokenizer,
    first_new_id,
    load_model,
    load_tokenizer,
)
from chinese_llama.vocab.proto import read_model
from tests import tiny

TEXTS = ["The river 2023", "  two spaces", "\ta\n\nb", "中国，北京", "a </s> b", "🙂", ""]


def test_the_tokenizer_gives_the_ids_of_sentencepiece(extended: Path) -> None:
    tokenizer = load_tokenizer(extended)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(extended / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text), text


def test_a_directory_with_only_tokenizer_model_gives_the_same_ids_or_is_refused(
    base: Path, tmp_path: Path
) -> None:
    """transformers' own conversion is not LLaMA's tokenizer; silently other ids would be the worst."""
    for name in ("tokenizer.model", "config.json"):
        shutil.copy(base / name, tmp_path)
    try:
        tokenizer = load_tokenizer(tmp_path)
    except BadFile as error:
        assert "tokenizer.json" in str(error)
        return
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text), text


def test_a_place_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"holds no tokenizer \(no tokenizer.json or tokenizer.model\)"):
        load_tokenizer(tmp_path)
    with pytest.raises(BadFile, match="nowhere: no such directory; a tokenizer is wanted"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadFile, match="has no tokenizer that loads"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_bos_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "tokenizer.json", tmp_path)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    with pytest.raises(BadFile, match=r"names no bos or eos token \(tokenizer_config.json\)"):
        load_tokenizer(tmp_path)


def test_where_no_bos_is_named_a_document_begins_with_what_stands_between_documents(tmp_path: Path) -> None:
    """Qwen's tokenizers; extend-vocab gives the same bos to what it makes of them."""
    tokenizer = tiny.byte_level("gpt2")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    base = tiny.write_byte_level(tmp_path, tokenizer, bos_token=None)
    assert load_tokenizer(base).bos_token_id == tokenizer.token_to_id("<|endoftext|>")


def test_the_model_is_ready_to_use(base: Path) -> None:
    model = load_model(base)
    assert not model.training
    assert model.dtype == torch.float32 or torch.cuda.is_available()
    assert load_model(base, "bfloat16").dtype == torch.bfloat16
    stored = load_file(base / "model.safetensors")
    assert torch.equal(load_model(base, "float32").lm_head.weight, stored["lm_head.weight"])


@pytest.mark.parametrize("place", ["nowhere", "./no/where", "/no/where"])
def test_a_place_that_is_neither_directory_nor_hub_id_is_refused(place: str) -> None:
    with pytest.raises(BadFile, match="no such directory; a model is wanted"):
        load_model(place)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"holds no model \(no config.json\)"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadFile, match="is not a model that loads"):
        load_model(tmp_path)


def test_a_damaged_file_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "m")
    whole = (base / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFile, match="m: is not a model that loads"):
        load_model(tmp_path / "m")


def test_a_model_that_lacks_weights_is_refused_not_filled_with_noise(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "m")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadFile, match=r"model.layers.1.mlp.up_proj.weight"):
        load_model(tmp_path / "m")


def test_a_tokenizer_with_more_pieces_than_rows_does_not_fit(base: Path, tokenizer: Path) -> None:
    model = load_model(base)
    check_pair(model, load_tokenizer(base), base)
    with pytest.raises(DoesNotFit, match=r"has \d+ pieces, .* only 420 rows; .*extend-model"):
        check_pair(model, load_tokenizer(tokenizer), base)


def test_a_tokenizer_of_another_size_does_not_fit(base: Path, extended: Path, tmp_path: Path) -> None:
    """49,953 pieces on 49,954 rows run without a word, and babble."""
    model = load_model(extended)
    check_pair(model, load_tokenizer(extended), extended)
    with pytest.raises(DoesNotFit, match=r"has 420 pieces, .* is a model of \d+; use the tokenizer"):
        check_pair(model, load_tokenizer(base), extended)
    tiny.write_llama(tmp_path / "odd", 421)
    with pytest.raises(DoesNotFit, match=r"has 420 pieces, .* is a model of 421"):
        check_pair(load_model(tmp_path / "odd"), load_tokenizer(base), tmp_path / "odd")
    tiny.write_llama(tmp_path / "padded", 424)
    check_pair(load_model(tmp_path / "padded"), load_tokenizer(base), tmp_path / "padded")
    with pytest.raises(DoesNotFit, match=r"has 420 pieces, m is a model of 480"):
        check_rows(480, load_tokenizer(base), "m")  # an eighth of the rows is no filling


def test_a_tokenizer_with_other_pieces_does_not_fit(base: Path, extended: Path, tmp_path: Path) -> None:
    check_tokenizer(base, load_tokenizer(extended), "t")
    check_tokenizer(tmp_path, load_tokenizer(extended), "t")
    other = tiny.write_base(tmp_path / "other", tiny.base_tokenizer(400))
    with pytest.raises(
        DoesNotFit, match=r"t is not the tokenizer of .*base: id \d+ is '.+' in it, and '.+' beside"
    ):
        check_tokenizer(base, load_tokenizer(other), "t")


def test_the_first_new_id_comes_from_a_manifest(base: Path, tokenizer: Path, extended: Path) -> None:
    old = len(read_model(base / "tokenizer.model").pieces)
    assert first_new_id(extended) == first_new_id(base, tokenizer) == old
    assert first_new_id(base, "some/hub-id") is None
