"""Models written as Meta's own LLaMA 1 and 2 checkpoints, all shards side by side in one pass."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chinese_llama.convert.layout import (
    OUTPUT,
    ROPE,
    SHARDS,
    Slot,
    by_heads,
    even,
    slots,
    to_pairs,
)
from chinese_llama.convert.meta import shard_name
from chinese_llama.convert.params import hf_sizes, meta_params, resized, rope_theta, still_says
from chinese_llama.convert.torchzip import STORAGES, TorchWriter
from chinese_llama.directories import write_text
from chinese_llama.errors import DoesNotFit
from chinese_llama.model.shards import EMBED, HEAD, Hashes, Model, Workers, blocks, made
from chinese_llama.model.tensors import CODES, Meta, raw
from chinese_llama.progress import say, track

MOST = 100  # shards: their numbers have two digits
# buffers of old versions of transformers, which compute them anew as Meta's code does
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def save_meta(
    model: Model,
    output: Path,
    shards: int | None = None,
    workers: Workers | int = 0,
    like: dict[str, Any] | None = None,
    what: str = "converting",
    hashed: Callable[[], Any] = hashlib.sha256,
) -> Hashes:
    """Write `model` into `output` as consolidated.NN.pth and params.json; return the hash of each file of
    tensors.

    `like` is the `layout` of the checkpoint that the model came from (see `MetaWeights.layout`), whose
    files are made again where nothing has changed; `shards` defaults to its number, or to that of the
    published model of this size. `workers` threads read (0: one for each processor). Memory is a few
    blocks of rows.

    Raises DoesNotFit for what Meta's format has no place for, and for shards that do not come out even.
    """
    named = ByMeta(model, like)
    if named.tied:
        say(f"The embeddings are the output too; {OUTPUT} is written as a copy of them.")
    count = shard_count(named, shards, like)
    divided = {slot.meta: _division(slot, count, like) for slot in named.slots.values()}
    specs = [dict(named.spec(name, divided.get(name), number) for name in named) for number in range(count)]
    writers = [TorchWriter(output / shard_name(number), spec, hashed()) for number, spec in enumerate(specs)]
    todo = list(blocks(named, named))
    stream = track(made(named, todo, workers), what, len(todo), "blocks")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(stream))
        for writer in writers:
            stack.enter_context(writer)
        for (name, start, _), rows in stream:
            for number, part in _parts(rows, start, divided.get(name), count):
                writers[number].write(name, raw(part.contiguous()))
    write_text(output / "params.json", json.dumps(named.params) + "\n")
    return {w.path.name: {w.digest.name.lower(): w.digest.hexdigest()} for w in writers}


class ByMeta:
    """A model's tensors by Meta's names and in its order of rows: a `Model` of other names.

    Raises DoesNotFit where Meta's format has no place for the model.
    """

    def __init__(self, model: Model, like: dict[str, Any] | None = None) -> None:
        self.model = model
        config = model.config()
        if EMBED not in model:
            raise DoesNotFit(f"the model has no tensor {EMBED}; Meta's format needs it.")
        self.sizes = hf_sizes(config, model.meta(EMBED)[0][0])
        self.tied = bool(config.get("tie_word_embeddings"))
        self.slots = {slot.meta: slot for slot in slots(self.sizes)}
        self._check()
        if like and still_says(like["params"], config, self.sizes):
            self.params, self._ropes = resized(like["params"], self.sizes.vocab), kept_ropes(like["rope"])
        else:
            self.params = meta_params(config, self.sizes)
            frequencies = rope(rope_theta(config), self.sizes.head_dim, model.meta(EMBED)[1])
            self._ropes = {ROPE: frequencies}

    def _check(self) -> None:
        wanted = {slot.hf for slot in self.slots.values()}
        for name in self.model:
            if name not in wanted and not COMPUTED.fullmatch(name):
                raise DoesNotFit(f"the model has the tensor {name}, which Meta's format has no place for.")
        for slot in self.slots.values():
            source = self._source(slot)
            if source not in self.model:
                raise DoesNotFit(f"the model has no tensor {source}; Meta's format needs it.")
            shape, dtype = self.model.meta(source)
            if shape != slot.shape:
                raise DoesNotFit(f"{source} is {list(shape)}, and config.json makes it {list(slot.shape)}.")
            if dtype not in STORAGES:
                raise DoesNotFit(f"{source} is of the type {dtype}, which Meta's format has no place for.")

    def _source(self, slot: Slot) -> str:
        return EMBED if slot.hf == HEAD and self.tied else slot.hf

    def __iter__(self) -> Iterator[str]:
        return iter([*self.slots, *self._ropes])

    def __contains__(self, name: object) -> bool:
        return name in self.slots or name in self._ropes

    def meta(self, name: str) -> Meta:
        if name in self._ropes:
            return tuple(self._ropes[name].shape), self._ropes[name].dtype
        return self.model.meta(self._source(self.slots[name]))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._ropes:
            return self._ropes[name][start:stop]
        slot = self.slots[name]
        read = partial(self.model.rows, self._source(slot))
        return (
            by_heads(read, to_pairs, self.sizes.head_dim, start, stop) if slot.rotary else read(start, stop)
        )

    def load(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.meta(name)[0][0])

    def config(self) -> dict[str, Any]:
        return self.model.config()

    def parts(self) -> list[list[str]]:
        return [list(self)]

    def spec(self, name: str, divided: tuple[int, list[int]] | None, number: int) -> tuple[str, Meta]:
        """The name, shape and type of a tensor in shard `number`."""
        shape, dtype = self.meta(name)
        if divided:
            along, parts = divided
            shape = (*shape[:along], parts[number], *shape[along + 1 :])
        return name, (shape, dtype)


class Restored:
    """What `save_meta` wrote of `model`, by the names of the model: without the output of one that is tied, and
    with the buffers that Meta's form has no place for."""

    def __init__(self, written: Model, model: Model) -> None:
        self.written, self.model = written, model
        self.tied = bool(model.config().get("tie_word_embeddings"))
        buffers = [name for name in model if COMPUTED.fullmatch(name)]
        self._names = [name for name in written if not (self.tied and name == HEAD)] + buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def meta(self, name: str) -> Meta:
        return self._place(name).meta(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._place(name).rows(name, start, stop)

    def load(self, name: str) -> torch.Tensor:
        return self._place(name).load(name)

    def config(self) -> dict[str, Any]:
        return {**self.written.config(), "tie_word_embeddings": self.tied}

    def parts(self) -> list[list[str]]:
        return [self._names]

    def _place(self, name: str) -> Model:
        return self.written if name in self.written else self.model


def shard_count(named: ByMeta, asked: int | None, like: dict[str, Any] | None) -> int:
    """How many shards to write. Raises DoesNotFit where the model does not divide into as many."""
    count = asked or (like or {}).get("shards") or SHARDS.get(named.sizes.dim, 1)
    sizes = named.sizes
    if not 1 <= count <= MOST:
        raise DoesNotFit(f"{count} shards: Meta's format has from 1 to {MOST}.")
    for number, what in (
        (sizes.heads, "heads"),
        (sizes.kv_heads, "key/value heads"),
        (sizes.ffn, "rows of the feed-forward"),
    ):
        if number % count:
            raise DoesNotFit(
                f"{number:,} {what} do not divide over {count} shards; give another number of shards."
            )
    return count


def _division(slot: Slot, count: int, like: dict[str, Any] | None) -> tuple[int, list[int]] | None:
    """The dimension that a tensor is divided along and what each shard gets; None: all of it."""
    if slot.divided is None:
        return None
    kept = (like or {}).get("divided", {}).get(slot.meta)
    along = kept["dim"] if kept else slot.divided
    if kept and len(kept["parts"]) == count and sum(kept["parts"]) == slot.shape[along]:
        return along, kept["parts"]
    return along, even(slot.shape[along], count)


def _parts(
    rows: torch.Tensor, start: int, divided: tuple[int, list[int]] | None, count: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """What each shard gets of the rows from `start` on."""
    if divided is None:
        yield from ((number, rows) for number in range(count))
        return
    along, parts = divided
    first = 0
    for number, part in enumerate(parts):
        if along == 1:
            yield number, rows[:, first : first + part]
        elif first < start + len(rows) and start < first + part:
            yield number, rows[max(first - start, 0) : first + part - start]
        first += part


def rope(theta: float, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The frequencies of the rotary embedding, [head_dim / 2], as Meta's code computes them."""
    return (1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))).to(dtype)


def kept_ropes(kept: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The rotary buffers of a checkpoint, from its `layout`."""
    found: dict[str, torch.Tensor] = {}
    for group in kept:
        values = torch.frombuffer(bytearray.fromhex(group["values"]), dtype=CODES[group["dtype"]])
        found |= dict.fromkeys(group["names"], values)
    return found
