"""Unfinished work: killed, interrupted, out of room, shared by two processes; it goes on to the same bytes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.data import prepare as module
from chinese_llama.data import reading
from chinese_llama.data.prepare import Job, Prepared, key, prepare
from chinese_llama.errors import UserError
from tests.data.conftest import job_in


def contents(directory: Path) -> dict[str, bytes]:
    """Everything but the manifest, which holds times."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.suffix != ".json"}


# Prepares in processes of its own: [(root, number of writes to disk after which it is killed; 0 for never)].
# Those that are killed run one after the other, then the others at once.
PREPARE = r"""
import os, pickle, signal, sys
from chinese_llama.data import prepare, reading
from chinese_llama.model.load import load_tokenizer

job, roots = pickle.load(sys.stdin.buffer)
prepare.PART, reading.BATCH = 1500, 400
tokenizer = load_tokenizer(job.tokenizer)
sync, writes, together = os.fsync, 0, []

def counted(handle):
    global writes
    if writes == kill_after > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    writes += 1
    sync(handle)

for root, kill_after in roots:
    process = os.fork()
    if not process:
        os.fsync = counted
        prepare.prepare(job, root, tokenizer)
        os.write(1, b"%d\n" % writes)
        os._exit(0)
    elif kill_after:
        os.waitpid(process, 0)
    else:
        together.append(process)
sys.exit(max([os.waitpid(process, 0)[1] for process in together], default=0))
"""


KILLED = [1, 4, 7, 10, 13, 17]  # after so many writes


@pytest.fixture(scope="module")
def processes(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path, list[int]]:
    """A job, where processes have prepared it, and how often each that was not killed wrote to disk."""
    folder = tmp_path_factory.mktemp("processes")
    job = job_in(folder, tokenizer, eval_split=0.1)
    roots = [(folder / f"killed-{writes}", writes) for writes in KILLED]
    roots += [(folder / "again", 5)] * 4 + [(folder / "both", 0)] * 2
    command = [sys.executable, "-c", PREPARE]
    made = subprocess.run(command, input=pickle.dumps((job, roots)), stdout=subprocess.PIPE, check=True)
    return job, folder, [int(line) for line in made.stdout.split()]


@pytest.mark.parametrize("name", [*(f"killed-{writes}" for writes in KILLED), "again"])
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    name: str, processes: tuple[Job, Path, list[int]], fast: Any, tmp_path: Path, small: None
) -> None:
    job, folder, _ = processes
    (left,) = (folder / name).glob(".*.partial")
    state = left / "state.json"
    finished = sum(entry["parts"] for entry in json.loads(state.read_text())) if state.is_file() else 0
    assert finished or name == "killed-1"
    parts = sorted((left / "result").glob("*.arrow"))[:finished]
    files = {part.name: part.stat().st_ino for part in parts}
    made, whole = prepare(job, folder / name, fast), prepare(job, tmp_path / "whole", fast)
    assert contents(made.directory) == contents(whole.directory)
    assert made.manifest.metrics == whole.manifest.metrics
    assert {part: (made.directory / part).stat().st_ino for part in files} == files, "kept"
    assert not left.exists()


def test_two_processes_at_once_make_it_once(
    processes: tuple[Job, Path, list[int]], fast: Any, tmp_path: Path, small: None
) -> None:
    job, folder, writes = processes
    assert min(writes) == 0 and max(writes) > max(KILLED), "one of them finds it made"
    whole = prepare(job, tmp_path / "whole", fast)
    assert contents(folder / "both" / whole.directory.name) == contents(whole.directory)


def test_another_process_is_waited_for(
    job: Job, fast: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "prepared"
    root.mkdir()
    made: list[Prepared] = []
    with open(root / ".lock", "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: made.append(prepare(job, root, fast)))
        thread.start()
        told = ""
        while "another process prepares data here; waiting for it" not in told:
            assert thread.is_alive()
            told += capfd.readouterr().err
        assert not made and sorted(path.name for path in root.iterdir()) == [".lock"]
    thread.join()
    assert made[0].directory.is_dir()


class Stop(KeyboardInterrupt):
    """Ctrl-C, told from one that a person has pressed."""


def test_ctrl_c_and_a_full_disk_lose_no_finished_part(
    job: Job, fast: Any, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device behind /dev/full has no room: what the next part is written to leads there."""
    whole = prepare(job, tmp_path / "whole", fast)
    left = tmp_path / "root" / f".{whole.directory.name}.partial" / "result"
    rename = os.replace

    def stopped(old: Path, new: Path) -> None:
        rename(old, new)
        if Path(new).name == "state.json" and len(list(left.glob("*.arrow"))) == 2:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", stopped)
        prepare(job, tmp_path / "root", fast)
    finished = sorted(left.glob("*.arrow"))
    blocked = left / ".0-00002.arrow.partial"
    blocked.symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"root: the disk is full; make room, and the same command goes on\.$"
    ):
        prepare(job, tmp_path / "root", fast)
    assert len(finished) == 2 and sorted(left.glob("*.arrow")) == finished
    blocked.unlink()
    assert contents(prepare(job, tmp_path / "root", fast).directory) == contents(whole.directory)


def test_a_place_that_cannot_be_written_is_named(job: Job, fast: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as told:
        prepare(job, tmp_path / "file" / "prepared", fast)
    assert told.value.errno == errno.ENOTDIR and "prepared" in str(told.value)


@pytest.mark.parametrize("state", ["", "{}", "[]", '[{"position": 3}]', '[{"postion": [0, 0, 0]}]'])
def test_a_state_that_is_of_no_use_starts_anew(state: str, job: Job, fast: Any, tmp_path: Path) -> None:
    left = tmp_path / "prepared" / f".{key(job)[:16]}.partial"
    (left / "result").mkdir(parents=True)
    (left / "result" / "0-00007.arrow").write_text("old")
    (left / "state.json").write_text(state)
    made = prepare(job, tmp_path / "prepared", fast).directory
    assert {file.name for file in made.glob("*.arrow")} == {"0-00000.arrow", "1-00000.arrow"}
    assert not left.exists()


def test_many_parts_do_not_need_many_open_files(
    job: Job, fast: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 1)
    monkeypatch.setattr(reading, "BATCH", 1)
    found = prepare(job, tmp_path / "prepared", fast).dataset(0)
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list open files")
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert len(found) > 50 and sum(".arrow" in name for name in opened) < 10
