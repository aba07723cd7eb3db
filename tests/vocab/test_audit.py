"""The audit finds what is wrong with a tokenizer, and counts a corpus right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from chinese_llama.errors import BadFile, UserError
from chinese_llama.vocab import merge, report
from chinese_llama.vocab.audit import (
    BATCH,
    EXAMPLES,
    PROBES,
    SHOWN,
    audit_vocab,
    check_contract,
    dead_pieces,
    probe_texts,
)
from chinese_llama.vocab.fast import write_tokenizer
from chinese_llama.vocab.proto import NORMAL, encoder, read_base, read_model
from chinese_llama.vocab.readers import open_readers
from chinese_llama.vocab.select import Selection
from tests import tiny
from tests.vocab.strategies import CLASSES


def written(directory: Path, model: model_pb2.ModelProto) -> Path:
    directory.mkdir()
    write_tokenizer(directory, model, None)
    return directory


def grown(base: Path, pieces: dict[str, float]) -> model_pb2.ModelProto:
    """The base with pieces and scores appended as they are, sensible or not."""
    model = read_base(base)
    for piece, score in pieces.items():
        model.pieces.add(piece=piece, score=score, type=NORMAL)
    return model


def checked(base: Path, directory: Path, texts: list[str] | None = None) -> dict[str, Any]:
    """The contract between two tokenizers on `texts` (None: the probe texts)."""
    return check_contract(open_readers(base)[0], *open_readers(directory), texts)


def dead(model: model_pb2.ModelProto, first: int, tmp_path: Path) -> list[str]:
    return dead_pieces(open_readers(tiny.write_model(tmp_path / "dead.model", model))[0], first)


def test_the_extended_tokenizer_keeps_its_contract(base: Path, tokenizer: Path) -> None:
    checks = checked(base, tokenizer)
    assert (checks["dead"], checks["broken"], checks["examples"]) == ([], [], {})
    assert {problem: checks[problem] for problem in report.PROBLEMS} == dict.fromkeys(report.PROBLEMS, 0)
    assert checks["documents"] == len(list(probe_texts())) > len(PROBES)
    assert 0 < checks["without_chinese"] < checks["documents"]
    assert checks["characters_per_token"] > checks["base_characters_per_token"]


def test_the_contract_holds_on_every_class_of_text(base: Path, tokenizer: Path) -> None:
    assert checked(base, tokenizer, list(CLASSES.values()))["broken"] == []


def test_a_dead_piece_is_found(base: Path, tmp_path: Path) -> None:
    model = grown(base, {"中": -900.0, "国": -901.0, "人": -902.0, "中国人": -903.0})
    size = len(read_base(base).pieces)
    assert dead(model, size, tmp_path) == ["中国人"]
    checks = checked(base, written(tmp_path / "out", model))
    assert checks["dead"] == ["中国人"]
    assert "the piece '中国人' cannot be produced." in checks["broken"]


def test_the_base_has_no_dead_piece_that_the_audit_counts_as_new(base: Path, tmp_path: Path) -> None:
    model = read_base(base)
    assert dead(model, len(model.pieces), tmp_path) == []


def test_text_without_chinese_that_changes_is_found(base: Path, tmp_path: Path) -> None:
    model = grown(base, {"20": 0.0})
    directory = written(tmp_path / "out", model)
    checks = checked(base, directory, ["the", "in 2023"])
    assert checks["changed"] == 1
    assert checks["broken"] == ["text without Chinese is tokenised differently than by the base 'in 2023'."]


def test_a_renamed_old_id_is_found(base: Path, tmp_path: Path) -> None:
    model = read_base(base)
    model.pieces[300].piece = "中国"
    directory = written(tmp_path / "out", model)
    was = read_base(base).pieces[300].piece
    checks = checked(base, directory, [])
    assert checks["broken"] == [f"id 300 was {was!r} and is '中国'."]


def test_text_that_gets_longer_is_found(base: Path, tmp_path: Path) -> None:
    """A piece that is preferred over the base's own merges breaks these up."""
    model = grown(base, {"az": 5.0})
    fox = tiny.ENGLISH[0]
    assert len(encoder(model).encode(fox)) > len(encoder(read_base(base)).encode(fox))
    checks = checked(base, written(tmp_path / "out", model), [fox, "the"])
    assert checks["longer"] == 1
    assert f"more tokens than under the base for {fox!r}." in checks["broken"]


