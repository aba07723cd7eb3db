"""Models as tensors by name, read by rows: a directory, and anything that is made from one.

Whatever is such a `Model` is written as safetensors by `save_shards`, block by block: memory is a few
blocks, whatever the size of the model or of its largest tensor.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from chinese_llama.directories import disk_is_full, write_text
from chinese_llama.errors import BadFile
from chinese_llama.model.tensors import Meta, SafetensorsWriter, TensorFile, nbytes, open_tensors, raw
from chinese_llama.progress import track

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK = 1 << 18  # numbers in a block: half a MB in half precision, which stays in the processor's cache
PIECE = 32 << 20  # bytes of a file that are copied at once
T = TypeVar("T")
R = TypeVar("R")
Block = tuple[str, int, int]  # name, first row, row behind the last


class Named(Protocol):
    """Tensors by their Hugging Face names. `rows` and `load` may be called from several threads."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def meta(self, name: str) -> Meta:
        """(shape, dtype) of a tensor."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor of one dimension or more, on the CPU."""

    def load(self, name: str) -> torch.Tensor:
        """A tensor on the CPU."""


class Model(Named, Protocol):
    """The tensors of a model that can be written."""

    def config(self) -> dict[str, Any]:
        """What config.json holds."""

    def parts(self) -> list[list[str]]:
        """The names, as they are divided over files."""


@dataclass
class Change:
    """A tensor to write instead of (or beside) the one in the source; `rows(start, stop)` makes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]


class InFiles:
    """`Named` tensors, each in one of several files."""

    _file_of: dict[str, TensorFile]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def meta(self, name: str) -> Meta:
        return self._file_of[name].meta(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._file_of[name].rows(name, start, stop)

    def load(self, name: str) -> torch.Tensor:
        return self._file_of[name].load(name)


class Weights(InFiles):
    """The tensors of a model directory, loaded one at a time.

    Raises BadFile for a missing shard, an index that points elsewhere, a damaged file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise BadFile(self.directory, "is not a model directory (no config.json).")
        index, files = self._files()
        self.shards = {file: open_tensors(file) for file in files}
        self._file_of: dict[str, TensorFile] = {}
        for file, opened in self.shards.items():
            names = [name for name in opened.keys() if not index or index.get(name) == file.name]  # noqa: SIM118
            self._file_of.update(dict.fromkeys(names, opened))
        for name, shard in index.items():
            if name not in self._file_of:
                raise BadFile(self.directory / shard, f"lacks the tensor {name} that the index promises.")
        self._leave_out_a_tied_head()

    def _files(self) -> tuple[dict[str, str], list[Path]]:
        """The index (empty where there is none) and the files, in transformers' order of preference."""
        for single in ("model.safetensors", "pytorch_model.bin"):
            index = self.directory / f"{single}.index.json"
            if (self.directory / single).is_file():
                return {}, [self.directory / single]
            if index.is_file():
                found = _weight_map(index)
                return found, self._shards(index, sorted(set(found.values())))
        raise BadFile(self.directory, "has no weights (model*.safetensors or pytorch_model*.bin).")

    def _shards(self, index: Path, names: list[str]) -> list[Path]:
        if any("/" in name or "\\" in name or name.startswith(".") for name in names):
            raise BadFile(index, "names a shard outside its directory.")
        for name in names:
            if not (self.directory / name).is_file():
                raise BadFile(self.directory / name, "this shard is missing; the copy is not complete.")
        return [self.directory / name for name in names]

    def _leave_out_a_tied_head(self) -> None:
        """A tied model's output matrix may be in the files too; it is the input matrix. Raises BadFile if it is not."""
        if not (EMBED in self and HEAD in self and self.config().get("tie_word_embeddings")):
            return
        same = self.meta(EMBED) == self.meta(HEAD) and all(
            torch.equal(self.rows(EMBED, start, stop), self.rows(HEAD, start, stop))
            for _, start, stop in blocks(self, [EMBED])
        )
        if not same:
            raise BadFile(
                self.directory / "config.json",
                f"ties the output to the embeddings, but {HEAD} is another matrix; set tie_word_embeddings to false.",
            )
        del self._file_of[HEAD]

    def config(self) -> dict[str, Any]:
        return read_json(self.directory / "config.json")

    def parts(self) -> list[list[str]]:
        return [
            [name for name in opened.keys() if self._file_of.get(name) is opened]  # noqa: SIM118
            for opened in self.shards.values()
        ]


