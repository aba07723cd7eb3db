"""Directories from one form into the other and back, bit for bit, and right in what they compute."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from chinese_llama.artifacts import Manifest, identity, read_manifest, write_manifest
from chinese_llama.convert.convert import convert, layout_of, to_hf, to_meta
from chinese_llama.convert.meta import MetaWeights
from chinese_llama.directories import MANIFEST
from chinese_llama.errors import BadFile, DoesNotFit, OutputExists, UserError
from chinese_llama.model.shards import EMBED, HEAD, Change, Changed, Weights, save_shards
from tests import tiny
from tests.convert.checkpoints import (
    PARAMS,
    Tensors,
    assert_same,
    assert_same_checkpoint,
    checkpoint,
    logits,
    read_checkpoint,
    whole,
)


def tensors_of(place: Path) -> Tensors:
    weights = Weights(place)
    return {name: weights.load(name) for name in weights}


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_meta_and_back(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    """421 rows: the last shard has one more."""
    place = checkpoint(tmp_path / "meta", shards, dtype=dtype)
    to_hf(place, tmp_path / "hf")
    to_meta(tmp_path / "hf", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", place)


@pytest.mark.parametrize(
    "options",
    [
        {"n_kv_heads": 2, "ffn_dim_multiplier": 1.1, "vocab_size": 421},
        {"embedding": 0, "ropes": []},
        {"ropes": ["rope.freqs", "layers.0.attention.inner_attention.rope.freqs"], "rope_theta": 1000000.0},
    ],
    ids=str,
)
def test_every_kind_of_meta_and_back(tmp_path: Path, options: dict[str, Any]) -> None:
    place = checkpoint(tmp_path / "meta", 2, **options)
    to_hf(place, tmp_path / "hf")
    to_meta(tmp_path / "hf", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", place)


@pytest.mark.parametrize("shards", [None, 2])
def test_hf_and_back(tmp_path: Path, base: Path, shards: int | None) -> None:
    to_meta(base, tmp_path / "meta", shards)
    assert len(list((tmp_path / "meta").glob("*.pth"))) == (shards or 1)
    to_hf(tmp_path / "meta", tmp_path / "back")
    assert_same([tensors_of(tmp_path / "back")], [tensors_of(base)])
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (base / file).read_bytes(), file
    before, after = (
        AutoModelForCausalLM.from_pretrained(place).config for place in (base, tmp_path / "back")
    )
    names = (
        "max_position_embeddings",
        "rope_parameters",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "dtype",
    )
    assert {name: getattr(after, name) for name in names} == {name: getattr(before, name) for name in names}
    assert after.max_position_embeddings == 128  # which Meta's form does not say


@pytest.mark.parametrize(
    "options", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "rope_theta": 500.0, "norm_eps": 0.01}], ids=str
)
def test_the_converted_model_computes_what_metas_does(tmp_path: Path, options: dict[str, Any]) -> None:
    shards = 2 if options.get("n_kv_heads") != 1 else 1
    place = checkpoint(tmp_path / "meta", shards, dtype=torch.float32, **options)
    to_hf(place, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.arange(3, 400, 13)
    with torch.no_grad():
        found = model(ids[None]).logits[0].double()
    params = {**PARAMS, **options}
    expected = logits(whole(params, dtype=torch.float32), params, ids)
    assert expected.std() > 1
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    # and the test would see it if positions were turned otherwise
    other = logits(whole(params, dtype=torch.float32), {**params, "rope_theta": 600.0}, ids)
    assert (found - other).abs().max() > 1e-2 * expected.abs().max()


def test_what_is_merged_from_it_gets_metas_files_too(tmp_path: Path) -> None:
    """A model with other weights, a grown vocabulary, and the manifest's entry copied along."""
    place = checkpoint(tmp_path / "meta", 2, vocab=420, n_kv_heads=2, custom="kept")
    source = to_hf(place, tmp_path / "hf")
    weights, merged = Weights(tmp_path / "hf"), tmp_path / "merged"
    merged.mkdir()
    rows = torch.randn(425, 32).half()
    changes = {
        name: Change((425, 32), torch.float16, lambda start, stop: rows[start:stop]) for name in (EMBED, HEAD)
    }
    save_shards(Changed(weights, changes), merged, "testing")
    (merged / "config.json").write_text(json.dumps({**weights.config(), "vocab_size": 425}))
    write_manifest(merged, Manifest("model", "merge", settings={"meta": source.settings["meta"]}))
    to_meta(merged, tmp_path / "back")
    found, params = read_checkpoint(tmp_path / "back")
    expected, before = read_checkpoint(place)
    assert params == before
    for number, (low, high) in enumerate([(0, 212), (212, 425)]):
        expected[number]["output.weight"] = rows[low:high].clone()
        expected[number]["tok_embeddings.weight"] = rows[:, 16 * number : 16 * number + 16].clone()
    assert_same(found, expected)