def test_readers_that_disagree_are_found(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    shutil.copytree(tokenizer, directory)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) != "北京"]
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    checks = checked(base, directory, ["在北京"])
    assert checks["disagreements"] == 1
    assert "SentencePiece and tokenizer.json give different ids for '在北京'." in checks["broken"]
    told = audit_vocab(directory, [tiny.write_texts(tmp_path / "zh.jsonl", ["在北京", "你好"])])
    assert told["files"][str(tmp_path / "zh.jsonl")]["disagreements"] == 1
    assert told["examples"] == {"disagreements": ["在北京"]}
    assert "read differently by SentencePiece and tokenizer.json: '在北京'" in report.summary(told)


def test_a_strict_tokenizer_that_breaks_its_contract_is_not_written(
    base: Path, chinese_sp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "select", lambda *_: Selection(["中国人", "中", "国", "人"]))
    with pytest.raises(UserError, match=r"breaks its contract: the piece '中国人' cannot be produced\."):
        merge.extend_vocab(base, chinese_sp, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_figures_of_a_corpus(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    texts = tiny.CHINESE[:5] * (BATCH // 5 + 5) + ["the 2023 <s>"]
    path = tiny.write_texts(tmp_path / "mixed.jsonl", texts)
    told = audit_vocab(tokenizer, [path], base)
    figures = told["files"][str(path)]
    new, old = encoder(read_model(tokenizer / "tokenizer.model")), encoder(read_base(base))
    characters, tokens = sum(map(len, texts)), sum(map(len, new.encode(texts)))
    assert figures["documents"] == len(texts)
    assert figures["characters"] == characters
    assert figures["bytes"] == sum(len(text.encode()) for text in texts)
    assert figures["tokens"] == tokens
    assert figures["base_tokens"] == sum(map(len, old.encode(texts)))
    assert figures["characters_per_token"] == pytest.approx(characters / tokens)
    assert figures["base_characters_per_token"] == pytest.approx(characters / figures["base_tokens"])
    assert figures["characters_per_token"] > 2 * figures["base_characters_per_token"]
    assert (figures["changed"], figures["longer"], figures["disagreements"]) == (0, 0, 0)
    assert (told["vocab_size"], told["base_vocab_size"]) == (new.get_piece_size(), old.get_piece_size())
    assert (told["dead"], told["examples"]) == ([], {})


def test_unused_pieces_are_those_that_no_document_holds(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    path = tiny.write_texts(tmp_path / "one.jsonl", ["北京"])
    told = audit_vocab(tokenizer, [path], base)
    model = read_model(tokenizer / "tokenizer.model")
    new = [piece.piece for piece in model.pieces[told["base_vocab_size"] :]]
    used = encoder(model).encode("北京", out_type=str)
    assert told["unused"] == [piece for piece in new if piece not in used]
    assert len(told["unused"]) < len(new)


def test_without_a_base_there_are_no_comparisons(tokenizer: Path, work: Path) -> None:
    told = audit_vocab(tokenizer, [work / "zh.jsonl", work / "en.jsonl"])
    assert told["base_vocab_size"] is None
    assert list(told["files"]) == [str(work / "zh.jsonl"), str(work / "en.jsonl")]
    assert not any(
        "base" in key or key in ("changed", "longer") for key in told["files"][str(work / "zh.jsonl")]
    )


def test_examples_are_few_and_short(base: Path, tmp_path: Path) -> None:
    directory = written(tmp_path / "out", grown(base, {"20": 0.0}))
    path = tiny.write_texts(tmp_path / "en.jsonl", [f"{number} in 2023 " + "a" * 400 for number in range(20)])
    told = audit_vocab(directory, [path], base)
    assert told["files"][str(path)]["changed"] == 20
    assert [len(text) for text in told["examples"]["changed"]] == [SHOWN] * EXAMPLES


def test_an_example_shows_where_the_two_part(base: Path, tmp_path: Path) -> None:
    directory = written(tmp_path / "out", grown(base, {"20": 0.0}))
    texts = ["the sea " * 500 + "in 2023" + " and more" * 500, "😀é" * 300 + " in 2023"]
    checks = checked(base, directory, texts)
    assert checks["changed"] == 2
    for text, example in zip(texts, checks["examples"]["changed"], strict=True):
        assert "2023" in example
        assert example in text
        assert len(example) <= SHOWN


def test_disagreements_come_with_examples_of_every_file(data: Path, work: Path, tmp_path: Path) -> None:
    """What Chinese-LLaMA published is read differently by its two readers."""
    folder = data / "tokenizers"
    merge.extend_vocab(folder / "llama", folder / "chinese_sp.model", tmp_path / "out", "reference")
    files = [
        tiny.write_texts(tmp_path / "a.jsonl", [text for text in probe_texts() if text.strip()]),
        tiny.write_texts(tmp_path / "b.jsonl", ["In 2023 and 1010"]),
    ]
    told = audit_vocab(tmp_path / "out", files, folder / "llama")
    assert told["files"][str(files[0])]["disagreements"] >= len(told["examples"]["disagreements"]) > 0
    assert told["files"][str(files[1])]["changed"] == 1
    page, summary = report.markdown(told), report.summary(told)
    for problem, examples in told["examples"].items():
        assert 0 < len(examples) <= EXAMPLES
        assert repr(examples[0]) in summary
        assert page.count(f"{report.PROBLEMS[problem]}, for example: `") == len(examples)


def test_the_probe_texts_of_a_file_come_too(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    own = tiny.write_texts(tmp_path / "own.jsonl", ["mine", "我的"])
    assert list(probe_texts(own)) == [*probe_texts(), "mine", "我的"]
    assert set(PROBES) <= set(probe_texts())


def test_scripts_are_counted_for_the_tokenizer_and_its_base(
    base: Path, tokenizer: Path, tmp_path: Path
) -> None:
    path = tiny.write_texts(tmp_path / "mixed.jsonl", ["北京，the 20", "北京"])
    scripts = audit_vocab(tokenizer, [path], base)["files"][str(path)]["scripts"]
    assert scripts == {
        "Han and kana": {"characters": 4, "tokens": 2, "base_tokens": 12},
        "Chinese marks": {"characters": 1, "tokens": 1, "base_tokens": 3},
        "Latin letters": {"characters": 3, "tokens": 2, "base_tokens": 2},
        "digits": {"characters": 2, "tokens": 2, "base_tokens": 2},
        "spaces": {"characters": 1, "tokens": 1, "base_tokens": 1},
    }


def test_a_character_per_token_is_never_counted_from_texts_whose_tokens_are_not(
    base: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """The tokens of a text with a literal space mark cannot be told apart by script; so its characters
    must not make those of others look longer."""
    ratios = []
    for texts in (["北京是北京"], ["北京是北京", "北京是▁北京" * 5]):
        path = tiny.write_texts(tmp_path / "marks.jsonl", texts)
        figures = audit_vocab(tokenizer, [path], base)["files"][str(path)]
        han = figures["scripts"]["Han and kana"]
        ratios.append((han["characters"] / han["tokens"], figures["non_ascii_per_token"]))
    assert ratios[0] == ratios[1]


def test_a_bare_model_file_is_audited_without_a_second_reader(
    base: Path, tokenizer: Path, work: Path, tmp_path: Path
) -> None:
    shutil.copy(tokenizer / "tokenizer.model", tmp_path / "bare.model")
    told = audit_vocab(tmp_path / "bare.model", [work / "zh.jsonl"], base / "tokenizer.model")
    whole = audit_vocab(tokenizer, [work / "zh.jsonl"], base)
    figures, both = (one["files"][str(work / "zh.jsonl")] for one in (told, whole))
    assert "disagreements" not in figures
    assert {**figures, "disagreements": 0} == both
    assert {key: told[key] for key in ("dead", "unused", "vocab_size", "base_vocab_size")} == {
        key: whole[key] for key in ("dead", "unused", "vocab_size", "base_vocab_size")
    }


def test_a_corpus_that_cannot_be_read_is_named(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"gone\.jsonl: no such file"):
        audit_vocab(tokenizer, [tmp_path / "gone.jsonl"])
    with pytest.raises(BadFile, match=r"has neither tokenizer\.model nor tokenizer\.json"):
        audit_vocab(tmp_path, [tmp_path / "gone.jsonl"])


def test_the_probes_hold_what_is_hard() -> None:
    text = "\n".join(PROBES)
    assert "" in PROBES
    assert all(part in text for part in ("<s>", "[PAD]", "▁", "\t", "   ", "２３", "\U0001f600", "𠮷"))


def test_the_reference_changes_english_and_the_audit_says_so(data: Path, tmp_path: Path) -> None:
    folder = data / "tokenizers"
    report = merge.extend_vocab(folder / "llama", folder / "chinese_sp.model", tmp_path / "out", "reference")
    assert report["checks"]["changed"] > 0
    assert report["checks"]["disagreements"] > 0


def test_a_base_larger_than_the_tokenizer_is_only_compared_with(
    base: Path, tokenizer: Path, work: Path
) -> None:
    told = audit_vocab(base, [work / "zh.jsonl"], tokenizer)
    assert report.summary(told).startswith(f"{told['vocab_size']:,} pieces, ")
    assert f"Compared with `{tokenizer}`: {told['base_vocab_size']:,} pieces." in report.markdown(told)
