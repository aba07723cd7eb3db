"""Merges that are stopped and killed half way, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chinese_llama.directories import MANIFEST
from chinese_llama.errors import Interrupted
from chinese_llama.merging import journal, stream
from chinese_llama.merging.plan import Step, load
from tests.test_directories import DEAD

SHARDS = "model-*-of-*.safetensors"
INDEX = "model.safetensors.index.json"
Files = dict[str, tuple[int, int]]  # (inode, time) by name


class Case(NamedTuple):
    """A base of many shards, an adapter for it, and what an unbroken merge makes of them."""

    base: Path
    adapter: Path
    unbroken: Path

    @property
    def shards(self) -> int:
        return len(list(self.base.glob(SHARDS)))


def merge(base: Path, adapter: Path, output: Path, weight: float = 1.0, **options: Any) -> None:
    one = load(adapter.name, adapter)
    one.weight = weight
    stream.merge(base, [Step([one])], output, stream.Options(workers=1, **options))


def partials(folder: Path) -> list[Path]:
    return sorted(folder.glob(".out.*.partial"))


def stats(folder: Path, pattern: str = SHARDS) -> Files:
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in folder.glob(pattern)}


def finished(partial: Path) -> Files:
    """What the journal calls finished."""
    names = json.loads((partial / journal.FILE).read_text())["files"]
    return {name: stat for name, stat in stats(partial).items() if name in names}


def content(folder: Path) -> dict[str, Any]:
    """Everything in a result, without the times in its manifest."""
    found: dict[str, Any] = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != MANIFEST}
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["created"]
    for record in manifest["files"].values():
        del record["mtime_ns"]
    return {**found, MANIFEST: manifest}


def assert_same(output: Path, wanted: Path) -> None:
    """The same files, and nothing of the work beside them."""
    assert content(output) == content(wanted)
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []


def after(count: int) -> Callable[[Path], bool]:
    """Whether so many shards are finished in a hidden directory, and the next one is begun."""
    return lambda partial: len(list(partial.glob(SHARDS))) > count


@contextlib.contextmanager
def stopping(folder: Path, when: Callable[[Path], bool]) -> Iterator[None]:
    """Ctrl-C for this process when the hidden directory of `folder`/out is as wanted."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            if any(map(when, partials(folder))):
                signal.raise_signal(signal.SIGINT)
                return

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def stopped(base: Path, adapter: Path, folder: Path, count: int = 3, **options: Any) -> Path:
    """What a merge to `folder`/out leaves that is stopped after `count` shards, as of another process."""
    with (
        pytest.raises(Interrupted, match="the same command with --resume goes on"),
        stopping(folder, after(count)),
    ):
        merge(base, adapter, folder / "out", **options)
    (partial,) = partials(folder)
    assert len(finished(partial)) >= count
    return partial.rename(folder / f".out.{DEAD}.partial")


def copy(left: Path, folder: Path, pid: int = DEAD) -> Path:
    """What was left, beside `folder`/out; times are kept."""
    return shutil.copytree(left, folder / f".out.{pid}.partial")


# --- processes


def signalled(
    case: Case, folder: Path, number: int, when: Callable[[Path], bool], *more: str
) -> tuple[int, str]:
    """(exit code, stderr) of the command that gets a signal when its hidden directory is as wanted."""
    places = ["--base", case.base, "--loras", case.adapter, "--output", folder / "out", "--workers", "1"]
    argv = [sys.executable, "-m", "chinese_llama", "merge", *map(str, places), *more]

    def listen() -> None:  # what runs in the background of a shell inherits that Ctrl-C is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        while process.poll() is None and not any(map(when, folder.glob(f".out.{process.pid}.partial"))):
            time.sleep(0.0005)
        assert process.poll() is None, process.stderr and process.stderr.read()
        process.send_signal(number)
        err = process.communicate()[1]
    return process.returncode, err
