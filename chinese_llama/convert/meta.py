"""Meta's own LLaMA 1 and 2 checkpoints read as models by their Hugging Face names.

A directory holds consolidated.00.pth, consolidated.01.pth, ... and params.json; tokenizer.model lies
beside them or one directory above. Rows are gathered from the shards as they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chinese_llama.artifacts import read_manifest
from chinese_llama.convert.layout import (
    OUTPUT,
    ROPES,
    TOKENS,
    Sizes,
    Slot,
    by_heads,
    even,
    hf_order,
    slots,
    to_halves,
)
from chinese_llama.convert.params import KEPT, context_of, hf_config, kv_heads, read_params
from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.model.shards import Model, Weights
from chinese_llama.model.tensors import DTYPES, Meta, TensorFile, nbytes, open_tensors, raw
from chinese_llama.vocab.proto import read_model

SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
MAX_SHARD = 5 * 10**9  # bytes of one file of the Hugging Face form
W1 = "layers.0.feed_forward.w1.weight"


def open_model(place: Path) -> Model:
    """The model in a directory, in Meta's form or Hugging Face's. Raises BadFile."""
    return MetaWeights(place) if is_meta(place) else Weights(place)


def is_meta(place: Path) -> bool:
    """Whether a directory holds Meta's form (a Hugging Face one has a config.json instead of params.json)."""
    place = Path(place)
    if not any(SHARD.fullmatch(file.name) for file in place.glob("consolidated.*.pth")):
        return False
    return (place / "params.json").is_file() or not (place / "config.json").is_file()


