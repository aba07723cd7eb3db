"""Directories appear whole or not at all, and say what they are and what they were made from."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.artifacts import (
    MANIFEST,
    Manifest,
    identity,
    identity_files,
    input_record,
    new_directory,
    read_manifest,
    stands,
    write_manifest,
    write_text,
)
from chinese_llama.errors import BadFile, OutputExists, UserError

DEAD = 2**22 + 1  # above the largest process id that Linux gives


def make(target: Path, text: str = "new", force: bool = False) -> None:
    with new_directory(target, force) as partial:
        (partial / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (names(tmp_path / "a"), names(tmp_path / "a" / "b")) == (["b"], ["file"])


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), UserError("x"), SystemExit(1)])
def test_nothing_is_left_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    """Neither the directory nor the parents that were made for it."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(type(error)), new_directory(tmp_path / "mine" / "x" / "y" / "z") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        raise error
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == []


def test_an_existing_output_stays(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    with pytest.raises(OutputExists, match=r"a exists; --force replaces it, or give another output"):
        make(tmp_path / "a")
    with pytest.raises(ValueError, match="midway"), new_directory(tmp_path / "a", force=True) as partial:
        (partial / "file").write_text("half")
        raise ValueError("midway")
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_force_replaces_the_whole(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    (tmp_path / "a" / "extra").write_text("x")
    make(tmp_path / "a", "new", force=True)
    assert names(tmp_path / "a") == ["file"]
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_force_through_a_link_leaves_nothing_beside(tmp_path: Path) -> None:
    make(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link" / "file").read_text() == "new"
    assert set(names(tmp_path)) <= {"link", "real"}


def test_an_empty_directory_is_written_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    make(tmp_path / "b")
    assert names(tmp_path / "b") == ["file"]
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OutputExists, match="a is a file; give a directory that does not exist yet"):
        make(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("below", ["file/a", "file/a/b", "x" * 300, "new/" + "x" * 300, "x" * 245])
def test_what_cannot_be_written_is_said(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written .*give a writable output"):
        make(tmp_path / below)
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="the disk is full; nothing was written"),
        new_directory(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a", "a.b", "a[1]", "a*"])
def test_leftovers_of_killed_runs_are_removed(tmp_path: Path, name: str) -> None:
    leftover = tmp_path / f".{name}.{DEAD}.partial"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    kept = [f".other.{DEAD}.partial", f".{name}.{os.getppid()}.partial"]
    for other in kept:
        (tmp_path / other).mkdir()
    make(tmp_path / name)
    assert set(names(tmp_path)) == {name, *kept}


@pytest.mark.parametrize("leftover", [".a.{own}.partial", ".a.{dead}.old"])
def test_other_leftovers_are_removed(tmp_path: Path, leftover: str) -> None:
    """In a container every run has the same process id; a stop may come between the two renames."""
    (tmp_path / leftover.format(own=os.getpid(), dead=DEAD) / "sub").mkdir(parents=True)
    make(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_a_killed_run_leaves_no_target(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from chinese_llama.artifacts import new_directory\n"
        "with new_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('x'); print('inside', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "inside\n"
        run.kill()
    assert [name for name in names(tmp_path) if not name.startswith(".")] == []
    make(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a") as partial:
        (partial / "file").write_text("x")
        (partial / "file").chmod(0o600)
    os.umask(mask := os.umask(0o022))
    assert (tmp_path / "a" / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_write_text_is_whole_or_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "一")
    write_text(tmp_path / "a", "二")
    with pytest.raises(UserError, match=r"b cannot be written"):
        write_text(tmp_path / "none" / "b", "x")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "二"
    assert names(tmp_path) == ["a"]


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
        ({"command": "other"}, r"another command \(test\)"),
        ({"inputs": {"base": {"path": "b", "sha256": "2"}}}, "another input 'base'"),
        ({"inputs": {}}, "another input 'base'"),
        ({"settings": {"r": 16}}, r"another setting r \(8 there, 16 asked\)"),
        ({"settings": {"r": 8, "s": 1}}, r"another setting s \(None there, 1 asked\)"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    inputs = {"base": {"path": "b", "sha256": "1"}}
    found = artifact(tmp_path / "a", inputs=inputs, settings={"r": 8})
    with pytest.raises(OutputExists, match=f"a was made with {difference}; --force makes it again"):
        stands(tmp_path / "a", replace(found, **change), force=False)


def test_force_does_not_replace_what_is_not_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    (tmp_path / "mine" / "deeper" / "thesis.txt").write_text("x")
    with (
        pytest.raises(OutputExists, match="holds more than a result of this tool"),
        new_directory(tmp_path / "mine", force=True),
    ):
        pass
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputExists, match="holds more"), new_directory(tmp_path / "here", force=True):
        pass
    assert (tmp_path / "mine" / "deeper" / "thesis.txt").read_text() == "x"


def test_leftovers_of_another_output_with_a_longer_name_stay(tmp_path: Path) -> None:
    left = tmp_path / ".a.b.999999999.old"
    left.mkdir()
    with new_directory(tmp_path / "a") as partial:
        (partial / "file").write_text("x")
    assert left.is_dir()
