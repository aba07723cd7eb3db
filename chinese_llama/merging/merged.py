"""A base with adapters in it, as a `Model` whose rows are made when they are asked for.

A weight is computed in float32, in tiles of whole rows that lie where they lie however it is asked for,
each by one thread: the bits do not depend on blocks, workers or the number of processors.
"""

from __future__ import annotations

import functools
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from chinese_llama.errors import BadFile, UserError
from chinese_llama.merging.delta import Factors, add_delta, combined, dora, joined
from chinese_llama.merging.plan import Step
from chinese_llama.model.adapters import Tensors
from chinese_llama.model.shards import EMBED, HEAD, Change, Named
from chinese_llama.model.tensors import Meta

TILE = 1 << 18  # numbers in a tile


@dataclass
class Loaded:
    """A step of a plan with the tensors of its adapters."""

    step: Step
    parts: list[Tensors]


class Operation(Protocol):
    def apply(self, total: torch.Tensor, start: int) -> None:
        """Change `total` [rows, columns], float32, the rows of a weight from `start` on."""


@dataclass
class Add:
    """Add what a LoRA pair, or several in one, says."""

    pair: Factors

    def apply(self, total: torch.Tensor, start: int) -> None:
        add_delta(total, self.pair, start)


@dataclass
class Dora:
    """A DoRA pair. With a weight other than 1, that share of the way from what lies below."""

    pair: Factors
    weight: float

    def apply(self, total: torch.Tensor, start: int) -> None:
        whole = dora(total, self.pair, start)
        total.copy_(whole if self.weight == 1 else total.lerp(whole, self.weight))


@dataclass
class Whole:
    """A matrix that replaces what lies below, as far as it reaches."""

    part: Tensors
    name: str

    @property
    def count(self) -> int:
        """Its rows."""
        return self.part.matrix(self.name)[0][0]

    def apply(self, total: torch.Tensor, start: int) -> None:
        stop = min(start + len(total), self.count)
        if stop > start:
            total[: stop - start] = self.part.file.rows(self.part.matrices[self.name], start, stop)


@dataclass
class Rows:
    """Single rows, which hold final values."""

    part: Tensors
    name: str

    def __post_init__(self) -> None:
        ids, self.key = self.part.rows[self.name]
        self.ids = torch.tensor(ids)

    def apply(self, total: torch.Tensor, start: int) -> None:
        here = ((self.ids >= start) & (self.ids < start + len(total))).nonzero()[:, 0].tolist()
        for first, last in _runs(here):
            wanted = self.ids[first:last] - start
            total[wanted] = self.part.file.rows(self.key, first, last).float()


@dataclass
class Combine:
    """Adapters that share what lies below: their deltas, combined. Rows from `have` on, which nothing below
    has, are the weighted mean of theirs."""

    siblings: list[list[Operation]]
    step: Step
    have: int
    seed: int

    def apply(self, total: torch.Tensor, start: int) -> None:
        weights = [adapter.weight for adapter in self.step.adapters]
        own = []
        for operations in self.siblings:
            own.append(total.clone())
            for operation in operations:
                operation.apply(own[-1], start)
        old = max(0, min(len(total), self.have - start))
        deltas = [mine[:old] - total[:old] for mine in own]
        if old:
            total[:old] += combined(deltas, weights, self.step.method, self.step.density, self.seed)
        if old < len(total):
            total[old:] = combined([mine[old:] for mine in own], weights, "linear", 1.0, 0) / sum(weights)


