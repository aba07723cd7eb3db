"""Manifests say what a directory is and what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama import artifacts
from chinese_llama.artifacts import (
    Asked,
    Manifest,
    hash_ahead,
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
        (
            ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model", "checklist.chk"],
            ["consolidated.00.pth", "consolidated.01.pth"],
        ),
        (["consolidated.00.pth", "model.safetensors"], ["model.safetensors"]),
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
    moved = replace(
        wanted, inputs={"base": {"path": "elsewhere", "sha256": "1", "config": "of a later version"}}
    )
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
        (
            {"inputs": {"base": {"path": "b", "sha256": "1", "config": "2"}}},
            r"from a base with another config\.json than that in b",
        ),
        ({"settings": {"r": "x" * 99}}, f"with r 8, and {'x' * 57}\\.\\.\\. is asked for"),
        ({"settings": {"r": 16}}, "with r 8, and 16 is asked for"),
        ({"settings": {"r": 8, "s": 1}}, "with s None, and 1 is asked for"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    inputs = {"base": {"path": "b", "sha256": "1", "config": "1"}}
    found = artifact(tmp_path / "a", inputs=inputs, settings={"r": 8})
    with pytest.raises(
        OutputExists, match=f"a was made {difference}; .* make it again: chinese-llama .* --force"
    ):
        stands(tmp_path / "a", replace(found, **change), force=False)


def test_to_ask_changes_nothing_and_tells_the_state(tmp_path: Path) -> None:
    inputs = {"base": {"path": "b", "sha256": "1"}}
    wanted = Manifest("model", "test", inputs=inputs, settings={"r": 8})

    def asked(wanted: Manifest) -> tuple[str, str]:
        with pytest.raises(Asked) as answer:
            stands(tmp_path / "a", wanted, force=True, keep="ask")
        return answer.value.state, answer.value.why

    assert asked(wanted) == ("missing", "") and not (tmp_path / "a").exists()
    artifact(tmp_path / "a", inputs=inputs, settings={"r": 8})
    assert asked(wanted) == ("stands", "")
    assert asked(replace(wanted, settings={"r": 9})) == ("stale", "with r 8, and 9 is asked for")


def test_a_result_that_lost_a_file_does_not_stand(tmp_path: Path) -> None:
    found = artifact(tmp_path / "a")
    file = tmp_path / "a" / next(iter(found.files))
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(OutputExists, match=r"was made whole, but its .* has been changed since"):
        stands(tmp_path / "a", found, force=False)
    record = found.files[file.name]
    file.write_bytes(b"?" * record["bytes"])  # the same size: its time tells that it is to be read
    with pytest.raises(OutputExists, match=r"was made whole, but its .* has been changed since"):
        stands(tmp_path / "a", found, force=False)
    file.unlink()
    with pytest.raises(OutputExists, match=r"was made whole, but its .* has been removed since"):
        stands(tmp_path / "a", found, force=False)


def test_a_result_that_was_copied_stands(tmp_path: Path) -> None:
    found = artifact(tmp_path / "a")
    for name in found.files:
        os.utime(tmp_path / "a" / name, (1, 1))
    assert stands(tmp_path / "a", found, force=False)


def test_the_configuration_of_a_model_is_recorded_beside_its_weights(tmp_path: Path) -> None:
    shards(tmp_path / "m")
    weights = input_record(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{}")
    assert input_record(tmp_path / "m") == {**weights, "config": digest(b"{}")}


# --- hashes that are known, or remembered


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def shards(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(name.encode())
    return folder


def test_known_hashes_are_not_computed_again(tmp_path: Path) -> None:
    known = {"a.safetensors": {"sha256": "f" * 64}}
    written = write_manifest(shards(tmp_path / "m"), Manifest("model", "test"), known)
    assert written.files["a.safetensors"]["sha256"] == "f" * 64
    assert written.files["b.safetensors"]["sha256"] == digest(b"b")
    assert written.sha256 == identity(tmp_path / "m") != ""


@pytest.mark.parametrize("other", [{"sha256": digest(b"b")}, {"xxh3_128": "0" * 32}, None])
def test_without_sha256_the_identity_is_left_open_until_it_is_asked_for(
    tmp_path: Path, other: dict[str, str] | None
) -> None:
    """What merge writes is hashed quickly; whatever is made from it reads it then."""
    known = {"a.safetensors": {"xxh3_128": "1" * 32}} | ({"b.safetensors": other} if other else {})
    written = write_manifest(shards(tmp_path / "m"), Manifest("model", "test"), known)
    assert written.sha256 == ""
    assert written == read_manifest(tmp_path / "m")
    record = written.files["a.safetensors"]
    assert (set(record), record["xxh3_128"]) == ({"bytes", "mtime_ns", "xxh3_128"}, "1" * 32)
    plain = write_manifest(shards(tmp_path / "plain"), Manifest("model", "test"))
    assert identity(tmp_path / "m") == plain.sha256
    (tmp_path / "m" / "a.safetensors").write_bytes(b"A")
    assert identity(tmp_path / "m") != plain.sha256


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes are remembered; of files from 1000 bytes on, and nothing is yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(artifacts, "LARGE", 1000)
    monkeypatch.setattr(artifacts, "_hashed", {})
    return tmp_path / "cache" / "chinese_llama" / "sha256"


def old(file: Path, content: bytes) -> Path:
    """A file that was written long ago."""
    file.write_bytes(content)
    os.utime(file, (10**9, 10**9))
    return file


def forget() -> None:
    """What a new process has: nothing in memory."""
    artifacts._hashed.clear()


def test_hashes_of_large_files_are_remembered(cache: Path, tmp_path: Path) -> None:
    file = old(tmp_path / "large", b"x" * 1000)
    assert identity(file) == digest(b"x" * 1000)
    (entry,) = cache.iterdir()
    assert entry.read_text() == identity(file)
    entry.write_text("f" * 64)
    assert identity(file) == digest(b"x" * 1000)  # this process knows it
    forget()
    assert identity(file) == "f" * 64  # another one takes it from there
    entry.write_text("damaged")
    forget()
    assert identity(file) == digest(b"x" * 1000) == entry.read_text()


def test_a_file_that_changed_is_hashed_anew(cache: Path, tmp_path: Path) -> None:
    """Also with the same size and time."""
    file = old(tmp_path / "large", b"x" * 1000)
    before = identity(file)
    forget()
    assert identity(old(file, b"y" * 1000)) == digest(b"y" * 1000) != before
    other = old(tmp_path / "other", b"x" * 1000)
    assert identity(other) == before
    assert len(list(cache.iterdir())) == 3


def test_small_and_fresh_files_are_not_remembered(cache: Path, tmp_path: Path) -> None:
    """A file that was just written may be written still, within the same tick of the clock."""
    assert identity(old(tmp_path / "small", b"x" * 999)) == digest(b"x" * 999)
    (tmp_path / "fresh").write_bytes(b"x" * 1000)
    assert identity(tmp_path / "fresh") == digest(b"x" * 1000)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_does_not_matter(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert identity(old(tmp_path / "large", b"x" * 1000)) == digest(b"x" * 1000)


def test_without_xdg_cache_home_it_is_in_the_home(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME") if value is None else monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path / f"home{value}"))
        forget()
        identity(old(tmp_path / "large", b"x" * 1000))
        assert len(list((tmp_path / f"home{value}" / ".cache" / "chinese_llama" / "sha256").iterdir())) == 1
    assert not cache.exists()


def test_hashes_are_computed_ahead(cache: Path, tmp_path: Path) -> None:
    """And what is missing is said only by who asks for it."""
    file = old(tmp_path / "large", b"x" * 1000)
    folder = shards(tmp_path / "m")
    before = set(threading.enumerate())
    hash_ahead([file, folder, tmp_path / "missing"])
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert [entry.read_text() for entry in cache.iterdir()] == [digest(b"x" * 1000)]
    assert len(artifacts._hashed) == 3
    assert identity(file) == digest(b"x" * 1000)
    with pytest.raises(BadFile, match="missing: no such"):
        identity(tmp_path / "missing")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_an_error_is_not_kept_as_if_it_were_a_hash(cache: Path) -> None:
    """Of a file that is there and cannot be read, whoever runs this."""
    hash_ahead([Path("/proc/self/mem")])
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            identity(Path("/proc/self/mem"))
    assert artifacts._hashed == {}


def test_many_threads_hash_a_file_once(cache: Path, tmp_path: Path) -> None:
    file = old(tmp_path / "large", bytes(5_000_000))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(identity(file))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [digest(bytes(5_000_000))] * 8
    assert len(artifacts._hashed) == len(list(cache.iterdir())) == 1
