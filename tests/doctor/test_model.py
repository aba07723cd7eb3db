"""What the doctor finds in broken models, and that it finds nothing in good ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chinese_llama.artifacts import MANIFEST, read_manifest, write_manifest
from chinese_llama.convert.convert import to_hf
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.model import check_model
from chinese_llama.doctor.things import recognise
from chinese_llama.model.resize import extend_model
from chinese_llama.model.shards import EMBED, HEAD
from tests import tiny
from tests.convert.checkpoints import checkpoint
from tests.doctor.broken import Q, change, checks, copied, grave, put, set_json, set_tensors, sharded

FILE = "model.safetensors"


def found(place: Path) -> dict[str, str]:
    return checks(check_model(recognise(place)))


def one(place: Path, check: str) -> Finding:
    return next(finding for finding in check_model(recognise(place)) if finding.check == check)


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return copied(base, tmp_path / "model")


# --- good ones


def test_good_models(base: Path, extended: Path, tokenizer: Path, tmp_path: Path) -> None:
    extend_model(base, tokenizer, tmp_path / "padded", pad_to_multiple_of=64)
    tiny.write_base(tmp_path / "tied", tiny.base_tokenizer(), tied=True)
    sharded(base, tmp_path / "sharded")
    for place in (base, extended, tmp_path / "padded", tmp_path / "tied", tmp_path / "sharded"):
        assert found(place) == {}, place


def test_a_good_checkpoint_of_metas(tmp_path: Path) -> None:
    checkpoint(tmp_path / "meta")
    assert grave(check_model(recognise(tmp_path / "meta"))) == []
    to_hf(tmp_path / "meta", tmp_path / "hf")
    assert grave(check_model(recognise(tmp_path / "hf"))) == []


def test_a_broken_checkpoint_of_metas(tmp_path: Path) -> None:
    place = tmp_path / "meta"
    checkpoint(place)
    shards = sorted(place.glob("*.pth"))
    good = shards[0].read_bytes()
    pointer(shards[0])
    assert found(place) == {"git-lfs-pointer": "error"}
    shards[0].write_bytes(good)
    set_json(place / "params.json", n_layers=7)
    assert found(place) == {"checkpoint-damaged": "error"}
    (place / "params.json").unlink()
    assert found(place) == {"checkpoint-damaged": "error"}
    proto = tiny.base_tokenizer()
    for number in range(1000):
        proto.pieces.add(piece=f"more{number}")
    checkpoint(tmp_path / "other")
    tiny.write_model(tmp_path / "other" / "tokenizer.model", proto)
    assert found(tmp_path / "other") == {"rows-do-not-fit": "error"}


# --- files


def pointer(file: Path) -> None:
    sha = "8c928db86b2a0cf73f019832f921eb7e1e069ca21441b4bfa12c4381c6cc46be"
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize 13476838400\n")


FILES: dict[str, Callable[[Path], Any]] = {
    "file-empty": lambda file: file.write_bytes(b""),
    "git-lfs-pointer": pointer,
    "file-is-text": lambda file: file.write_text("<!DOCTYPE html><html><body>Log in</body></html>"),
    "file-truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "file-damaged": lambda file: file.write_bytes(b"\0" * 200),
    "no-tensors": lambda file: save_file({}, file),
    "no-weights": lambda file: file.unlink(),
}


@pytest.mark.parametrize("check", FILES)
def test_a_file_that_is_no_weights(model: Path, check: str) -> None:
    FILES[check](model / FILE)
    assert found(model) == {check: "error"}


def test_a_header_that_is_cut_off(model: Path) -> None:
    (model / FILE).write_bytes((model / FILE).read_bytes()[:60])
    assert found(model) == {"file-truncated": "error"}


def test_a_pointer_names_what_is_published(model: Path) -> None:
    pointer(model / FILE)
    assert "chinese-llama-plus-7b" in one(model, "git-lfs-pointer").evidence[0]


def pickled(model: Path, content: Any) -> Path:
    (model / FILE).unlink()
    torch.save(content, model / "pytorch_model.bin")
    return model / "pytorch_model.bin"


def test_pickled_files(model: Path) -> None:
    tensors = load_file(model / FILE)
    file = pickled(model, tensors)
    assert found(model) == {}
    file.write_bytes(file.read_bytes()[:-2000])
    assert found(model) == {"file-truncated": "error"}
    file.write_text('{"error": "Invalid credentials"}')
    assert found(model) == {"file-is-text": "error"}


def test_a_pickle_with_more_than_tensors_is_not_executed(model: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (model / "owned",))

    file = model / "pytorch_model.bin"
    (model / FILE).unlink()
    torch.save({"x": Evil()}, file)
    assert found(model) == {"file-not-safe": "error"}
    assert not (model / "owned").exists()


def test_a_file_that_may_not_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / FILE).unlink()
    (model / FILE).symlink_to("/proc/1/mem" if Path("/proc/1/mem").exists() else "/dev/mem")
    assert set(found(model).values()) == {"error"}


def test_shards(base: Path, tmp_path: Path) -> None:
    place = sharded(base, tmp_path / "sharded")
    index, second = place / "model.safetensors.index.json", place / "model-00002-of-00002.safetensors"
    names = json.loads(index.read_text())["weight_map"]
    away = second.with_name(f"{second.name}.part")
    second.rename(away)
    assert found(place) == {"shard-missing": "error", "download-not-finished": "warning"}
    away.rename(second)
    index.write_text(json.dumps({"weight_map": {**names, "extra.weight": second.name}}))
    assert found(place) == {"tensor-not-in-shard": "error"}
    lost = {name: file for name, file in names.items() if name != Q}
    index.write_text(json.dumps({"weight_map": lost}))
    assert found(place) == {"tensor-not-in-index": "warning", "tensors-missing": "error"}
    index.write_text(json.dumps({"weight_map": {n: f for n, f in names.items() if f != second.name}}))
    assert found(place)["shard-not-in-index"] == "warning"
    bad = {"{": "invalid-json", "[]": "invalid-json", "{}": "index-damaged"}
    for content, check in {**bad, '{"weight_map": {"a": "../b.safetensors"}}': "index-damaged"}.items():
        index.write_text(content)
        assert found(place) == {check: "error"}
    index.unlink()
    assert found(place) == {"index-missing": "error"}
    second.unlink()
    assert found(place) == {"index-missing": "error", "shard-missing": "error"}


def test_weights_twice(model: Path) -> None:
    torch.save(load_file(model / FILE), model / "pytorch_model.bin")
    assert found(model) == {"weights-twice": "note"}


def test_what_a_training_saved(model: Path) -> None:
    save_file({f"base_model.model.{n}": t for n, t in load_file(model / FILE).items()}, model / FILE)
    assert found(model) == {"training-checkpoint": "error"}


def test_an_adapter_beside_weights(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    assert recognise(model).kind == "model"
    assert found(model) == {"adapter-beside-weights": "warning"}


# --- manifest


def test_what_was_changed_since_it_was_made(extended: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(extended, tmp_path / "extended"))
    assert found(place) == {}
    change(place / FILE, Q, put(0.5, 0, 0))
    assert found(place) == {"changed-since-made": "warning"}
    (place / FILE).unlink()
    assert found(place) == {"changed-since-made": "warning", "no-weights": "error"}
    (place / MANIFEST).write_text("{")
    assert found(place) == {"manifest-damaged": "error", "no-weights": "error"}


def test_a_forced_merge(extended: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(extended, tmp_path / "extended"))
    manifest = read_manifest(place)
    assert manifest
    manifest.metrics["forced"] = ["The adapter 'x' was trained on another base."]
    write_manifest(place, manifest)
    assert found(place) == {"merge-forced": "warning"}


# --- rows


def test_one_piece_less_than_rows(extended: Path, tmp_path: Path) -> None:
    """49,953 pieces on 49,954 rows."""
    place = copied(extended, tmp_path / "grown")
    for name in (EMBED, HEAD):
        change(place / FILE, name, lambda tensor: torch.cat([tensor, tensor[:1]]))
    rows = len(load_file(place / FILE)[EMBED])
    set_json(place / "config.json", vocab_size=rows)
    assert found(place) == {"rows-do-not-fit": "error"}
    told = one(place, "rows-do-not-fit").what
    assert f"{rows:,}" in told and f"{rows - 1:,}" in told


def test_sizes_of_the_vocabulary(model: Path) -> None:
    set_json(model / "config.json", vocab_size=419)
    assert found(model) == {"vocab-size-differs": "error"}
    set_json(model / "config.json", vocab_size=420)
    change(model / FILE, HEAD, lambda tensor: tensor[:410])
    assert found(model)["vocab-size-differs"] == "error"


def test_tied_and_untied(model: Path) -> None:
    set_json(model / "config.json", tie_word_embeddings=True)
    assert found(model) == {"tied-with-another-head": "error"}
    set_tensors(model / FILE, {HEAD: load_file(model / FILE)[EMBED]})
    assert found(model) == {}
    set_tensors(model / FILE, {HEAD: None})
    assert found(model) == {}
    set_json(model / "config.json", tie_word_embeddings=False)
    assert found(model) == {"untied-without-head": "error"}
    set_tensors(model / FILE, {EMBED: None})
    assert found(model) == {"embeddings-missing": "error"}


# --- numbers


def test_numbers_that_are_none(model: Path) -> None:
    change(model / FILE, Q, put(torch.nan, 3, slice(0, 5)))
    change(model / FILE, HEAD, put(torch.inf, 7))
    assert found(model) == {"not-finite": "error"}
    assert one(model, "not-finite").evidence == [
        f"{HEAD}: 0 NaN, 32 inf of 13,440",
        f"{Q}: 5 NaN, 0 inf of 1,024",
    ]


def test_zero_and_empty_tensors(model: Path) -> None:
    change(model / FILE, Q, torch.zeros_like)
    assert found(model) == {"zero-tensors": "error"}
    change(model / FILE, Q, lambda tensor: tensor[:0])
    assert found(model) == {"empty-tensors": "error"}


def test_new_blocks_may_begin_as_zero(model: Path) -> None:
    change(model / FILE, "model.layers.1.mlp.down_proj.weight", torch.zeros_like)
    assert found(model) == {"zero-tensors": "warning"}


def test_too_large_for_float16(model: Path) -> None:
    change(model / FILE, Q, put(70_000, 0, 0))
    assert found(model) == {"fp16-overflow": "note"}
    set_json(model / "config.json", dtype="float16")
    assert found(model) == {"fp16-overflow": "error", "dtypes-differ": "note"}


def test_rows_without_meaning(extended: Path, tmp_path: Path) -> None:
    def mean(tensor: torch.Tensor) -> torch.Tensor:
        tensor[420:] = tensor[:420].mean(0) + 1e-5 * torch.randn_like(tensor[420:])
        return tensor

    place = copied(extended, tmp_path / "model")
    change(place / FILE, EMBED, mean)
    assert found(place) == {"similar-rows": "warning"}
    change(place / FILE, EMBED, put(0.0, slice(420, None)))
    assert found(place) == {"zero-rows": "warning"}
    assert "ids 420-" in one(place, "zero-rows").evidence[0]
    change(place / FILE, EMBED, put(0.0, slice(0, None)))
    assert found(place) == {"zero-tensors": "error"}


def test_a_padding_row_is_no_trouble(model: Path) -> None:
    change(model / FILE, EMBED, put(0.0, 0))
    assert found(model) == {"zero-rows": "note"}


def test_new_rows_of_another_size(extended: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(extended, tmp_path / "model"))
    old = load_file(place / FILE)[EMBED]
    for factor in (1e-3, 1e5):
        set_tensors(place / FILE, {EMBED: torch.cat([old[:420], old[420:] * factor])})
        assert found(place)["row-norms"] == "warning"
