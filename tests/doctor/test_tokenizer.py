"""A made case for everything that can be wrong with a tokenizer's files, readings and special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from chinese_llama.doctor import raw
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.readings import check_extension
from chinese_llama.doctor.things import recognise
from chinese_llama.doctor.tokenizer import check_tokenizer
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.merge import append_missing
from chinese_llama.vocab.proto import read_model
from tests import tiny

CONFIG = "tokenizer_config.json"


def findings(path: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_tokenizer(recognise(path))}


def severities(path: Path) -> dict[str, str]:
    return {check: finding.severity for check, finding in findings(path).items()}


@pytest.fixture
def copy(tokenizer: Path, tmp_path: Path) -> Path:
    """A copy of the extended tokenizer, to be spoilt."""
    shutil.copytree(tokenizer, tmp_path / "copy")
    (tmp_path / "copy" / "chinese_llama.json").unlink()
    return tmp_path / "copy"


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Edit a JSON file in place; `edit` may return another content."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content = edit(content) or content
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def set_config(directory: Path, **values: Any) -> None:
    change(directory / CONFIG, lambda content: content | values)


# --- nothing is wrong


def test_the_tokenizers_of_this_toolkit_are_healthy(tokenizer: Path, base: Path) -> None:
    assert {*severities(tokenizer).values()} <= {"note"}
    assert {*severities(base).values()} <= {"note"}


def test_a_tokenizer_model_alone_is_healthy_for_this_toolkit(base: Path, tmp_path: Path) -> None:
    shutil.copyfile(base / "tokenizer.model", tmp_path / "tokenizer.model")
    found = severities(tmp_path)
    assert found["no-tokenizer-json"] == "note"
    assert {*found.values()} == {"note"}
    assert severities(tmp_path / "tokenizer.model") == found


def test_a_byte_level_tokenizer_is_healthy(tmp_path: Path) -> None:
    for style in ("gpt2", "llama3"):
        place = tiny.write_byte_level(tmp_path / style, tiny.byte_level(style))
        assert {*severities(place).values()} <= {"note"}, style


def test_it_tells_size_and_coverage(tokenizer: Path) -> None:
    thing = recognise(tokenizer)
    list(check_tokenizer(thing))
    assert thing.facts["pieces"] == len(read_model(tokenizer / "tokenizer.model").pieces)
    assert thing.facts["chinese_characters_per_token"] > 0


def test_a_base_that_spells_chinese_in_bytes_is_told(base: Path) -> None:
    assert findings(base)["poor-chinese"].severity == "note"


# --- files


def test_files_that_are_no_content(copy: Path) -> None:
    cases = {
        "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "file-empty": b"\n",
        "file-is-text": b"<!DOCTYPE html><html>Sign in</html>",
        "tokenizer-not-readable": b"\x00\x01 no model",
    }
    for check, content in cases.items():
        (copy / "tokenizer.model").write_bytes(content)
        assert findings(copy)[check].severity == "error"


def test_a_file_that_cannot_be_opened() -> None:
    problem = raw.broken(Path("/nowhere/tokenizer.model"))
    assert problem is not None and problem.check == "file-not-readable"


def test_invalid_json(copy: Path) -> None:
    for name in (CONFIG, "tokenizer.json", "special_tokens_map.json"):
        before = (copy / name).read_text(encoding="utf-8") if (copy / name).is_file() else None
        (copy / name).write_text('{"a": 1,\n', encoding="utf-8")
        assert findings(copy)["invalid-json"].where.endswith(name)
        (copy / name).unlink() if before is None else (copy / name).write_text(before, encoding="utf-8")


def test_a_tokenizer_json_that_is_none(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}', encoding="utf-8")
    assert findings(copy)["tokenizer-not-readable"].severity == "error"


def test_tiktoken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    assert "tiktoken" in findings(tmp_path)["tokenizer-not-readable"].what


def test_a_configuration_without_pieces(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"eos_token": "</s>"}')
    assert severities(tmp_path) == {"no-vocabulary": "error"}


def test_a_tokenizer_with_its_own_code(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (copy / name).unlink()
    (copy / "tokenization_own.py").write_text("class Own: pass\n")
    set_config(copy, tokenizer_class="Own", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    assert findings(copy)["needs-own-code"].severity == "error"


def test_duplicate_pieces(copy: Path) -> None:
    model = read_model(copy / "tokenizer.model")
    model.pieces.add(piece=model.pieces[300].piece, score=-9.0)
    tiny.write_model(copy / "tokenizer.model", model)
    assert "ids 300" in findings(copy)["duplicate-pieces"].evidence[0]


def test_the_three_token_tokenizer(copy: Path) -> None:
    """What LlamaTokenizer(vocab_file=...) saves."""
    fast = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2}, [], unk_token="<unk>"))
    fast.save(str(copy / "tokenizer.json"))
    found = findings(copy)
    assert found["no-pieces"].severity == "error"
    assert "3 pieces" in found["no-pieces"].what


def test_ids_that_stand_for_two_pieces_or_none(tmp_path: Path) -> None:
    place = tiny.write_byte_level(tmp_path / "t", tiny.byte_level())

    def spoil(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        for token in content["added_tokens"]:
            token["id"] += 10
        vocabulary[last] = vocabulary[last] - 1

    change(place / "tokenizer.json", spoil)
    found = findings(place)
    assert found["duplicate-ids"].severity == "error"
    assert found["holes-in-ids"].severity == "warning"


def test_two_tokenizers_in_one_directory(copy: Path, base: Path) -> None:
    shutil.copyfile(base / "tokenizer.json", copy / "tokenizer.json")
    assert findings(copy)["two-tokenizers"].severity == "error"


def test_other_pieces_of_the_same_number(copy: Path) -> None:
    def swap(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        one, two = [piece for piece, index in vocabulary.items() if index in (300, 301)]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]

    change(copy / "tokenizer.json", swap)
    assert findings(copy)["two-tokenizers"].what.count("2 ids differ")


def test_chinese_as_added_tokens(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "t")
    fast = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    fast.add_tokens(
        ["中国", "北京", "城市", "长江", "黄河", "学习", "中文", "图书馆", "学校", "明天", "晴天"]
    )
    fast.save(str(tmp_path / "t" / "tokenizer.json"))
    found = findings(tmp_path / "t")["chinese-as-added-tokens"]
    assert found.severity == "warning"
    assert "图书馆" in found.evidence[1]


def test_added_tokens_that_sentencepiece_does_not_know(base: Path, tmp_path: Path) -> None:
    shutil.copyfile(base / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 420}')
    assert findings(tmp_path)["added-tokens-outside-model"].evidence == ["'<|im_end|>': id 420"]


# --- special tokens


def test_a_name_that_is_no_piece(copy: Path) -> None:
    set_config(copy, pad_token="[PAD]")
    found = findings(copy)["special-token-not-in-vocabulary"]
    assert found.severity == "error"
    assert "[PAD]" in found.what
    (copy / "config.json").write_text('{"vocab_size": 100000}')
    assert findings(copy)["special-token-not-in-vocabulary"].severity == "warning"


def test_special_tokens_map_says_something_else(copy: Path) -> None:
    (copy / "special_tokens_map.json").write_text('{"pad_token": {"content": "</s>"}}')
    assert findings(copy)["special-tokens-differ"].severity == "warning"


@pytest.mark.parametrize(("role", "severity"), [("bos", "warning"), ("eos", "error"), ("pad", "warning")])
def test_missing_special_tokens(copy: Path, role: str, severity: str) -> None:
    set_config(copy, **{f"{role}_token": None})
    assert findings(copy)[f"no-{role}"].severity == severity


def test_pad_is_eos_or_unk(copy: Path) -> None:
    assert findings(copy)["pad-is-unk"].severity == "note"
    set_config(copy, pad_token="</s>")
    assert findings(copy)["pad-is-eos"].severity == "warning"


def test_no_bos(copy: Path, tmp_path: Path) -> None:
    set_config(copy, bos_token=None)
    assert findings(copy)["no-bos"].severity == "warning"
    tokenizer = tiny.byte_level()
    tokenizer.add_special_tokens(["<|endoftext|>"])  # Qwen's: it begins a document here
    assert "no-bos" not in findings(tiny.write_byte_level(tmp_path / "t", tokenizer, bos_token=None))


def test_special_tokens_beyond_the_rows(tmp_path: Path) -> None:
    place = tiny.write_byte_level(tmp_path / "t", tiny.byte_level())
    (place / "config.json").write_text('{"vocab_size": 420}')
    assert findings(place)["special-token-beyond-rows"].severity == "error"


def test_what_is_put_around_prompts(copy: Path) -> None:
    def ends(content: Any) -> None:
        processor = content["post_processor"]
        processor["single"] = [*processor["single"][1:], {"SpecialToken": {"id": "</s>", "type_id": 0}}]
        processor["special_tokens"] = {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}
        processor["pair"] = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]

    change(copy / "tokenizer.json", ends)
    found = findings(copy)
    assert found["eos-after-prompts"].severity == "warning"
    assert found["no-bos-before-prompts"].severity == "warning"


# --- readings


def reference(base: Path, directory: Path) -> Path:
    """Chinese pieces appended with score 0, as Chinese-LLaMA has them."""
    pieces = "的河 中国的 哈哈 哈哈哈 国 中国 越来越 的 中 河 哈 的首都 th ick"
    chinese = tiny.chinese_model(pieces.split())
    directory.mkdir()
    write_tokenizer(directory, append_missing(read_model(base / "tokenizer.model"), chinese), None)
    return directory


def test_appended_pieces(base: Path, tmp_path: Path) -> None:
    place = reference(base, tmp_path / "reference")
    found = findings(place)
    assert found["tied-scores"].severity == "warning"
    assert "越来越" in found["dead-pieces"].evidence[0]
    assert found["dead-pieces"].severity == "warning"
    differ = found["reads-differently"]
    assert differ.severity == "warning"
    assert "SentencePiece [" in differ.evidence[0] and "tokenizer.json [" in differ.evidence[0]
    together = {one.check: one for one in check_extension([place, base])}
    assert together["english-is-changed"].severity == "warning"
    assert not list(check_extension([base, base]))


def test_a_tokenizer_that_lengthens_texts(base: Path, tmp_path: Path) -> None:
    """A piece that is better than the base's own parts them."""
    model = read_model(base / "tokenizer.model")
    for piece in ("e▁", "s▁", "t▁", "d▁", "r▁", "y▁"):
        model.pieces.add(piece=piece, score=100.0)
    (tmp_path / "t").mkdir()
    write_tokenizer(tmp_path / "t", model, None)
    assert "longer-than-base" in {one.check for one in check_extension([tmp_path / "t", base])}


