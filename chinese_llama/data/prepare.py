"""Tokenise and pack data once, into a directory that the recipes read.

The directory is named by what it is made of: tokenizer, data and settings. An interrupted preparation goes
on after its last finished part, and gives the same rows as one that was not interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import Manifest, identity, read_manifest, sha256_file
from chinese_llama.data.kinds import Conversations, Documents, Kind
from chinese_llama.data.mixture import Source, mix, names
from chinese_llama.data.packing import join
from chinese_llama.data.reading import ahead, batches
from chinese_llama.data.work import Progress, Work, held_out_file, part_files
from chinese_llama.errors import BadFile, UserError
from chinese_llama.progress import Stopwatch, say

FORMAT = 1  # of what is on disk; another one gives other keys
PART = 1 << 23  # tokens that are packed and written at once
QUIET = 60.0  # seconds without a line
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CHOICES = {
    "kind": ("pretraining", "instructions"),
    "too_long": ("drop", "truncate"),
    "bad_records": ("stop", "skip"),
}
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Job:
    """What is to be prepared: `sources` as blocks of `block_size` tokens of the tokenizer in a directory.

    For "pretraining", `eval_split` is the share of the documents (by hash of the text, 0 to 0.5) that is held
    out. For "instructions", `template` is the Jinja text that conversations are written with, `too_long` and
    `bad_records` say what happens to conversations that do not fit and to records that are malformed. Raises
    UserError for a value that cannot be.
    """

    kind: str
    sources: tuple[Source, ...]
    tokenizer: Path
    block_size: int
    eval_split: float = 0.0
    template: str | None = None
    too_long: str = "drop"
    bad_records: str = "stop"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}.")
        if not 0 <= self.eval_split <= 0.5:
            raise UserError(f"eval_split: {self.eval_split} is no share from 0 to 0.5.")
        if self.block_size < 2:
            raise UserError(f"block_size: {self.block_size} is too small; a block holds at least 2 tokens.")
        if self.kind == "instructions" and (self.eval_split or self.template is None):
            raise UserError("Instructions need a template, and take no eval_split.")


@dataclass(frozen=True)
class Prepared:
    """Packed blocks on disk, and the sources they came from.

    `manifest.metrics["sources"]` holds for each source, in order: documents, held_out, tokens, characters,
    bytes, blocks, learnt_tokens, and dropped {reason: count}.
    """

    directory: Path
    manifest: Manifest
    sources: tuple[Source, ...]

    def dataset(self, seed: int) -> Any:
        """A `datasets.Dataset` of the blocks, mapped from disk, mixed by the weights of the sources.

        Its rows are as chinese_llama.data.work says. Raises BadFile for a part that does not open.
        """
        import datasets

        datasets.disable_progress_bars()
        whole = [
            datasets.concatenate_datasets([_open_part(file) for file in part_files(self.directory, number)])
            for number in range(len(self.sources))
        ]
        if self.sources[0].weight is not None:
            tokens = [figures["tokens"] for figures in self.manifest.metrics["sources"]]
            chosen = mix(self.sources, [len(blocks) for blocks in whole], seed, tokens)
            whole = [blocks.select(indices) for blocks, indices in zip(whole, chosen, strict=True)]
        return datasets.concatenate_datasets(whole).with_format("numpy")

    def held_out(self) -> dict[str, Path]:
        """{name of a source: .jsonl file of its held-out documents}, for those that have any."""
        files = {name: held_out_file(self.directory, n) for n, name in enumerate(names(self.sources))}
        return {name: file for name, file in files.items() if file.is_file()}


def _open_part(file: Path) -> Any:
    import datasets

    try:
        return datasets.Dataset.from_file(str(file))
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise BadFile(file, f"is damaged; remove {file.parent}, and it is made again.") from error


def key(job: Job) -> str:
    """64 hex digits that change with the tokenizer, the data and the settings of a job, and nothing else:
    not with weights, nor with where anything lies. Raises BadFile."""
    return _digest(_contents(job))


def _contents(job: Job) -> dict[str, Any]:
    """What prepared data depends on."""
    described: dict[str, Any] = {"format": FORMAT, "kind": job.kind, "block_size": job.block_size}
    if job.kind == "pretraining":
        described |= {"eval_split": float(job.eval_split)}
    else:
        described |= {"template": job.template, "too_long": job.too_long, "bad_records": job.bad_records}
        described |= {"formats": [source.format for source in job.sources]}
    described["tokenizer"] = _tokenizer_digest(job.tokenizer)
    described["sources"] = [source_digest(source) for source in job.sources]
    return described


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(directory: Path) -> str:
    found = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not found:
        raise BadFile(directory, "holds no tokenizer (no tokenizer.json or tokenizer.model).")
    return _digest([(name, sha256_file(directory / name)) for name in found])


def source_digest(source: Source) -> str:
    """64 hex digits that name the bytes and the formats of the files of a source, in order. Raises UserError."""
    files = source.list_files()
    return _digest([(file.suffixes[-2:], _file_digest(file, *_stamp(file))) for file in files])


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def _file_digest(file: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(file)


def prepare(job: Job, root: Path, tokenizer: Any) -> Prepared:
    """The prepared data of `job` in `root`/<first 16 digits of its key>, made now unless it is there.

    `tokenizer` is the loaded one of `job.tokenizer`. Raises BadFile for data that cannot be read and for a
    prepared directory that is damaged, UserError where there is nothing to train on or the disk is full.
    """
    contents = _contents(job)
    target = Path(root) / _digest(contents)[:16]
    if not target.exists():
        try:
            with _alone(target.parent), _swept_apart():
                if not target.exists():
                    _make(job, contents, target, tokenizer)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(f"{root}: the disk is full; make room, and the same command goes on.") from error
    return _found(job, target)


def _found(job: Job, directory: Path) -> Prepared:
    manifest = read_manifest(directory)
    if manifest is None or identity(directory) != manifest.sha256:
        raise BadFile(directory, "is damaged (not as its manifest says); remove it, and it is made again.")
    return Prepared(directory, manifest, job.sources)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of `root`; the system gives it back when a process ends, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{root}: another process prepares data here; waiting for it.")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _swept_apart() -> Iterator[None]:
    """Python's garbage collector leaves alone what is there already: PyTorch and transformers alone have 200,000
    objects, and it would look at all of them for every few thousand conversations."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _make(job: Job, contents: dict[str, Any], target: Path, tokenizer: Any) -> None:
    work = Work(target.with_name(f".{target.name}.partial"), len(job.sources))
    try:
        for number, source in enumerate(job.sources):
            if not work.progress[number].done:
                _pack(work, number, source, _kind(job, source, tokenizer), job.eval_split)
            _check(source, work.progress[number], job)
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            work.remove()  # these data will not do, and others have another key
        raise
    inputs = {"tokenizer": {"path": str(job.tokenizer), "sha256": contents["tokenizer"]}}
    for number, (source, digest) in enumerate(zip(job.sources, contents["sources"], strict=True)):
        inputs[f"data:{number}"] = {"path": str(source.path), "sha256": digest}
    settings = {name: value for name, value in contents.items() if name not in ("tokenizer", "sources")}
    metrics = {"sources": [{**progress.counts, "dropped": progress.dropped} for progress in work.progress]}
    work.finish(Manifest("data", "prepare", inputs, settings, metrics=metrics), target)


