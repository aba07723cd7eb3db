"""What a merge costs, counted from shapes and from a few blocks that are made for it."""

from __future__ import annotations

import resource
import time

import torch

from chinese_llama.merging.describe import Contents, Cost
from chinese_llama.merging.stream import Work
from chinese_llama.model.adapters import Pair, Tensors
from chinese_llama.model.shards import BLOCK, EMBED, blocks, cores
from chinese_llama.model.tensors import nbytes

SAMPLE = 8  # blocks that are made to learn how long one takes
DISK = 1e9  # bytes a second that a disk is taken to write


def cost(work: Work) -> tuple[Cost, list[Contents]]:
    """The figures of a merge, and what each of its adapters holds."""
    source, model = work.source, work.model
    parts = [part for loaded in work.loaded for part in loaded.parts]
    dtypes = {str(m.meta(EMBED)[1]).removeprefix("torch."): m for m in (source, model)}
    return (
        Cost(
            tensors=len(list(model)),
            changed=len(work.changes),
            parameters=sum(torch.Size(source.meta(name)[0]).numel() for name in source),
            rows_before=source.meta(EMBED)[0][0],
            rows=work.rows,
            dtype_before=next(iter(dtypes)),
            dtype=list(dtypes)[-1],
            bytes_read=sum(nbytes(*source.meta(name)) for name in source)
            + sum(part.file.file.stat().st_size for part in parts),
            bytes_written=work.bytes,
            flops=_flops(work),
            memory=_memory(work),
            seconds=_seconds(work),
        ),
        [_contents(part) for part in parts],
    )


def _contents(part: Tensors) -> Contents:
    rows = sum(len(ids) for ids, _ in part.rows.values())
    return Contents(len(part.pairs), len(part.matrices), rows, part.vocabulary())


def _flops(work: Work) -> float:
    total = 0
    for part in [part for loaded in work.loaded for part in loaded.parts]:
        for name, pair in part.pairs.items():
            rows, columns = part.delta_shape(name)
            total += 2 * rows * columns * part.file.meta(pair.a)[0][0]
    return float(total)


def _memory(work: Work) -> int:
    """What the process has now (torch, mostly), the blocks under way, the factors of the widest weights, and
    whole weights where a method needs them."""
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    under_way = (2 * (work.options.workers or cores()) + 2) * BLOCK * 12
    factors = max(
        (
            4 * sum(torch.Size(p.file.meta(key)[0]).numel() for key in (pair.a, pair.b))
            for p, pair in _pairs(work)
        ),
        default=0,
    )
    whole = max(
        (
            4 * torch.Size(change.shape).numel()
            for name, change in work.changes.items()
            if work.merged.together(name)
        ),
        default=0,
    )
    siblings = max(len(step.adapters) for step in work.steps)
    return now + under_way + 4 * factors + whole * (3 * siblings + 3)


def _pairs(work: Work) -> list[tuple[Tensors, Pair]]:
    return [(part, pair) for loaded in work.loaded for part in loaded.parts for pair in part.pairs.values()]


def _seconds(work: Work) -> float:
    """A few blocks from all over the model are made; the rest takes as long in proportion."""
    names = [name for name in work.model if not work.merged.together(name)]
    todo = list(blocks(work.model, names))
    sample = todo[:: max(1, len(todo) // SAMPLE)]
    start, done = time.perf_counter(), 0
    for name, first, last in sample:
        done += work.model.rows(name, first, last).numel()
    each = (time.perf_counter() - start) / max(1, done)
    numbers = sum(torch.Size(work.model.meta(name)[0]).numel() for name in work.model)
    return each * numbers / (work.options.workers or cores()) + work.bytes / DISK