class MetaWeights:
    """The tensors of a checkpoint of Meta's, whole and in Hugging Face's order of rows.

    `context` is the `max_position_embeddings` of `config`, which Meta's files do not say (None: as
    published, see `params.context_of`). Raises BadFile where files are missing, damaged or contradict
    each other, DoesNotFit where the tokenizer is of another model.
    """

    def __init__(self, directory: Path, context: int | None = None) -> None:
        self.directory, self.context = Path(directory), context
        self.params = read_params(self.directory / "params.json")
        self.files = [open_tensors(file) for file in shard_files(self.directory)]
        _check_alike(self.files)
        self._sizes = self._measured()
        self._slots = {slot.hf: slot for slot in hf_order(slots(self._sizes))}
        self._check_names()
        self._divided = {slot.hf: self._division(slot) for slot in self._slots.values()}
        self._check_copies()
        self.tokenizer = tokenizer_of(self.directory, self._sizes.vocab)

    def _measured(self) -> Sizes:
        """The sizes in params.json; those that are not in it from the tensors."""
        there = self.files[0].keys()
        for name in (TOKENS, OUTPUT, W1):
            if name not in there:
                raise BadFile(self.files[0].file, f"lacks the tensor {name}.")
        vocab, ffn = (sum(file.meta(name)[0][0] for file in self.files) for name in (OUTPUT, W1))
        said = self.params.get("vocab_size", -1)
        if said not in (-1, vocab):
            what = f"says vocab_size {said:,}, and {OUTPUT} has {vocab:,} rows; the files do not belong together."
            raise BadFile(self.directory / "params.json", what)
        params = self.params
        if params["n_layers"] > len(there):
            what = f"says {params['n_layers']:,} layers, more than there are tensors."
            raise BadFile(self.directory / "params.json", what)
        return Sizes(params["dim"], params["n_layers"], params["n_heads"], kv_heads(params), ffn, vocab)

    def _check_names(self) -> None:
        there = self.files[0].keys()
        wanted = {slot.meta for slot in self._slots.values()}
        for name in there:
            if name not in wanted and not ROPES.fullmatch(name):
                raise BadFile(self.files[0].file, f"has the tensor {name}, which LLaMA 1 and 2 do not have.")
        for slot in self._slots.values():
            if slot.meta not in there:
                raise BadFile(self.files[0].file, f"lacks the tensor {slot.meta}.")

    def _division(self, slot: Slot) -> tuple[int | None, list[int]]:
        """The dimension that a tensor is divided along, and how much of it each shard has."""
        shapes = [file.meta(slot.meta)[0] for file in self.files]
        along = slot.divided
        if slot.meta == TOKENS and len(shapes) > 1 and shapes[0][1:] == slot.shape[1:]:
            along = 0  # by rows, as LLaMA 3 divides it
        parts = [shape[along] for shape in shapes] if along is not None and len(shapes[0]) > along else []
        whole = list(shapes[0])
        if parts and along is not None:
            whole[along] = sum(parts)
        if tuple(whole) != slot.shape:
            what = (
                f"{slot.meta} of {len(shapes)} shards makes {whole} together, and params.json says "
                f"{list(slot.shape)}; is a shard missing, or params.json of another model?"
            )
            raise BadFile(self.files[0].file, what)
        return along, parts

    def _check_copies(self) -> None:
        """What every shard has whole must be the same in all."""
        copied = [slot.meta for slot in self._slots.values() if self._divided[slot.hf][0] is None]
        for name in copied + self._ropes():
            first = self.files[0].load(name)
            for file in self.files[1:]:
                if raw(file.load(name)) != raw(first):
                    what = f"{name} differs from the one in {self.files[0].file.name}; the shards do not belong together."
                    raise BadFile(file.file, what)

    def _ropes(self) -> list[str]:
        return list(filter(ROPES.fullmatch, self.files[0].keys()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def meta(self, name: str) -> Meta:
        slot = self._slots[name]
        return slot.shape, self.files[0].meta(slot.meta)[1]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        slot = self._slots[name]
        stop = min(stop, slot.shape[0])
        if start >= stop:
            return torch.empty((0, *slot.shape[1:]), dtype=self.meta(name)[1])
        read = partial(self._stored, slot)
        return (
            by_heads(read, to_halves, self._sizes.head_dim, start, stop) if slot.rotary else read(start, stop)
        )

    def load(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self._slots[name].shape[0])

    def _stored(self, slot: Slot, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a whole tensor in Meta's order."""
        along, parts = self._divided[slot.hf]
        if along is None:
            return self.files[0].rows(slot.meta, start, stop)
        if along == 1:
            found = [file.rows(slot.meta, start, stop) for file in self.files]
            return torch.cat(found, dim=1) if len(found) > 1 else found[0]
        found, first = [], 0
        for file, count in zip(self.files, parts, strict=True):
            if first < stop and start < first + count:
                found.append(file.rows(slot.meta, max(start - first, 0), min(stop - first, count)))
            first += count
        return torch.cat(found) if len(found) > 1 else found[0]

    def config(self) -> dict[str, Any]:
        dtype = self.files[0].meta(TOKENS)[1]
        config = hf_config(self.params, self._sizes, dtype, context_of(self.params, dtype))
        manifest = read_manifest(self.directory)
        kept = {**manifest.metrics, **manifest.settings}.get("hf", {}) if manifest else {}
        config |= {name: kept[name] for name in KEPT if kept.get(name) is not None}
        return config | ({"max_position_embeddings": self.context} if self.context else {})

    def parts(self) -> list[list[str]]:
        found: list[list[str]] = [[]]
        size = 0
        for name in self:
            more = nbytes(*self.meta(name))
            if found[-1] and size + more > MAX_SHARD:
                found, size = [*found, []], 0
            found[-1].append(name)
            size += more
        return found

    def layout(self) -> dict[str, Any]:
        """What is lost in the Hugging Face form, for `write.save_meta` to make the same files again:
        params.json, the number of shards, how the vocabulary's matrices are divided where it is not the
        usual way, and the rotary buffers."""
        count = len(self.files)
        divided = {}
        for slot in self._slots.values():
            along, parts = self._divided[slot.hf]
            if along is not None and (along, parts) != (slot.divided, even(slot.shape[along], count)):
                divided[slot.meta] = {"dim": along, "parts": parts}
        return {"params": self.params, "shards": count, "divided": divided, "rope": self._rope()}

    def _rope(self) -> list[dict[str, Any]]:
        """The rotary buffers, those that are the same together; values are the bytes in hexadecimal."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in self._ropes():
            tensor = self.files[0].load(name)
            found.setdefault((DTYPES[tensor.dtype], bytes(raw(tensor)).hex()), []).append(name)
        return [
            {"names": names, "dtype": dtype, "values": values} for (dtype, values), names in found.items()
        ]


def shard_files(directory: Path) -> list[Path]:
    """consolidated.00.pth and so on. Raises BadFile where one is missing."""
    files = sorted(file for file in directory.glob("consolidated.*.pth") if SHARD.fullmatch(file.name))
    if not files:
        raise BadFile(directory, "has no consolidated.00.pth; it is no checkpoint in Meta's form.")
    for number, file in enumerate(files):
        if file.name != shard_name(number):
            missing = directory / shard_name(number)
            raise BadFile(
                missing, f"this shard is missing ({files[-1].name} is there); the copy is not complete."
            )
    return files


def shard_name(number: int) -> str:
    """The file of a shard, counted from 0."""
    return f"consolidated.{number:02d}.pth"


def _check_alike(files: list[TensorFile]) -> None:
    """Raise BadFile unless all shards have the same names, types and shapes; only the vocabulary may be
    divided unevenly."""
    first = files[0]
    names = first.keys()
    for name in names:
        shape, dtype = first.meta(name)
        if dtype not in DTYPES or not dtype.is_floating_point or len(shape) not in (1, 2):
            raise BadFile(
                first.file, f"{name} has the shape {list(shape)} and the type {dtype}; no LLaMA has it."
            )
    for file in files[1:]:
        if set(names) != set(file.keys()):
            name = min(set(names) ^ set(file.keys()))
            has, lacks = (first, file) if name in names else (file, first)
            what = f"lacks the tensor {name}, which {has.file.name} has; the shards do not belong together."
            raise BadFile(lacks.file, what)
        for name in names:
            (one, a), (other, b) = first.meta(name), file.meta(name)
            start = 1 if name in (TOKENS, OUTPUT) else 0
            if a != b or one[start:] != other[start:]:
                what = (
                    f"{name} is {list(other)} of {b}, and {list(one)} of {a} in {first.file.name}; the shards "
                    "do not belong together."
                )
                raise BadFile(file.file, what)


def tokenizer_of(directory: Path, rows: int) -> Path | None:
    """tokenizer.model of a checkpoint: beside it, or one directory above as Meta lays them out; None where
    there is none. Raises BadFile if it is LLaMA 3's, DoesNotFit if it has more pieces than `rows`."""
    places = (directory / "tokenizer.model", directory.resolve().parent / "tokenizer.model")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    with open(file, "rb") as stream:
        if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n", stream.readline(1000)):
            what = "is LLaMA 3's (no SentencePiece model); LLaMA 1 and 2 are converted, take Meta's Hugging Face files of this one."
            raise BadFile(file, what)
    pieces = len(read_model(file).pieces)
    if pieces > rows:
        raise DoesNotFit(
            f"{file} has {pieces:,} pieces, and {OUTPUT} in {directory} {rows:,} rows; put the tokenizer of "
            "this checkpoint beside it."
        )
    return file
