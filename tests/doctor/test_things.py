"""What the doctor takes a path for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chinese_llama.artifacts import sha256_file
from chinese_llama.doctor import things
from chinese_llama.doctor.data import check_unknown
from chinese_llama.doctor.finding import guarded
from chinese_llama.doctor.model import check_model
from chinese_llama.doctor.things import recognise
from chinese_llama.doctor.tokenizer import check_tokenizer
from chinese_llama.merging.registry import Registry, registry
from chinese_llama.workspace import FILE
from tests.convert.checkpoints import checkpoint
from tests.doctor.broken import checks, copied
from tests.merging import making


def test_kinds(
    base: Path, extended: Path, tokenizer: Path, chinese_sp: Path, work: Path, tmp_path: Path
) -> None:
    checkpoint(tmp_path / "meta")
    making.make(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    shutil.copy(work / "zh.jsonl", tmp_path / "outer" / "inner")
    kinds = {
        base: "model",
        base / "config.json": "model",
        base / "model.safetensors": "model",
        extended: "model",
        tokenizer: "tokenizer",
        base / "tokenizer.json": "tokenizer",
        base / "tokenizer.model": "tokenizer",
        chinese_sp: "vocabulary",
        chinese_sp.parent: "vocabulary",
        work / "zh.jsonl": "data",
        tmp_path / "outer": "data",
        tmp_path / "meta": "meta checkpoint",
        tmp_path / "meta" / "params.json": "meta checkpoint",
        tmp_path / "adapter": "adapter",
        tmp_path / "adapter" / "adapter_model.safetensors": "adapter",
        tmp_path / "empty": "unknown",
        tmp_path / "nothing": "unknown",
    }
    assert {path: recognise(path).kind for path in kinds} == kinds


def test_a_file_of_a_directory_stands_for_it(base: Path) -> None:
    assert recognise(base / "model.safetensors").path == base
    assert recognise(base / "tokenizer.json").path == base / "tokenizer.json"


def test_titles(base: Path, extended: Path, tmp_path: Path) -> None:
    assert recognise(base).title == "a model (llama), 2 layers, hidden size 32, 420 rows, float32"
    assert recognise(extended).title.endswith("made by extend-model")
    place = making.make(tmp_path / "x", base_model_name_or_path="some/base")
    assert recognise(place).title == "a LoRA adapter, r 1, alpha 2, of some/base"
    assert recognise(tmp_path / "no").title == "does not exist"


def test_facts_of_any_type_make_a_title(base: Path, tmp_path: Path) -> None:
    place = copied(base, tmp_path / "model")
    for value in ("x", None, [1], {"a": 1}, 1.5, True):
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "dtype", "model_type")
        (place / "config.json").write_text(json.dumps(dict.fromkeys(names, value)))
        assert recognise(place).title.startswith("a model")
        (place / "adapter_config.json").write_text(
            json.dumps({"r": value, "lora_alpha": value, "peft_type": value})
        )
        assert recognise(place / "adapter_config.json").kind == "model"
        (place / "adapter_config.json").unlink()


def test_a_snapshot_of_the_hub(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    copied(base, cache / "snapshots" / "0123")
    (cache / "refs").mkdir()
    assert recognise(cache).path == cache / "snapshots" / "0123"
    assert recognise(cache).kind == "model"


def test_the_snapshot_that_main_names(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--a--b"
    for name in ("0123", "4567"):
        copied(base, cache / "snapshots" / name)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    assert recognise(cache).path == cache / "snapshots" / "0123"
    assert recognise(tmp_path).facts["inside"] == [str(cache / "snapshots" / "0123")]


def test_what_lies_deep(base: Path, tmp_path: Path) -> None:
    """Settings are no data, and of the checkpoints of a run the last counts."""
    copied(base, tmp_path / "models" / "llama" / "7b")
    for step in (5, 10, 100):
        making.make(tmp_path / "runs" / "one" / f"checkpoint-{step}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text('[{"text": "x"}]')
    (tmp_path / "data" / "settings.json").write_text('{"a": 1}')
    (tmp_path / "requirements.txt").write_text("torch")
    assert [str(Path(place).relative_to(tmp_path)) for place in recognise(tmp_path).facts["inside"]] == [
        "data/a.json",
        "models/llama/7b",
        "runs/one/checkpoint-100",
    ]
    assert recognise(tmp_path / "models" / "llama" / "7b" / "generation_config.json").kind == "model"


def test_a_workspace(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("base: [")
    assert [recognise(path).kind for path in (tmp_path, tmp_path / FILE)] == ["workspace", "workspace"]


def test_a_directory_of_directories_names_them(base: Path, tmp_path: Path) -> None:
    copied(base, tmp_path / "model")
    (tmp_path / "zh.jsonl").write_text('{"text": "x"}')
    thing = recognise(tmp_path)
    assert thing.kind == "unknown"
    assert thing.facts["inside"] == [str(tmp_path / "model"), str(tmp_path / "zh.jsonl")]


def test_published_files_are_known_by_their_sha256(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tests.model.test_adapters import peft_adapter

    assert recognise(data / "tokenizers" / "llama").published == "LLaMA"
    assert recognise(data / "tokenizers" / "chinese_sp.model").published == "chinese_sp.model"
    place = peft_adapter(base, tmp_path / "mine")
    torch.save(load_file(place / "adapter_model.safetensors"), place / "adapter_model.bin")
    (place / "adapter_model.safetensors").unlink()
    model = copied(base, tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert (recognise(place).published, recognise(model).published) == (None, None)
    known = registry()
    entry = replace(known.adapters["chinese-llama-7b"], sha256=sha256_file(place / "adapter_model.bin"))
    llama = replace(
        known.bases["LLaMA-7B"],
        hidden_size=32,
        layers=2,
        huggingface=(sha256_file(model / "pytorch_model.bin"),),
    )
    changed = Registry({"LLaMA-7B": llama}, known.tokenizers, {entry.name: entry})
    monkeypatch.setattr(things, "registry", lambda: changed)
    assert recognise(place).published == "chinese-llama-7b"
    assert recognise(model).published == "LLaMA-7B"


def test_what_nobody_foresaw_is_a_finding(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception):  # type: ignore[no-untyped-def]
        raise error
        yield

    (finding,) = guarded(tmp_path, fails(TypeError("no len()")))
    assert (finding.severity, finding.check, finding.evidence) == (
        "error",
        "not-examined",
        ["TypeError: no len()"],
    )
    (finding,) = guarded(tmp_path, fails(PermissionError(13, "Permission denied", "x")))
    assert (finding.severity, finding.check, finding.where) == ("error", "file-not-readable", "x")
    monkeypatch.setattr(things, "_kind", lambda path: next(fails(PermissionError(13, "Permission denied"))))
    assert recognise(base).facts == {"problem": "Permission denied"}
    assert list(check_model(recognise(tmp_path / "gone")))


def test_no_library_writes_into_the_report(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Old files say "__type", of which the tokenizers library speaks on stdout, past Python."""
    place = copied(base, tmp_path / "model")
    (place / "tokenizer.json").unlink()
    token = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False, "normalized": True}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (place / name).write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": token}))
    list(check_tokenizer(recognise(place)))
    assert capfd.readouterr().out == ""


def test_what_is_not_there_yet(base: Path, tmp_path: Path) -> None:
    """A model without a tokenizer; a download that was broken off, given by itself, or by aria2 beside the weights."""
    place = copied(base, tmp_path / "model")
    for file in place.glob("tokenizer*"):
        file.unlink()
    assert checks(check_tokenizer(recognise(place))) == {"no-tokenizer": "note"}
    hidden = place / ".cache/huggingface/download/a folder"  # of `hf download --local-dir`
    hidden.mkdir(parents=True)
    (hidden / "vN3=.9f86.incomplete").write_bytes(b"\x00")
    assert checks(check_model(recognise(place)))["download-not-finished"] == "warning"
    (place / "model.safetensors.aria2").write_bytes(b"\x00")
    assert checks(check_model(recognise(place)))["download-not-finished"] == "error"
    (tmp_path / "zh.jsonl.crdownload").write_text("{")
    assert checks(check_unknown(recognise(tmp_path / "zh.jsonl.crdownload"))) == {
        "download-not-finished": "error"
    }
