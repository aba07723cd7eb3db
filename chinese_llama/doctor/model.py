"""What is wrong with a model: its files, its config.json against its tensors, its numbers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import LARGE, again, read_manifest, sha256_file
from chinese_llama.convert.meta import MetaWeights
from chinese_llama.directories import MANIFEST
from chinese_llama.doctor.config import check_against, check_config
from chinese_llama.doctor.finding import Finding, guarded, listing, some
from chinese_llama.doctor.raw import json_object, unfinished
from chinese_llama.doctor.tensors import (
    VOCABULARY,
    Readable,
    check_numbers,
    check_rows,
    check_shapes,
    measure,
    unreadable,
)
from chinese_llama.doctor.things import UNREADABLE, Thing, manifest_of
from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.merging.belongings import check_tokenizer, pieces_of
from chinese_llama.model.adapters import PREFIX
from chinese_llama.model.load import first_new_id
from chinese_llama.model.shards import EMBED, Named
from chinese_llama.model.tensors import open_tensors

INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
FETCH = "Fetch the missing files again into the same directory (on the hub: `hf download`, which goes on)."


def check_model(thing: Thing) -> Iterator[Finding]:
    """Everything that is wrong with the model, or the checkpoint of Meta's, in a directory."""
    yield from guarded(thing.path, unfinished(thing.path))
    yield from guarded(thing.path, check_manifest(thing.path))
    yield from guarded(thing.path, _meta(thing) if thing.kind == "meta checkpoint" else _huggingface(thing))


def _huggingface(thing: Thing) -> Iterator[Finding]:
    config = yield from check_config(thing.path)
    source = yield from _weights(thing.path)
    if source is None:
        return
    yield from check_against(thing.path, config, source)
    rows = next(iter(source.meta(EMBED)[0]), None) if EMBED in source else None
    yield from check_pieces(thing.path, rows, "the model")
    yield from _numbers(thing.path, source, config)


# --- files


def _weights(path: Path) -> Generator[Finding, None, Readable | None]:
    """Findings about the files of weights; returns the tensors that can be read, None where there are none."""
    there = {file.name: file for file in path.iterdir() if file.is_file()}
    single, index = next(
        ((s, i) for s, i in zip(SINGLE, INDEX, strict=True) if s in there or i in there), (None, None)
    )
    if single is None or index is None:
        yield from _no_weights(path, there)
        return None
    if single in there:
        source = Readable([there[single]])
        others = [name for name in there if NUMBERED.fullmatch(name) or name in (*SINGLE, *INDEX)]
        yield from _ignored(path, single, [name for name in others if name != single])
    else:
        listed = yield from _index(path, index, there)
        if listed is None:
            return None
        source = Readable([there[n] for n in sorted(set(listed.values())) if n in there], listed)
        yield from _listed(path, index, listed, source)
    yield from source.problems
    if not list(source):
        if not source.problems:
            what = "The file of weights holds no tensors."
            yield Finding("error", "no-tensors", str(path / single), what, listing(path / single), FETCH)
        return None
    peft = [name for name in source if name.startswith(PREFIX)]
    if peft:
        yield Finding(
            "error",
            "training-checkpoint",
            str(path),
            "The weights have PEFT's names: it is what a training saved, not a model that loads.",
            some(peft),
            "Take the adapter that the training saved (adapter_model.safetensors), and merge it: chinese-llama merge.",
        )
        return None
    yield from check_shapes(source, str(path))
    return source


def _no_weights(path: Path, there: dict[str, Path]) -> Iterator[Finding]:
    numbered = sorted(name for name in there if NUMBERED.fullmatch(name))
    if numbered:
        what = "The files of weights have no index that says which tensor is in which."
        remedy = (
            f"Fetch {INDEX[0] if numbered[0].endswith('s') else INDEX[1]} from where the shards come from."
        )
        yield Finding("error", "index-missing", str(path), what, some(numbered), remedy)
        match = NUMBERED.fullmatch(numbered[0])
        count = int(match[3]) if match else 0
        if count > len(numbered):
            what = f"{count - len(numbered)} of {count} shards are missing; the copy is not complete."
            yield Finding("error", "shard-missing", str(path), what, some(numbered), FETCH)
        return
    names = [name for name in there if name.endswith((".gguf", ".safetensors", ".bin", ".pt", ".pth"))]
    what = "There are no weights (model*.safetensors or pytorch_model*.bin)."
    yield Finding("error", "no-weights", str(path), what, some(names) or listing(path), FETCH)


