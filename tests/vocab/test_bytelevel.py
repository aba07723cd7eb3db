"""Byte-level bases (GPT-2, Llama-3, Qwen): the same contract as for SentencePiece, in the same readers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import DoesNotFit
from chinese_llama.model.load import load_tokenizer
from chinese_llama.model.resize import extend_model
from chinese_llama.model.shards import EMBED, HEAD, Weights
from chinese_llama.vocab import report
from chinese_llama.vocab.audit import PROBES, audit_vocab, dead_pieces
from chinese_llama.vocab.bases import open_base
from chinese_llama.vocab.bytelevel import BYTE_OF, CHARACTER, ByteLevelBase, to_bytes, to_text
from chinese_llama.vocab.merge import extend_vocab
from chinese_llama.vocab.readers import Reader, load_json, open_readers
from chinese_llama.vocab.scripts import CHINESE, is_chinese
from chinese_llama.vocab.select import select
from tests import tiny
from tests.vocab.strategies import CLASSES, TEXTS

STYLES = ("gpt2", "llama3", "nfc", "crossing")
WITHOUT_CHINESE = [
    *tiny.ENGLISH[:5],
    "def f(x):\n\treturn {'a': [1, 2, 3]}  # code\r\n",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "“quoted” — and … “more”",
    "a" + tiny.CONTROLS[0] + tiny.CONTROLS[2],
    "",
    "   ",
    "Привет 안녕 é e\u0301",
]


@pytest.fixture(scope="module", params=STYLES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level base; the tests' extended tokenizer comes beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "crossing":  # what it joins begins and ends inside of characters
        tokenizer = tiny.byte_level("gpt2", tiny.ENGLISH + tiny.CHINESE)
    else:
        tokenizer = tiny.byte_level(request.param)
    tiny.write_byte_level(folder / "base", tokenizer, model_max_length=64)
    return folder


@pytest.fixture(scope="module")
def base_dir(place: Path) -> Path:
    return place / "base"


@pytest.fixture(scope="module")
def extended(place: Path, chinese_sp: Path) -> Path:
    extend_vocab(place / "base", chinese_sp, place / "out")
    return place / "out"


@pytest.fixture(scope="module")
def old(base_dir: Path) -> Reader:
    return open_readers(base_dir)[0]


@pytest.fixture(scope="module")
def new(extended: Path) -> Reader:
    return open_readers(extended)[0]


@pytest.fixture(scope="module")
def auto(extended: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(extended))


def gpt2(directory: Path, **config: Any) -> Path:
    return tiny.write_byte_level(directory, tiny.byte_level("gpt2"), **config)


@given(text=st.text(max_size=40))
def test_every_text_has_one_byte_level_form(text: str) -> None:
    assert to_text(to_bytes(text)) == text
    assert len(to_bytes(text)) == len(text.encode())


def test_the_table_is_that_of_the_library() -> None:
    assert sorted(CHARACTER.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert {BYTE_OF[character]: character for character in BYTE_OF} == CHARACTER
    [(found, _)] = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str("é中\n \x7f")
    assert found == to_bytes("é中\n \x7f")


@pytest.mark.parametrize("piece", ["ä¸", "Ń", "中", "▁the"])
def test_what_is_no_whole_character_has_no_text(piece: str) -> None:
    assert to_text(piece) is None


def test_old_ids_keep_their_pieces_and_control_tokens(old: Reader, new: Reader, extended: Path) -> None:
    size = len(old.pieces)
    assert new.pieces[:size] == old.pieces
    assert [old.pieces.index(token) for token in tiny.CONTROLS] == [size - 3, size - 2, size - 1]
    special = load_json(extended / "tokenizer.json").get_added_tokens_decoder()
    assert {index: str(token) for index, token in special.items()} == {
        size - 3 + number: token for number, token in enumerate(tiny.CONTROLS)
    }


def test_new_ids_are_chinese_pieces(old: Reader, new: Reader) -> None:
    ids = list(range(len(old.pieces), len(new.pieces)))
    assert len(ids) > 50
    texts = new.texts(ids)
    assert all(map(is_chinese, texts))
    assert len(set(texts)) == len(texts)
    assert [to_text(new.pieces[index]) for index in ids] == texts


def test_nothing_is_dead(old: Reader, new: Reader) -> None:
    assert dead_pieces(new, len(old.pieces)) == []


def test_every_new_piece_is_made_inside_a_text_too(old: Reader, new: Reader) -> None:
    """Between characters that nothing joins with it. A reader that looks whole words up in the
    vocabulary (Llama-3's) finds pieces alone that no merge makes."""
    for index in range(len(old.pieces), len(new.pieces)):
        [text] = new.texts([index])
        assert index in new.encode([f"龘{text}龘"])[0], text


def test_text_without_chinese_stays(old: Reader, new: Reader) -> None:
    assert new.encode(WITHOUT_CHINESE) == old.encode(WITHOUT_CHINESE)


def test_chinese_gets_shorter(old: Reader, new: Reader) -> None:
    lengths = [sum(map(len, reader.encode(tiny.CHINESE))) for reader in (old, new)]
    assert lengths[1] < lengths[0] * 0.8


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_the_contract_on_any_text(old: Reader, new: Reader, auto: Any, text: str) -> None:
    [ids], [before] = new.encode([text]), old.encode([text])
    assert len(ids) <= len(before)
    assert ids == before or CHINESE.search(text)
    assert new.decode([ids]) == old.decode([before])
    assert auto(text, add_special_tokens=False)["input_ids"] == ids
    assert new.lengths[ids].sum() == old.lengths[before].sum()


@pytest.mark.parametrize("text", [*PROBES, *CLASSES.values(), "的" * 10_000, "a" * 10_000])
def test_the_contract_on_texts_of_every_class(old: Reader, new: Reader, auto: Any, text: str) -> None:
    [ids], [before] = new.encode([text]), old.encode([text])
    assert len(ids) <= len(before)
    assert new.decode([ids]) == old.decode([before])
    assert auto(text, add_special_tokens=False)["input_ids"] == ids


def test_it_is_a_fast_tokenizer_with_its_roles(auto: Any, new: Reader) -> None:
    assert auto.is_fast
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == tuple(tiny.CONTROLS)
    assert [auto.bos_token_id, auto.eos_token_id, auto.pad_token_id] == [
        new.pieces.index(token) for token in tiny.CONTROLS
    ]
    assert len(auto) == len(new.pieces)
    assert auto.model_max_length == 64, "what else the base's configuration says is kept"
    padded = auto(["a", "a b c"], padding=True)
    assert padded["input_ids"][0][-1] == auto.pad_token_id


def test_this_toolkit_loads_it_with_equal_ids(extended: Path, new: Reader) -> None:
    tokenizer = load_tokenizer(extended)
    for text in [*PROBES, *WITHOUT_CHINESE]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == new.encode([text])[0]


def test_saved_and_loaded_again_gives_equal_ids(auto: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    auto.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.get_vocab() == auto.get_vocab()
    assert (again.bos_token, again.eos_token, again.pad_token) == tuple(tiny.CONTROLS)
    for text in [*PROBES, *tiny.CHINESE[:5], *WITHOUT_CHINESE]:
        assert again(text)["input_ids"] == auto(text)["input_ids"]


def test_literal_control_tokens_stay_text(auto: Any, new: Reader) -> None:
    text = "中国" + "a".join(tiny.CONTROLS)
    ids = auto(text, add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(auto.all_special_ids)
    assert auto.decode(ids) == text
    assert new.encode([text]) == [ids]


def test_only_what_an_extension_needs_is_written(extended: Path, base_dir: Path) -> None:
    names = {path.name for path in extended.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", report.REPORT, report.PAGE, report.PICTURE} <= names
    assert "tokenizer.model" not in names
    manifest = read_manifest(extended)
    assert manifest is not None
    assert manifest.inputs["base"]["path"] == str(base_dir / "tokenizer.json")
    assert manifest.vocab_size == len(open_readers(extended)[0].pieces)
    was, now = (json.loads((d / "tokenizer.json").read_text(encoding="utf-8")) for d in (base_dir, extended))
    assert now["model"]["merges"][: len(was["model"]["merges"])] == was["model"]["merges"]
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"):
        assert now[key] == was[key]


@pytest.mark.parametrize("form", ["texts", "pairs"])
def test_merges_are_read_in_both_forms(tmp_path: Path, form: str) -> None:
    """Older files write a merge as one text, with a space between its parts."""
    base = gpt2(tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    content["model"]["merges"] = [" ".join(pair) for pair in pairs] if form == "texts" else pairs
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    texts = [*PROBES, *tiny.CHINESE[:5]]
    one, two = open_base(base), open_base(tmp_path)
    for pieces in ([], ["图书馆", "图书", "图", "书", "馆"]):
        assert one.encode_with(pieces)(texts) == two.encode_with(pieces)(texts)


def test_with_a_corpus_and_a_size(base_dir: Path, chinese_sp: Path, work: Path, tmp_path: Path) -> None:
    size = open_base(base_dir).size + 41
    told = extend_vocab(
        base_dir, chinese_sp, tmp_path / "out", corpus=[work / "zh.jsonl"], size=size, pad_token="[PAD]"
    )
    assert told["vocab_size"] <= size
    assert told["held_out"]["characters_per_token"] > told["held_out"]["base_characters_per_token"]
    reader, _ = open_readers(tmp_path / "out")
    assert reader.pieces[-1] == "[PAD]"
    assert dead_pieces(reader, told["base_vocab_size"]) == []
    assert load_tokenizer(tmp_path / "out").pad_token == "[PAD]"
    again = audit_vocab(tmp_path / "out", [work / "zh.jsonl", work / "en.jsonl"], base_dir)
    for figures in again["files"].values():
        assert (figures["changed"], figures["longer"]) == (0, 0)


@pytest.fixture(scope="module")
def joining(tmp_path_factory: pytest.TempPathFactory) -> ByteLevelBase:
    """A base that has pieces for 国, 是, 的 and 河, and joins 的河."""
    return ByteLevelBase(gpt2(tmp_path_factory.mktemp("joining")) / "tokenizer.json")


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.text("国是的河", min_size=2, max_size=6), max_size=12, unique=True),
    texts=st.lists(st.text("国是的河", min_size=1, max_size=20), max_size=6),
)
def test_what_is_selected_can_be_produced_everywhere_and_nothing_gets_longer(
    joining: ByteLevelBase, words: list[str], texts: list[str]
) -> None:
    assert set("国是的河") <= joining.known
    selection = select(joining, tiny.chinese_model(words))
    assert set(selection.pieces) | set(selection.dropped) >= set(words) - joining.known
    encode = joining.encode_with(selection.pieces)
    inside = encode([f"龘{piece}龘" for piece in selection.pieces])
    for index, (alone, got) in enumerate(zip(encode(selection.pieces), inside, strict=True)):
        assert alone == [joining.size + index]
        assert joining.size + index in got
    texts += [word * 4 for word in words]
    for before, after in zip(joining.encode_with(())(texts), encode(texts), strict=True):
        assert len(after) <= len(before)


def test_a_compatibility_character_that_nfc_replaces_is_dropped(tmp_path: Path) -> None:
    base = open_base(tiny.write_byte_level(tmp_path, tiny.byte_level("nfc")))
    selection = select(base, tiny.chinese_model(["图书", "\uf900", "图", "书"]))
    assert "\uf900" not in selection.pieces
    assert selection.dropped["\uf900"] == "cannot be produced"
    assert "图书" in selection.pieces


def test_ids_between_the_vocabulary_and_its_end_stay_free(tmp_path: Path, chinese_sp: Path) -> None:
    """Reserved ids, as Llama-3 has them: new pieces come after the highest."""
    source = gpt2(tmp_path / "base")
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    last = max(token["id"] for token in content["added_tokens"])
    reserved = {**content["added_tokens"][-1], "content": "<|reserved|>", "id": last + 1}
    content["added_tokens"].append(reserved)
    (source / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    extend_vocab(source, chinese_sp, tmp_path / "out")
    reader, _ = open_readers(tmp_path / "out")
    assert reader.pieces[last + 1] == "<|reserved|>"
    assert to_text(reader.pieces[last + 2]) is not None
    assert load_tokenizer(tmp_path / "out").convert_tokens_to_ids("<|reserved|>") == last + 1


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llama(
    request: pytest.FixtureRequest, place: Path, extended: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A pico LLaMA with the byte-level tokenizer, more rows than ids, and its extension."""
    folder = tmp_path_factory.mktemp("llama")
    rows = open_base(place / "base").size + 5
    tiny.write_llama(folder / "base", rows, tied=request.param)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "base" / name, folder / "base")
    extend_model(folder / "base", extended, folder / "out", init="subword-mean")
    return folder


def test_the_extended_model_keeps_old_rows_to_the_bit(llama: Path, old: Reader, new: Reader) -> None:
    before, after = Weights(llama / "base"), Weights(llama / "out")
    assert set(before) == set(after)
    for name in before:
        a, b = before.load(name), after.load(name)
        if name in (EMBED, HEAD):
            assert len(b) == len(new.pieces)
            a, b = a[: len(old.pieces)], b[: len(old.pieces)]
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name


def test_a_new_row_is_the_mean_of_what_the_base_made_of_its_text(
    llama: Path, old: Reader, new: Reader
) -> None:
    was, now = Weights(llama / "base").load(EMBED).double(), Weights(llama / "out").load(EMBED).double()
    for index in range(len(old.pieces), len(new.pieces)):
        [ids] = old.encode(new.texts([index]))
        torch.testing.assert_close(now[index], was[ids].mean(0), rtol=1e-5, atol=1e-6)


def test_the_extended_model_loads_with_its_tokenizer(llama: Path, new: Reader) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama / "out")
    tokenizer = AutoTokenizer.from_pretrained(llama / "out")
    assert len(tokenizer) == len(model.get_input_embeddings().weight) == len(new.pieces)
    [ids] = new.encode(["图书馆 the"])
    assert tokenizer("图书馆 the", add_special_tokens=False)["input_ids"] == ids
    with torch.no_grad():
        assert model(torch.tensor([ids])).logits.shape[-1] == len(new.pieces)


def test_a_model_of_another_byte_level_base_is_refused(llama: Path, chinese_sp: Path, tmp_path: Path) -> None:
    other = tiny.write_byte_level(tmp_path / "other", tiny.byte_level("gpt2", vocab_size=400))
    extend_vocab(other, chinese_sp, tmp_path / "out")
    with pytest.raises(DoesNotFit, match=r"does not extend the tokenizer of .*base: id \d+ is"):
        extend_model(llama / "base", tmp_path / "out", tmp_path / "model")