def _kind(job: Job, source: Source, tokenizer: Any) -> Kind:
    if job.kind == "pretraining":
        return Documents(tokenizer, job.block_size)
    template = job.template or ""
    return Conversations(tokenizer, job.block_size, template, job.too_long, job.bad_records, source.format)


def _pack(work: Work, number: int, source: Source, kind: Kind, share: float) -> None:
    """Bring a source to its end, part by part."""
    progress = work.progress[number]
    counts, dropped = Counter(progress.counts), Counter(progress.dropped)
    pending, held_out = [progress.rest], list[str]()
    told = Stopwatch()

    def write(last: bool) -> None:
        nonlocal told
        blocks, progress.rest = kind.pack(join(pending), last)
        work.add_held_out(number, held_out)
        if len(blocks.tokens):
            work.add_blocks(number, blocks)
        counts["blocks"] += len(blocks.tokens)
        counts["learnt_tokens"] += blocks.parts.learnt_targets()
        progress.counts, progress.dropped, progress.done = dict(counts), dict(dropped), last
        work.save()
        if told.seconds() > QUIET:
            say(f"{source.path}: {counts['tokens']:,} tokens so far")
            told = Stopwatch()

    read = batches(source.list_files(), kind.read, kind.size, share, progress.position)
    for batch, encoded in ahead(read, lambda batch: kind.encode(batch.items)):
        found = kind.collect(batch.items, batch.ordinals, encoded)
        pending.append(found.parts)
        held_out += batch.held_out
        dropped += found.dropped + batch.left_out
        counts.update(
            documents=found.documents,
            held_out=len(batch.held_out),
            tokens=len(found.parts.ids),
            characters=found.characters,
            bytes=found.bytes,
        )
        progress.position = batch.end
        if sum(len(parts.ids) for parts in pending) >= PART:
            write(last=False)
            pending, held_out = [progress.rest], []
    write(last=True)


def _check(source: Source, progress: Progress, job: Job) -> None:
    """Tell what became of a source. Raises BadFile if nothing of it can be trained on."""
    counts = progress.counts
    lost = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in progress.dropped.items())
    if not counts["documents"]:
        if counts["held_out"]:
            what = f"all {counts['held_out']:,} documents are held out; lower eval_split or give more text."
        elif lost:
            what = f"nothing to train on in blocks of {job.block_size} tokens: {lost}."
        else:
            what = "holds no text." if job.kind == "pretraining" else "holds no conversations."
        raise BadFile(source.path, what)
    say(
        f"{source.path}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['blocks']:,} blocks"
        + (f"; dropped or cut: {lost}." if lost else ".")
    )
    if job.eval_split and not counts["held_out"]:
        say(f"{source.path}: eval_split {job.eval_split} holds out none of its documents.")