def _ignored(path: Path, used: str, others: list[str]) -> Iterator[Finding]:
    if others:
        what = f"There are weights twice: {used} is read, the others are not."
        yield Finding(
            "note", "weights-twice", str(path), what, some(sorted(others)), "Delete what you do not mean."
        )


def _index(path: Path, index: str, there: dict[str, Path]) -> Generator[Finding, None, dict[str, str] | None]:
    """The weight_map of an index, None where it cannot be used."""
    found: list[Finding] = []
    listed = json_object(there[index], found).get("weight_map")
    yield from found
    if found:
        return None
    good = isinstance(listed, dict) and all(isinstance(s, str) and Path(s).name == s for s in listed.values())
    if not good or not listed:
        what = "The index has no weight_map of tensors to files beside it."
        yield Finding("error", "index-damaged", str(there[index]), what, listing(there[index]), FETCH)
        return None
    lost = sorted({name for name in listed.values() if name not in there})
    if lost:
        what = f"{len(lost)} of {len(set(listed.values()))} shards that the index lists are missing; the copy is not complete."
        yield Finding("error", "shard-missing", str(path), what, some(lost), FETCH)
    return listed


def _listed(path: Path, index: str, listed: dict[str, str], source: Readable) -> Iterator[Finding]:
    """What the index and the shards say of each other."""
    readable = {file.name for file in source.files}
    lost = [f"{name} in {file}" for name, file in listed.items() if file in readable and name not in source]
    if lost:
        what = f"{len(lost):,} tensors are not in the shards that the index names for them."
        yield Finding("error", "tensor-not-in-shard", str(path / index), what, some(lost), FETCH)
    more = [f"{name} in {file}" for file, names in source.unlisted.items() for name in names]
    if more:
        what = f"{len(more):,} tensors in the shards are not in the index, and may not be loaded."
        remedy = "Fetch index and shards from one source: they are of two versions."
        yield Finding("warning", "tensor-not-in-index", str(path / index), what, some(more), remedy)
    suffix = ".safetensors" if index == INDEX[0] else ".bin"
    shards = [f.name for f in path.iterdir() if NUMBERED.fullmatch(f.name) and f.name.endswith(suffix)]
    idle = sorted(set(shards) - set(listed.values()))
    if idle:
        what = "Shards lie beside the others that the index does not name; they are not loaded."
        remedy = "Fetch the index that belongs to them, or delete them."
        yield Finding("warning", "shard-not-in-index", str(path), what, some(idle), remedy)


# --- what lies around the weights


def check_manifest(path: Path) -> Iterator[Finding]:
    """The manifest of this tool, where there is one: damaged, of other files, of a merge that was forced."""
    try:
        manifest = read_manifest(path)
    except BadFile as error:
        remedy = "Delete the file: the directory then counts as made by another tool."
        yield Finding(
            "error",
            "manifest-damaged",
            str(error).partition(": ")[0],
            str(error),
            listing(path / MANIFEST),
            remedy,
        )
        return
    if manifest is None:
        return
    lines = [
        f"{name}: {how}" for name, record in manifest.files.items() if (how := _changed(path / name, record))
    ]
    if lines:
        what = f"Files are not those that `{manifest.command}` wrote."
        remedy = (
            f"Make it again: {again(str(manifest.command))}; or delete {MANIFEST} if you mean the change."
        )
        yield Finding("warning", "changed-since-made", str(path), what, some(lines), remedy)
    forced = manifest.metrics.get("forced")
    if forced:
        what = "It was merged with --force, in spite of what did not belong together."
        remedy = "Merge again without --force, in the order that is named."
        yield Finding(
            "warning", "merge-forced", str(path), what, some([str(line) for line in forced]), remedy
        )