class Merged:
    """The weights of `source` with everything that the steps say of them, in their order."""

    def __init__(self, source: Named, steps: Sequence[Loaded]) -> None:
        self.source, self.steps = source, steps
        # of the few weights that are being made: factors in float32, and those that are made as a whole
        self.operations = functools.lru_cache(maxsize=3)(self._operations)
        self._whole = functools.lru_cache(maxsize=2)(self.total)
        self._lock = threading.Lock()

    def changes(self, rows: int, dtype: torch.dtype | None = None) -> dict[str, Change]:
        """The weights that change, with `rows` rows of vocabulary, in the dtype of the source; with a `dtype`
        all that hold fractions, in that one."""
        touched = {name for loaded in self.steps for part in loaded.parts for name in part.names()}
        if rows > self.source.meta(EMBED)[0][0]:
            touched |= {EMBED, HEAD}
        changes = {}
        for name in self.source:
            shape, stored = self.source.meta(name)
            keep = dtype is None or not stored.is_floating_point or name.endswith("inv_freq") or not shape
            wanted = stored if keep else dtype
            if name in touched or wanted != stored:
                shape = (rows, *shape[1:]) if name in (EMBED, HEAD) else shape
                changes[name] = Change(shape, wanted, functools.partial(self.rows, name, shape, wanted))
        return changes

    def rows(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, start: int, stop: int
    ) -> torch.Tensor:
        """Rows [start, stop) of a weight of that shape, rounded once to `dtype`. Raises BadFile or UserError
        where a value is not finite."""
        if self.together(name):
            return self._rounded(name, self.exact(name, shape, start, stop), dtype)
        tile, found = max(1, TILE // max(1, torch.Size(shape[1:]).numel())), []
        for first in range(start - start % tile, stop, tile):
            total = self.total(name, shape, first, min(first + tile, shape[0]))
            found.append(self._rounded(name, total[max(0, start - first) : stop - first], dtype))
        return torch.cat(found) if len(found) != 1 else found[0]

    def exact(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a weight of that shape before they are rounded, [rows, ...] in float32; not to be
        changed."""
        if not self.together(name):
            return self.total(name, shape, start, stop)
        with self._lock:
            return self._whole(name, shape, 0, shape[0])[start:stop]

    def total(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """`exact`, but what looks at whole weights sees these rows only; the caller's own memory."""
        total = self.below(name, shape, start, stop)
        for operation in self.operations(name):
            operation.apply(total, start)
        return total

    def below(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """What `total` begins with: rows of the base in float32; zeros where it has none, or where an
        adapter brings all of them."""
        have = self.source.meta(name)[0][0]
        if _covers(self.operations(name), have):
            have = 0
        if stop <= have:
            return self.source.rows(name, start, stop).to(torch.float32, copy=True)
        below = torch.zeros((stop - start, *shape[1:]), dtype=torch.float32)
        if start < have:
            below[: have - start] = self.source.rows(name, start, have)
        return below

    def together(self, name: str) -> bool:
        """Whether a method looks at the whole weight at once."""
        return any(
            loaded.step.method not in ("sequence", "linear") and any(name in p.names() for p in loaded.parts)
            for loaded in self.steps
        )

    def _operations(self, name: str) -> list[Operation]:
        found: list[Operation] = []
        have = self.source.meta(name)[0][0]
        for loaded in self.steps:
            own = [_operations(part, name, part.adapter.weight) for part in loaded.parts]
            if loaded.step.method == "linear" and all(isinstance(o, Add) for ops in own for o in ops):
                found += [operation for operations in own for operation in operations]
            elif len(own) == 1:
                found = own[0] if _covers(own[0], have) else found + own[0]
            elif any(own):
                own = [_operations(part, name, 1.0) for part in loaded.parts]  # the method weighs them
                seed = loaded.step.seed ^ zlib.crc32(name.encode())
                found.append(Combine(own, loaded.step, have, seed))
            have = max([have, *(p.matrix(name)[0][0] for p in loaded.parts if name in p.matrices)])
        return _joined(found)

    def _rounded(self, name: str, total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        kind = torch.finfo(dtype)
        bound = kind.max * (1 + kind.eps / 4)  # what lies below still rounds to the largest number
        flat = total.reshape(-1)
        if not torch.dot(flat, flat) < min(bound, 1e18) ** 2:  # cheaper than looking at each number
            low, high = torch.aminmax(flat)
            if not (-bound < low and high < bound):
                raise self._blame(name, dtype)
        return total.to(dtype)

    def _blame(self, name: str, dtype: torch.dtype) -> UserError:
        """Why a weight is not finite."""
        if not torch.isfinite(self.source.load(name)).all():
            return UserError(f"{name} of the base has values that are not finite.")
        for part in [part for loaded in self.steps for part in loaded.parts]:
            for key in part.keys_of(name):
                if not torch.isfinite(part.file.load(key)).all():
                    return BadFile(part.file.file, f"the tensor {key} has values that are not finite.")
        return UserError(f"{name} overflows {dtype} when merged; the base or an adapter is damaged.")


def _covers(operations: Sequence[Operation], count: int) -> bool:
    """Whether they begin with a matrix that leaves nothing of the `count` rows below."""
    return bool(operations) and isinstance(operations[0], Whole) and operations[0].count >= count


def _operations(part: Tensors, name: str, weight: float) -> list[Operation]:
    """What one adapter of that weight does to a weight of the model, in the order in which it does it."""
    found = list[Operation]()
    if name in part.matrices:
        found.append(Whole(part, name))
    if name in part.pairs:
        plain = part.pairs[name].magnitude is None
        found.append(Add(part.factors(name, weight)) if plain else Dora(part.factors(name), weight))
    if name in part.rows:
        found.append(Rows(part, name))
    return found


def _joined(operations: Sequence[Operation]) -> list[Operation]:
    """The same with neighbouring pairs as one: one product instead of several."""
    found: list[Operation] = []
    for operation in operations:
        last = found[-1] if found else None
        if (
            isinstance(operation, Add)
            and isinstance(last, Add)
            and len(last.pair.left) == len(operation.pair.left)
        ):
            found[-1] = Add(joined([last.pair, operation.pair]))
        else:
            found.append(operation)
    return found


def _runs(places: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each run of neighbours in ascending numbers."""
    start = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[i - 1] + 1:
            yield places[start], places[i - 1] + 1
            start = i


class InMemory:
    """Loaded tensors where the rows of a `Model` are wanted."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def meta(self, name: str) -> Meta:
        return tuple(self.tensors[name].shape), self.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop].cpu()

    def load(self, name: str) -> torch.Tensor:
        return self.tensors[name].cpu()


def bake(model: Any, steps: Sequence[Loaded]) -> None:
    """Merge adapters into a loaded model in place, as `merge` does with files."""
    state = model.state_dict()
    rows = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        for name, change in Merged(InMemory(state), steps).changes(rows).items():
            state[name].copy_(change.rows(0, change.shape[0]))
