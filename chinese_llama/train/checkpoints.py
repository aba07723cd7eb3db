"""Checkpoints of a run: sealed when they are whole, and found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from chinese_llama.artifacts import sha256_file
from chinese_llama.directories import sync_tree, write_text
from chinese_llama.progress import say

FILES = "files.json"  # in a checkpoint: the sha256 of its files, written last
PREFIX = "checkpoint"  # of its name, before the step: transformers'


def seal(checkpoint: Path) -> None:
    """Write down what a checkpoint's files are, when they are on the disk: from now on it counts as whole."""
    sync_tree(checkpoint)
    digests = {file.name: sha256_file(file) for file in checkpoint.iterdir() if file.is_file()}
    write_text(checkpoint / FILES, json.dumps(digests, indent=1) + "\n")


def whole(checkpoint: Path) -> bool:
    """True for a checkpoint that was sealed and whose files are what they were."""
    try:
        digests = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
        return all(sha256_file(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def sealed_checkpoint(directory: Path) -> str:
    """The name of the newest checkpoint that was sealed, or ''. Nothing is read or changed: a run may be at work."""
    return _newest([file.parent.name for file in directory.glob(f"{PREFIX}-*/{FILES}")])


def last_checkpoint(directory: Path) -> str | None:
    """The newest whole checkpoint; newer ones that a kill cut, or that were damaged, are moved aside (so the directory
    has to be this process's alone)."""
    while found := _newest([place.name for place in directory.glob(f"{PREFIX}-*") if place.is_dir()]):
        if whole(directory / found):
            return str(directory / found)
        say(f"{directory / found} is not whole; it is passed over.")
        aside = directory / f"broken-{found}"
        shutil.rmtree(aside, ignore_errors=True)
        (directory / found).rename(aside)
    return None


def _newest(names: list[str]) -> str:
    steps = {int(number): name for name in names if (number := name.rpartition("-")[2]).isdecimal()}
    return steps[max(steps)] if steps else ""