def _changed(file: Path, record: dict[str, Any]) -> str:
    """How a file differs from its record, "" if it does not; large ones of the same size are taken for the same."""
    if not file.is_file():
        return "missing"
    stat = file.stat()
    if stat.st_size != record["bytes"]:
        return f"{stat.st_size:,} bytes, {record['bytes']:,} when it was made"
    same = stat.st_mtime_ns == record["mtime_ns"] or stat.st_size > LARGE or "sha256" not in record
    return "" if same or sha256_file(file) == record["sha256"] else "another sha256"


def added_to(place: Path) -> dict[str, int]:
    """The tokens that added_tokens.json adds to a tokenizer.model; transformers reads it where there is no
    tokenizer.json."""
    if (place / "tokenizer.json").is_file():
        return {}
    known, listed = pieces_of(place), json_object(place / "added_tokens.json", [])
    return {name: i for name, i in listed.items() if name not in known and isinstance(i, int)}


def check_size(place: Path, rows: int, what: str, padded: int | None = None) -> None:
    """Raise DoesNotFit where a tokenizer is not of so many rows (of `what`, that `padded` pieces are known to be on);
    added tokens count."""
    if not (added := added_to(place)):
        check_tokenizer(place, rows, what, padded)
        return
    pieces = max(*pieces_of(place).values(), *added.values()) + 1
    if pieces > rows or (pieces < rows and rows % 8):
        raise DoesNotFit(
            f"The tokenizer in {place} has {pieces:,} pieces with its added tokens, {what} {rows:,} rows."
        )


def check_pieces(path: Path, rows: int | None, what: str) -> Iterator[Finding]:
    """Whether the tokenizer beside the weights is of so many rows."""
    if not rows or not any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return
    manifest = manifest_of(path)
    padded = manifest.vocab_size if manifest and manifest.metrics.get("rows") == rows else None
    try:
        check_size(path, rows, what, padded)
    except DoesNotFit as error:
        remedy = f"Put the tokenizer there that {what} was trained with: fetch it from where {what} comes from, or look in the directory of its training"
        remedy += "." if what == "the adapter" else "; or grow the model to it: chinese-llama extend-model."
        lines = [f"rows of {what}: {rows:,}", f"pieces of the tokenizer: {len(pieces_of(path)):,}"]
        lines += [f"added_tokens.json adds: {', '.join(more)}"] if (more := added_to(path)) else []
        yield Finding("error", "rows-do-not-fit", str(path), str(error), lines, remedy)
    except UNREADABLE:
        return  # told as a trouble of the tokenizer


def _numbers(path: Path, source: Named, config: dict[str, Any]) -> Iterator[Finding]:
    """What one pass over the weights tells."""
    found, lost = measure(source, list(source), VOCABULARY, f"reading {path.name}")
    yield from lost
    yield from check_numbers(found, str(path), config.get("dtype") or config.get("torch_dtype"))
    first = pieces = None
    with contextlib.suppress(*UNREADABLE):
        first = first_new_id(path)
        pieces = max(pieces_of(path).values()) + 1
    rows = {name: found[name] for name in VOCABULARY if name in found}
    yield from check_rows(rows, str(path), first, pieces)


def _meta(thing: Thing) -> Iterator[Finding]:
    """A checkpoint in Meta's form."""
    broken = False
    for file in sorted(thing.path.glob("consolidated.*.pth")):
        try:
            open_tensors(file)
        except BadFile as error:
            broken = True
            yield unreadable(file, error)
    if broken:
        return
    try:
        source = MetaWeights(thing.path)
        config = source.config()
    except UserError as error:
        check = "rows-do-not-fit" if isinstance(error, DoesNotFit) else "checkpoint-damaged"
        remedy = "Fetch params.json, every consolidated.*.pth and tokenizer.model again, from one source."
        yield Finding("error", check, str(thing.path), str(error), listing(thing.path), remedy)
        return
    yield from _numbers(thing.path, source, config)
