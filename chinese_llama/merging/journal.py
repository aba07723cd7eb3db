"""What a merge has finished, kept in its unfinished directory: where a broken one goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import xxhash

from chinese_llama import __version__
from chinese_llama.directories import write_text
from chinese_llama.model.shards import Hashes
from chinese_llama.progress import say

FILE = "merge.json"


class Journal:
    """The journal in `directory`, of the one merge that `plan` tells from all others. What another one left is
    removed, and so is everything but the finished files that still are what they were."""

    def __init__(self, directory: Path, plan: Any) -> None:
        self.directory, self.files = directory, Hashes()
        self.plan = hashlib.sha256(json.dumps([__version__, plan], sort_keys=True).encode()).hexdigest()
        left = self._left()
        if left:
            self._take(left)
        for place in directory.iterdir():
            if place.name not in self.files:
                shutil.rmtree(place) if place.is_dir() else place.unlink()
        self.note(self.files)

    def _left(self) -> Hashes:
        if not (self.directory / FILE).is_file():
            return {}
        try:
            content = json.loads((self.directory / FILE).read_text(encoding="utf-8"))
            if content["plan"] == self.plan:
                return dict(content["files"])
        except (ValueError, KeyError, TypeError):
            return {}
        say("What a broken merge left is of other inputs or settings; starting afresh.")
        return {}

    def _take(self, left: Hashes) -> None:
        for name, digest in left.items():
            file = self.directory / Path(name).name
            if file.is_file() and _xxh3(file) == digest:
                self.files[name] = digest
        say(f"Going on: {len(self.files)} finished files of a broken merge are kept.")

    def note(self, files: Hashes) -> None:
        """Remember the finished files and their hashes."""
        self.files = dict(files)
        write_text(self.directory / FILE, json.dumps({"plan": self.plan, "files": self.files}) + "\n")

    def remove(self) -> None:
        """The work is done."""
        (self.directory / FILE).unlink(missing_ok=True)


def _xxh3(file: Path) -> dict[str, str]:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"xxh3_128": digest.hexdigest()}