def test_a_checkpoint_divided_anew(tmp_path: Path) -> None:
    place = checkpoint(tmp_path / "meta", 2)
    to_meta(place, tmp_path / "one", shards=1)
    to_meta(tmp_path / "one", tmp_path / "two", shards=2)
    assert len(read_checkpoint(tmp_path / "one")[0]) == 1
    assert_same_checkpoint(tmp_path / "two", place)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """As Meta lays them out: the tokenizer above the checkpoint."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copyfile(base / "tokenizer.model", folder / "tokenizer.model")
    return checkpoint(folder / "7B", 2, vocab=420)


def test_what_lies_in_the_result(tmp_path: Path, llama: Path, base: Path) -> None:
    manifest = to_hf(llama, tmp_path / "hf", context=512)
    assert read_manifest(tmp_path / "hf") == manifest
    assert (manifest.kind, manifest.command, manifest.vocab_size) == ("model", "convert", 420)
    assert manifest.inputs == {
        "base": {"path": str(llama), "sha256": identity(llama)},
        "tokenizer": {
            "path": str(llama.parent / "tokenizer.model"),
            "sha256": identity(base / "tokenizer.model"),
        },
    }
    assert manifest.settings["context"] == 512
    assert manifest.metrics["rows"] == 420
    assert manifest.sha256 == identity(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        tokenizer("The river bank").input_ids
        == AutoTokenizer.from_pretrained(base)("The river bank").input_ids
    )
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512


def test_identity_is_that_of_the_weights(tmp_path: Path, llama: Path) -> None:
    """Of Meta's form too: another shard is another base."""
    copy = tmp_path / "7B"
    shutil.copytree(llama, copy)
    shutil.copyfile(llama.parent / "tokenizer.model", copy / "tokenizer.model")
    assert identity(copy) == identity(llama)
    shutil.copyfile(copy / "consolidated.00.pth", copy / "consolidated.01.pth")
    assert identity(copy) != identity(llama)


def test_manifest_of_metas_form(tmp_path: Path, base: Path) -> None:
    manifest = to_meta(base, tmp_path / "meta", 2)
    assert sorted(manifest.files) == ["consolidated.00.pth", "consolidated.01.pth"]
    assert manifest.settings == {
        "to": "meta",
        "shards": 2,
        "hf": {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2},
    }
    (tmp_path / "meta" / MANIFEST).unlink()
    assert identity(tmp_path / "meta") == manifest.sha256
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_a_result_that_stands_is_kept(tmp_path: Path, llama: Path) -> None:
    made = to_hf(llama, tmp_path / "hf")
    stamp = (tmp_path / "hf" / MANIFEST).stat().st_mtime_ns
    assert to_hf(llama, tmp_path / "hf", keep=True) == made
    assert (tmp_path / "hf" / MANIFEST).stat().st_mtime_ns == stamp
    with pytest.raises(OutputExists, match="with context 2048, and 64 is asked for"):
        to_hf(llama, tmp_path / "hf", context=64, keep=True)
    with pytest.raises(OutputExists, match="--force replaces it"):
        to_hf(llama, tmp_path / "hf")
    to_hf(llama, tmp_path / "hf", context=64, force=True)
    assert Weights(tmp_path / "hf").config()["max_position_embeddings"] == 64
    made = to_meta(tmp_path / "hf", tmp_path / "meta")
    assert to_meta(tmp_path / "hf", tmp_path / "meta", keep=True) == made
    with pytest.raises(OutputExists, match="with shards 2, and 1 is asked for"):
        to_meta(tmp_path / "hf", tmp_path / "meta", shards=1, keep=True)


def test_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = to_hf(checkpoint(tmp_path / "meta"), tmp_path / "hf")
    assert "converted without a tokenizer" in capsys.readouterr().err
    assert manifest.vocab_size == 421
    to_meta(tmp_path / "hf", tmp_path / "back")
    assert "converted without a tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_metas_code_cannot_read(tmp_path: Path) -> None:
    place = tiny.write_llama(tmp_path / "hf", 500)
    tiny.write_byte_level(place, tiny.byte_level())
    with pytest.raises(DoesNotFit, match=r"has no tokenizer.model; Meta's code reads no tokenizer.json"):
        to_meta(place, tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def test_what_is_no_checkpoint(tmp_path: Path, base: Path) -> None:
    with pytest.raises(BadFile, match=r"params.json: no such file"):
        to_hf(base, tmp_path / "out")
    with pytest.raises(BadFile, match=r"no config.json"):
        to_meta(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="--context 0: must be at least 1"):
        to_hf(base, tmp_path / "out", context=0)
    with pytest.raises(DoesNotFit, match="key/value heads do not divide over 4 shards"):
        to_meta(base, tmp_path / "out", shards=4)
    assert not (tmp_path / "out").exists()


def test_space_is_looked_for_first(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 10, 100_000))
    with pytest.raises(UserError, match="are to be written"):
        to_hf(llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_source_is_not_replaced(tmp_path: Path, llama: Path) -> None:
    to_hf(llama, tmp_path / "hf")
    with pytest.raises(UserError, match="is or holds an input"):
        to_meta(tmp_path / "hf", tmp_path / "hf", force=True)


def test_layout_of_a_model_that_never_was_metas(base: Path, llama: Path) -> None:
    assert layout_of(base, Weights(base)) is None
    model = MetaWeights(llama)
    assert layout_of(llama, model) == model.layout()


def test_directions(tmp_path: Path, llama: Path, base: Path) -> None:
    convert(llama, tmp_path / "hf", "hf", "meta", context=512)
    assert Weights(tmp_path / "hf").config()["max_position_embeddings"] == 512
    convert(tmp_path / "hf", tmp_path / "one", "meta", shards=1)
    convert(tmp_path / "one", tmp_path / "two", "meta", "meta", shards=2)  # divided anew
    assert_same_checkpoint(tmp_path / "two", llama)
    convert(base, tmp_path / "hf", "meta", "hf", force=True)
    assert len(read_checkpoint(tmp_path / "hf")[0]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "meta", "origin": "meta"}, "is not in Meta's form, but in Hugging Face's: --from hf"),
        ({"to": "hf"}, "is in Hugging Face's form already"),
        ({"to": "meta", "context": 512}, "--context is for --to hf"),
    ],
)
def test_directions_that_make_no_sense(
    tmp_path: Path, base: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        convert(base, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_shards_are_metas(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(UserError, match="--shards is for --to meta"):
        convert(llama, tmp_path / "out", "hf", shards=2)
