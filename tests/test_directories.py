"""Directories appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chinese_llama.directories import (
    MANIFEST,
    alone_in,
    check_output,
    check_space,
    empty,
    new_directory,
    write_text,
)
from chinese_llama.errors import OutputExists, UserError

DEAD = 2**22 + 1  # above the largest process id that Linux gives


def make(target: Path, text: str = "new", force: bool = False) -> None:
    with new_directory(target, force) as partial:
        (partial / "file").write_text(text)
        (partial / MANIFEST).write_text("{}")


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


def leave(target: Path, pid: int, text: str = "half", age: int = 0) -> Path:
    """An unfinished directory of another process, `age` seconds old."""
    partial = target.parent / f".{target.name}.{pid}.partial"
    partial.mkdir(parents=True)
    (partial / "half").write_text(text)
    os.utime(partial, (10**9 - age, 10**9 - age))
    return partial


@contextlib.contextmanager
def worked_in(directory: Path) -> Iterator[None]:
    """A process works in the directory as long as this is open."""
    handle = os.open(directory, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


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
    kept = [f".other.{DEAD}.partial", f".{name}.{DEAD + 1}.partial"]
    for other in kept:
        (tmp_path / other).mkdir()
    with worked_in(tmp_path / kept[1]):
        make(tmp_path / name)
    assert set(names(tmp_path)) == {name, *kept}


def test_two_processes_of_one_number_do_not_meet(tmp_path: Path) -> None:
    """Containers that share a volume: the other one's work is left alone, and so is its number's place."""
    other = leave(tmp_path / "a", os.getpid())
    with (
        worked_in(other),
        pytest.raises(UserError, match="a is being written by another process; wait, or"),
        new_directory(tmp_path / "a"),
    ):
        pass
    assert names(other) == ["half"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputExists, match="a exists"), new_directory(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "file").write_text("another's")
    assert (tmp_path / "a" / "file").read_text() == "another's"
    assert names(tmp_path) == ["a"]


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "large")
    make(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "large" / "file").is_file()
    assert names(tmp_path) == ["a", "large"]


def test_a_mount_point_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OutputExists, match=r"/proc is a mount point, .*; give a directory in it"):
        check_output(Path("/proc"), force=True)


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


# --- what is stopped, and gone on with


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> list[Path]:
    """Make every disk have so many bytes free; returns the places that are asked for."""
    asked: list[Path] = []
    usage = shutil.disk_usage("/")._replace(free=count)

    def told(place: Path) -> object:
        asked.append(place)
        return usage

    monkeypatch.setattr(shutil, "disk_usage", told)
    return asked


def test_space_is_that_of_the_disk_that_will_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = free(monkeypatch, 1000)
    monkeypatch.chdir(tmp_path)
    check_space(tmp_path / "new" / "deep" / "a", 1000)
    check_space(Path("a"), 1000)
    assert asked == [tmp_path, tmp_path]
    with pytest.raises(
        UserError, match=r"a: 2\.0 GB are to be written, and the disk has 0\.0 GB free; free some"
    ):
        check_space(Path("a"), 2 * 10**9)
    assert names(tmp_path) == []


def test_space_that_leftovers_take_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what was moved aside, which may be put back, nor the work of a process that runs."""
    free(monkeypatch, 1000)
    for pid in (DEAD, DEAD + 1, DEAD + 2):
        leave(tmp_path / "a", pid, "x" * 100)
    (tmp_path / f".a.{DEAD}.old").mkdir()
    (tmp_path / f".a.{DEAD}.old" / "file").write_text("x" * 500)
    before = names(tmp_path)
    with worked_in(tmp_path / f".a.{DEAD + 2}.partial"):
        check_space(tmp_path / "a", 1200)
        with pytest.raises(UserError, match="are to be written"):
            check_space(tmp_path / "a", 1201)
    assert names(tmp_path) == before


def test_only_one_works_in_a_directory(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match=r"Another process works in .*; wait for it, or stop it")
    with alone_in(tmp_path), refused, alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_empty_leaves_the_directory_and_what_links_point_to(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "deep" / "er").mkdir(parents=True)
    outside.mkdir()
    (outside / "kept").write_text("x")
    (inside / "file").write_text("x")
    (inside / "link").symlink_to(outside)
    empty(inside)
    assert inside.is_dir() and not any(inside.iterdir()) and (outside / "kept").is_file()
