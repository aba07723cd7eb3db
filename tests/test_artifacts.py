"""Manifests say what a directory is and what it was made from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.artifacts import (
    Manifest,
    identity,
    identity_files,
    input_record,
    read_manifest,
    stands,
    write_manifest,
)
from chinese_llama.directories import MANIFEST
from chinese_llama.errors import BadFile, OutputExists


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def artifact(folder: Path, content: bytes = b"weights", **fields: Any) -> Manifest:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return write_manifest(folder, Manifest("model", "test", **fields))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
)
FIELDS = st.dictionaries(st.text(), JSON)


@settings(deadline=None, max_examples=50)
@given(FIELDS, st.none() | st.integers())
def test_a_manifest_comes_back(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], size: int | None
) -> None:
    folder = tmp_path_factory.mktemp("m")
    written = artifact(folder, settings=values, vocab_size=size, metrics=values)
    assert read_manifest(folder) == written
    assert written.sha256 == identity(folder)
    assert written.files["model.safetensors"]["sha256"] == identity(folder / "model.safetensors")


def test_a_newer_manifest_is_read(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    written = artifact(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({**asdict(written), "of_tomorrow": 1}), encoding="utf-8")
    assert read_manifest(tmp_path) == written


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"kind": "x"}', b"\xff", b"3"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BadFile, match=r"chinese_llama\.json: is not a manifest of this tool"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["a.safetensors", "tokenizer.model", "config.json"], ["a.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "tokenizer.model"], ["pytorch_model.bin"]),
        (["adapter_config.json", "adapter_model.bin"], ["adapter_model.bin", "adapter_config.json"]),
        (["tokenizer.json", "tokenizer.model", "notes.txt"], ["tokenizer.json", "tokenizer.model"]),
        (["chinese_sp.model", "notes.txt"], ["chinese_sp.model"]),
    ],
)
def test_what_makes_up_an_identity(tmp_path: Path, files: list[str], wanted: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_text(name)
    assert [path.name for path in identity_files(tmp_path)] == wanted


@settings(deadline=None, max_examples=50)
@given(st.binary(min_size=1, max_size=64), st.data())
def test_one_byte_changes_the_identity(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("i")
    artifact(folder, content)
    before = identity(folder), identity(folder / "model.safetensors")
    (folder / MANIFEST).unlink()
    assert identity(folder) == before[0]
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytes([*content[:place], content[place] ^ 1, *content[place + 1 :]])
    (folder / "model.safetensors").write_bytes(changed)
    assert identity(folder) != before[0]
    assert identity(folder / "model.safetensors") != before[1]


def test_recorded_hashes_are_trusted_only_while_size_and_time_stand(tmp_path: Path) -> None:
    """A large base is read once; a changed one is read again."""
    recorded = artifact(tmp_path, b"weights").sha256
    weights = tmp_path / "model.safetensors"
    times = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    assert identity(tmp_path) != recorded
    os.utime(weights, ns=(0, times.st_mtime_ns))
    assert identity(tmp_path) == recorded
    weights.write_bytes(b"longer weights")
    os.utime(weights, ns=(0, times.st_mtime_ns))
    assert identity(tmp_path) != recorded


def test_a_directory_of_a_corpus_has_the_identity_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("一")
    before = input_record(tmp_path)
    (tmp_path / "a.txt").write_text("二")
    assert input_record(tmp_path) != before


def test_the_identity_of_nothing_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="missing: no such"):
        identity(tmp_path / "missing")


def test_a_result_that_stands_is_kept(tmp_path: Path) -> None:
    inputs = {"base": {"path": "b", "sha256": "1"}}
    wanted = Manifest("model", "test", inputs=inputs, settings={"r": 8, "names": ("a", "b")})
    target = tmp_path / "a"
    assert not stands(target, wanted, force=False)
    artifact(target, **{name: getattr(wanted, name) for name in ("inputs", "settings")})
    assert stands(target, wanted, force=False)
    moved = replace(wanted, inputs={"base": {"path": "elsewhere", "sha256": "1"}})
    assert stands(target, moved, force=False)
    assert not stands(target, wanted, force=True)
    (target / MANIFEST).unlink()
    with pytest.raises(OutputExists, match="exists; --force"):
        stands(target, wanted, force=False)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"command": "other"}, r"by another command \(test\)"),
        ({"inputs": {"base": {"path": "b", "sha256": "2"}}}, "from another base than b"),
        ({"inputs": {}}, r"from a base \(b\) too"),
        ({"settings": {"r": 16}}, "with r 8, and 16 is asked for"),
        ({"settings": {"r": 8, "s": 1}}, "with s None, and 1 is asked for"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    inputs = {"base": {"path": "b", "sha256": "1"}}
    found = artifact(tmp_path / "a", inputs=inputs, settings={"r": 8})
    with pytest.raises(
        OutputExists, match=f"a was made {difference}; .* make it again: chinese-llama .* --force"
    ):
        stands(tmp_path / "a", replace(found, **change), force=False)
