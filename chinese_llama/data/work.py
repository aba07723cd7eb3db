"""What a preparation that is not finished has on disk: finished parts, and how far it is.

Each part is an Arrow stream of rows: input_ids list<int32> (as many as the block has, no filler), lengths
list<int32> (tokens of each part of the block), documents list<int64> (the ordinal in its source of the
document that each part belongs to), source int32, and for instructions learnt list<bool>.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from chinese_llama.artifacts import Manifest, write_manifest
from chinese_llama.data.packing import Array, Blocks, Parts
from chinese_llama.data.reading import Position
from chinese_llama.directories import MANIFEST, sync

COUNTS = ("documents", "held_out", "tokens", "characters", "bytes", "blocks", "learnt_tokens")


@dataclass
class Progress:
    """How far one source is: read up to `position`; `parts` and `held_out_bytes` are written."""

    position: Position = field(default_factory=Position)
    parts: int = 0
    held_out_bytes: int = 0
    done: bool = False
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    dropped: dict[str, int] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)

    @property
    def rest(self) -> Parts:
        """What is read but in no block yet: less than a block of documents."""
        lengths, documents = np.array(self.lengths, np.int64), np.array(self.documents, np.int64)
        return Parts(np.array(self.ids, np.int32), lengths, documents)

    @rest.setter
    def rest(self, parts: Parts) -> None:
        self.ids, self.lengths, self.documents = (
            column.tolist() for column in (parts.ids, parts.lengths, parts.documents)
        )


class Work:
    """The directory of an unfinished preparation: `result` becomes the prepared directory, state.json says
    how far the `sources` are."""

    def __init__(self, directory: Path, sources: int) -> None:
        self.directory, self.state, self.result = directory, directory / "state.json", directory / "result"
        self.progress = self._saved()
        if not self.progress:
            self.remove()
            self.result.mkdir(parents=True)
            self.progress = [Progress() for _ in range(sources)]

    def _saved(self) -> list[Progress]:
        """What `save` has written; [] where nothing is, or nothing that can be used."""
        try:
            entries = json.loads(self.state.read_text(encoding="utf-8")) if self.result.is_dir() else []
            return [Progress(**{**entry, "position": Position(*entry["position"])}) for entry in entries]
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def remove(self) -> None:
        """Give up what was done."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def finish(self, manifest: Manifest, target: Path) -> None:
        """Write the manifest; the result becomes `target`."""
        for left in self.result.glob(".*.partial"):  # of a killed run
            left.unlink()
        write_manifest(self.result, manifest)
        for path in (self.result / MANIFEST, self.result):
            sync(path)
        os.rename(self.result, target)
        sync(target.parent)
        self.remove()

    def add_held_out(self, number: int, texts: Sequence[str]) -> None:
        """Write held-out documents of a source after those that are known to be there."""
        if not texts:
            return
        raw = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
        progress = self.progress[number]
        with open(held_out_file(self.result, number), "ab") as stream:
            stream.truncate(progress.held_out_bytes)  # what a killed run wrote after its last part
            stream.write(raw)
            _to_disk(stream)
        progress.held_out_bytes += len(raw)

    def add_blocks(self, number: int, blocks: Blocks) -> None:
        """Write blocks of a source as its next part."""
        progress = self.progress[number]
        table = _table(blocks, number)
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        _write(self.result / f"{number}-{progress.parts:05}.arrow", sink.getvalue())
        progress.parts += 1

    def save(self) -> None:
        """Record how far the sources are; a killed run goes on from here."""
        state = [dataclasses.asdict(progress) for progress in self.progress]
        _write(self.state, json.dumps(state).encode())


def part_files(directory: Path, number: int) -> list[Path]:
    """The finished parts of a source, in order."""
    return sorted(directory.glob(f"{number}-*.arrow"))


def held_out_file(directory: Path, number: int) -> Path:
    """Where the held-out documents of a source are, if there are any: records with a field `text`."""
    return directory / f"{number}-held_out.jsonl"


def _table(blocks: Blocks, number: int) -> pyarrow.Table:
    parts = blocks.parts
    columns = {
        "input_ids": _lists(parts.ids, blocks.tokens),
        "lengths": _lists(parts.lengths.astype(np.int32), blocks.counts),
        "documents": _lists(parts.documents, blocks.counts),
        "source": _array(np.full(len(blocks.tokens), number, np.int32)),
    }
    if parts.learnt is not None:
        columns["learnt"] = _lists(parts.learnt, blocks.tokens)
    return pyarrow.table(columns)


def _lists(values: Array, lengths: Array) -> pyarrow.ListArray:
    offsets: Array = np.append(0, lengths.cumsum()).astype(np.int32)
    return pyarrow.ListArray.from_arrays(_array(offsets), _array(values))


def _array(values: Array) -> pyarrow.Array:
    """`values` as they lie in memory, bool in bits. (pyarrow.array would import pandas, where it is installed.)"""
    kind = pyarrow.from_numpy_dtype(values.dtype)
    raw = np.packbits(values, bitorder="little") if values.dtype == bool else np.ascontiguousarray(values)
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(raw)])


def _write(path: Path, content: Any) -> None:
    """Write a file whole, and to the disk, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as stream:
        stream.write(content)
        _to_disk(stream)
    os.replace(partial, path)


def _to_disk(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
