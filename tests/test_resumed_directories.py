"""What stopped work leaves beside an output, and how it is taken up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chinese_llama.directories import (
    new_directory,
)
from chinese_llama.errors import Interrupted, UserError
from tests.test_directories import DEAD, leave, make, names, worked_in


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped")])
@pytest.mark.parametrize("resume", [True, False])
def test_stopped_work_that_can_be_resumed_stays(tmp_path: Path, error: BaseException, resume: bool) -> None:
    target = tmp_path / "new" / "a"
    with pytest.raises(type(error)), new_directory(target, resume=resume) as partial:
        (partial / "half").write_text("x")
        raise error
    assert names(tmp_path / "new") == [partial.name]
    with new_directory(target, resume=True) as partial:
        assert names(partial) == ["half"]
        (partial / "whole").write_text("x")
    assert names(tmp_path / "new") == ["a"]
    assert names(target) == ["half", "whole"]


@pytest.mark.parametrize("resume", [True, False])
def test_failed_work_goes_even_if_it_could_be_resumed(tmp_path: Path, resume: bool) -> None:
    leave(tmp_path / "a", DEAD)
    with pytest.raises(UserError, match="no"), new_directory(tmp_path / "a", resume=resume):
        raise UserError("no")
    assert names(tmp_path) == []


@pytest.mark.parametrize("resume", [None, False])
def test_only_resume_takes_what_was_left(tmp_path: Path, resume: bool | None) -> None:
    leave(tmp_path / "a", DEAD)
    with new_directory(tmp_path / "a", resume=resume) as partial:
        assert names(partial) == []
        assert names(tmp_path) == [partial.name]


def test_the_newest_is_taken_and_the_others_go(tmp_path: Path) -> None:
    """A file or a link in its place is nothing to go on with; nor is another output's work."""
    for number, age in enumerate((5, 1, 9)):
        leave(tmp_path / "a", DEAD + number, f"{age}", age)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("x")
    (tmp_path / f".a.{DEAD + 8}.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f".a.{DEAD + 9}.partial").write_text("x")
    other, running = leave(tmp_path / "a.b", DEAD), leave(tmp_path / "a", DEAD + 20)
    with worked_in(running), new_directory(tmp_path / "a", resume=True) as partial:
        assert (partial / "half").read_text() == "1"
    assert set(names(tmp_path)) == {"a", "elsewhere", other.name, running.name}
    assert names(tmp_path / "elsewhere") == ["mine"]


def test_resume_puts_back_a_result_that_was_moved_aside(tmp_path: Path) -> None:
    """A stop between the two renames: the old result stands again while the new one is finished."""
    make(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / f".a.{DEAD}.old")
    leave(tmp_path / "a", DEAD)
    with new_directory(tmp_path / "a", resume=True) as partial:
        assert (tmp_path / "a" / "file").read_text() == "old"
        assert names(partial) == ["half"]
    assert names(tmp_path / "a") == ["half"]
    assert names(tmp_path) == ["a"]


def test_resume_with_the_same_process_id(tmp_path: Path) -> None:
    """In a container every run has it."""
    leave(tmp_path / "a", os.getpid())
    with new_directory(tmp_path / "a", resume=True) as partial:
        assert names(partial) == ["half"]
    assert names(tmp_path) == ["a"]


# --- space