def test_the_good_extension_changes_nothing(base: Path, tokenizer: Path) -> None:
    assert not list(check_extension([tokenizer, base]))


def test_transformers_reads_it_differently(copy: Path) -> None:
    set_config(copy, tokenizer_class="LlamaTokenizer")
    found = findings(copy)
    assert "transformers (LlamaTokenizer)" in found["reads-differently"].what
    assert "comes back as" in found["text-is-changed"].evidence[0]


def test_a_hugging_face_form_without_tokenizer_json(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    set_config(copy, tokenizer_class="LlamaTokenizer")
    assert findings(copy)["no-tokenizer-json"].severity == "warning"


def test_normalised_texts(tmp_path: Path) -> None:
    place = tiny.write_byte_level(tmp_path / "t", tiny.byte_level("nfc"))
    assert findings(place)["text-is-normalised"].severity == "note"


def test_characters_that_are_lost(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "<s>": 1, "</s>": 2} | {chr(code): code - 29 for code in range(32, 127)}
    fast = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    place = tiny.write_byte_level(
        tmp_path / "t", fast, unk_token="[UNK]", pad_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    assert findings(place)["unknown-characters"].severity == "error"


def test_a_bare_vocabulary(chinese_sp: Path, base: Path, tmp_path: Path) -> None:
    found = findings(chinese_sp)
    assert found["bare-vocabulary"].severity == "note"
    assert {one.severity for one in found.values()} == {"note"}
    shutil.copyfile(base / "tokenizer.model", tmp_path / "other.model")
    assert "another name" in findings(tmp_path / "other.model")["bare-vocabulary"].what
    (tmp_path / "other.model").write_bytes(b"\x00")
    assert findings(tmp_path / "other.model")["tokenizer-not-readable"].severity == "error"


def test_the_published_tokenizer(data: Path, tmp_path: Path) -> None:
    """345 dead pieces, as is known of it."""
    llama = read_model(data / "tokenizers" / "llama" / "tokenizer.model")
    model = append_missing(llama, read_model(data / "tokenizers" / "chinese_sp.model"))
    tiny.write_model(tmp_path / "tokenizer.model", model)
    found = findings(tmp_path)
    assert found["dead-pieces"].severity == "note"
    assert found["dead-pieces"].what.startswith("345 of the 17,953 pieces")
    assert found["tied-scores"].severity == "note"
    assert found["reads-differently"].severity == "warning"


def test_what_is_said_of_damaged_files_is_true(copy: Path, base: Path, tmp_path: Path) -> None:
    """A tokenizer.json that is there is not said to be missing; config.json is blamed for what is wrong in it."""
    set_config(copy, eos_token="<|im_end|>")
    told = findings(copy)["special-token-not-in-vocabulary"].remedy
    assert "pad" not in told and "</s>" in told
    (copy / "tokenizer.json").write_text("{")
    assert severities(copy)["invalid-json"] == "error"
    assert "no-tokenizer-json" not in findings(copy)
    shutil.copytree(base, tmp_path / "model")
    change(tmp_path / "model" / "config.json", lambda content: content | {"vocab_size": "420"})
    found = findings(tmp_path / "model")["config-field-wrong"]
    assert found.where.endswith("config.json") and "vocab_size" in found.evidence[0]


def test_a_model_that_ends_with_another_token(base: Path, tmp_path: Path) -> None:
    """Several ends are fine, as long as the tokenizer's is one; generation_config.json goes before config.json."""
    place = shutil.copytree(base, tmp_path / "model")
    for ends, told in ((7, True), ([7, 9], True), ([2, 7], False)):
        change(place / "generation_config.json", lambda content, ends=ends: content | {"eos_token_id": ends})
        assert ("special-ids-differ" in findings(place)) == told
    change(place / "config.json", lambda content: content | {"bos_token_id": 0, "eos_token_id": 5})
    assert "special-ids-differ" not in findings(place)
    change(place / "generation_config.json", lambda content: content | {"bos_token_id": None})
    found = findings(place)["special-ids-differ"]
    assert "stop" not in found.what and found.evidence == [
        "config.json: bos_token_id 0; the tokenizer's '<s>' is 1"
    ]
    (place / "generation_config.json").unlink()
    found = findings(place)["special-ids-differ"]
    assert "does not stop" in found.what and len(found.evidence) == 2


def test_chinese_words_that_sentencepiece_cuts_out(base: Path, tmp_path: Path) -> None:
    model = read_model(base / "tokenizer.model")
    for word in ("中国", "北京", "学校"):
        model.pieces.add(piece=word, type=4)
    tiny.write_model(tmp_path / "tokenizer.model", model)
    assert severities(tmp_path)["chinese-as-added-tokens"] == "warning"


def test_a_few_chinese_words_as_added_tokens(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for words, severity in ((["中国"], "note"), (["中国", "北京", "学校"], "warning")):
        auto = AutoTokenizer.from_pretrained(str(base))
        auto.add_tokens(words)
        auto.save_pretrained(str(tmp_path / severity))
        assert severities(tmp_path / severity)["chinese-as-added-tokens"] == severity
