"""Directories appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from chinese_llama.directories import MANIFEST, new_directory, write_text
from chinese_llama.errors import OutputExists, UserError

DEAD = 2**22 + 1  # above the largest process id that Linux gives


def make(target: Path, text: str = "new", force: bool = False) -> None:
    with new_directory(target, force) as partial:
        (partial / "file").write_text(text)
        (partial / MANIFEST).write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
)
FIELDS = st.dictionaries(st.text(), JSON)


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
    assert names(tmp_path / "a") == [MANIFEST, "file"]
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
    assert names(tmp_path / "b") == [MANIFEST, "file"]
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
        "import sys, time; from pathlib import Path; from chinese_llama.directories import new_directory\n"
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


def test_force_does_not_replace_what_is_not_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    (tmp_path / "mine" / "deeper" / "thesis.txt").write_text("x")
    with (
        pytest.raises(OutputExists, match="is no result of this tool, which --force would replace"),
        new_directory(tmp_path / "mine", force=True),
    ):
        pass
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    with (
        pytest.raises(OutputExists, match="the directory that you are in"),
        new_directory(tmp_path / "here", force=True),
    ):
        pass
    assert (tmp_path / "mine" / "deeper" / "thesis.txt").read_text() == "x"
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "thesis.txt").write_text("x")
    with pytest.raises(OutputExists, match="is no result"), new_directory(tmp_path / "flat", force=True):
        pass
    assert (tmp_path / "flat" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("given", ["a", "a/file", "a/../a", "link/file"])
def test_an_output_never_replaces_its_own_input(tmp_path: Path, given: str) -> None:
    """Not even a result of this tool, and not with --force."""
    make(tmp_path / "a", "old")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with (
        pytest.raises(UserError, match="is or holds an input of this command"),
        new_directory(tmp_path / "a", force=True, inputs=[tmp_path / given]),
    ):
        pass
    assert (tmp_path / "a" / "file").read_text() == "old"


def test_leftovers_of_another_output_with_a_longer_name_stay(tmp_path: Path) -> None:
    left = tmp_path / ".a.b.999999999.old"
    left.mkdir()
    with new_directory(tmp_path / "a") as partial:
        (partial / "file").write_text("x")
    assert left.is_dir()