class Changed:
    """`source` with `changes` by name. What it has and the source lacks goes into the last file."""

    def __init__(self, source: Model, changes: Mapping[str, Change]) -> None:
        self.source, self.changes = source, changes

    def __iter__(self) -> Iterator[str]:
        return iter([name for part in self.parts() for name in part])

    def __contains__(self, name: object) -> bool:
        return name in self.changes or name in self.source

    def meta(self, name: str) -> Meta:
        change = self.changes.get(name)
        return (change.shape, change.dtype) if change else self.source.meta(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        change = self.changes.get(name)
        return change.rows(start, stop) if change else self.source.rows(name, start, stop)

    def load(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.meta(name)[0][0]) if name in self.changes else self.source.load(name)

    def config(self) -> dict[str, Any]:
        return self.source.config()

    def parts(self) -> list[list[str]]:
        found = [list(part) for part in self.source.parts()]
        found[-1] += [name for name in self.changes if name not in self.source]
        return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadFile."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadFile(path, "no such file.") from error
    except (OSError, ValueError) as error:
        raise BadFile(path, f"is not readable JSON ({error}).") from error
    if not isinstance(loaded, dict):
        raise BadFile(path, "must hold a JSON object.")
    return loaded


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise BadFile(index, "has no weight_map of names to files.")
    return found


def blocks(model: Named, names: Iterable[str], size: int = BLOCK) -> Iterator[Block]:
    """The tensors `names` in blocks of about `size` numbers, whole rows, in order."""
    for name in names:
        shape = model.meta(name)[0]
        count = shape[0] if shape else 1
        step = max(1, size // max(1, torch.Size(shape[1:]).numel()))
        for start in range(0, count, step):
            yield name, start, min(start + step, count)


class Workers:
    """Threads that compute, each with one processor; as many as there are processors if `count` is 0."""

    def __init__(self, count: int) -> None:
        self.count = count or cores()

    def __enter__(self) -> Workers:
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # it was set for the whole process

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`function` of each item, in order; the next few are under way."""
        under_way: collections.deque[Future[R]] = collections.deque()
        for item in items:
            under_way.append(self._pool.submit(function, item))
            if len(under_way) > self.count + 1:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def block_of(model: Named, block: Block) -> torch.Tensor:
    """The numbers of a block, contiguous."""
    name, start, stop = block
    return (model.rows(name, start, stop) if model.meta(name)[0] else model.load(name)).contiguous()


def made(model: Named, todo: Sequence[Block], workers: Workers | int) -> Iterator[tuple[Block, torch.Tensor]]:
    """The blocks `todo`, made by the threads of `workers`, or by so many, in order."""
    with contextlib.nullcontext(workers) if isinstance(workers, Workers) else Workers(workers) as pool:
        yield from zip(todo, pool.each(functools.partial(block_of, model), todo), strict=True)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Hashes = dict[str, dict[str, str]]  # of files, by name: {"sha256": ...} or {"xxh3_128": ...}


def save_shards(
    model: Model,
    output: Path,
    what: str,
    workers: Workers | int = 0,
    hashed: Callable[[], Any] = hashlib.sha256,
    done: Hashes | None = None,
    finished: Callable[[Hashes], None] = lambda _: None,
) -> Hashes:
    """Write `model` into `output` as safetensors, divided as `parts` says, with an index; return the hash
    of each file.

    Threads of `workers`, or so many (0: one for each processor), make blocks. Files in `done` are there already;
    `finished` is told what is there after every file.
    """
    parts = model.parts()
    known = dict(done or {})
    files = [shard_name(number, len(parts)) for number in range(1, len(parts) + 1)]
    todo = {
        file: (names, list(blocks(model, names)))
        for file, names in zip(files, parts, strict=True)
        if file not in known
    }
    every = [block for _, found in todo.values() for block in found]
    stream = track(made(model, every, workers), what, len(every), "blocks")
    with contextlib.closing(stream):
        for file, (names, found) in todo.items():
            specs = {name: model.meta(name) for name in names}
            with SafetensorsWriter(output / file, specs, hashed()) as writer:
                for _, tensor in itertools.islice(stream, len(found)):
                    writer.write(raw(tensor))
            known[file] = {writer.digest.name.lower(): writer.digest.hexdigest()}
            finished(known)
    if len(parts) > 1:
        weight_map = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        size = sum(nbytes(*model.meta(name)) for name in weight_map)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(output / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    return known


def copy_unchanged(model: Changed, source: Weights, output: Path) -> dict[str, Path]:
    """Copy the files of `source` that `save_shards` of `model` would write with the same bytes; return the original
    of each."""
    copied: dict[str, Path] = {}
    parts = model.parts()
    for number, (file, names) in enumerate(zip(source.shards, parts, strict=True), 1):
        target = output / shard_name(number, len(parts))
        if not model.changes.keys() & set(names) and _would_be_written(source, file, names, target):
            _copy(file, target)
            copied[target.name] = file
    return copied


def _would_be_written(source: Weights, file: Path, names: list[str], target: Path) -> bool:
    """Whether `file` begins with the bytes that a file of `names` gets (and `target` then holds), data following."""
    with SafetensorsWriter(target, {name: source.meta(name) for name in names}, hashlib.sha256()):
        head = target.read_bytes()
    size = len(head) + sum(nbytes(*source.meta(name)) for name in names)
    with open(file, "rb") as stream:
        return stream.read(len(head)) == head and os.fstat(stream.fileno()).st_size == size


def _copy(source: Path, target: Path) -> None:
    """Copy a file; the two share their blocks where the file system can do that (btrfs, XFS)."""
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        for start in track(range(0, size, PIECE), f"copying {source.name}", -(-size // PIECE), "pieces"):
            left = min(PIECE, size - start)
            while left:
                copied = _some(old.fileno(), new.fileno(), left)
                if not copied:
                    raise BadFile(source, "ends too early; was it changed while it was read?")
                left -= copied
            if hasattr(os, "posix_fadvise"):  # begin to write, so that the flush at the end finds little
                os.posix_fadvise(new.fileno(), start, PIECE, os.POSIX_FADV_DONTNEED)


def _some(old: int, new: int, count: int) -> int:
    """Copy up to `count` bytes from where the first handle is to where the second one is; return how many."""
    try:
        return os.copy_file_range(old, new, count)
    except (AttributeError, OSError) as error:  # not on this system; not between these file systems
        if disk_is_full(error):
            raise
        read = os.read(old, count)
        left = memoryview(read)
        while left:
            left = left[os.write(new, left) :]
        return len(read)


def shard_name(number: int, count: int) -> str:
    """The name of file `number` (from 1) of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
