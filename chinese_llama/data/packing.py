"""Fill blocks of equal length with documents or samples, without contamination.

Position ids restart with every document; a model called with them and without a cache attends
within a document only. The first token of a document is never a target of the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from chinese_llama.data.templates import IGNORE, Sample
from chinese_llama.progress import say


@dataclass
class Block:
    """`input_ids`, `labels` and `position_ids` of one block, each [block_size]."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)

    def add(self, ids: list[int], labels: list[int]) -> None:
        """Append a document (or a part of one) with positions from 0."""
        self.input_ids += ids
        self.labels += [IGNORE, *labels[1:]]
        self.position_ids += range(len(ids))

    def filled(self, block_size: int, filler: int) -> dict[str, list[int]]:
        """The block as the model takes it; the rest is `filler`, with no label."""
        rest = block_size - len(self.input_ids)
        return {
            "input_ids": self.input_ids + [filler] * rest,
            "labels": self.labels + [IGNORE] * rest,
            "position_ids": self.position_ids + list(range(rest)),
        }


def pack_documents(
    documents: Iterable[list[int]], block_size: int, filler: int
) -> Iterator[dict[str, list[int]]]:
    """Blocks from documents, cut where a block is full; nothing is thrown away.

    Only the last block is filled up. A part that continues a document starts at position 0.
    """
    block = Block()
    for ids in documents:
        start = 0
        while start < len(ids):
            part = ids[start : start + block_size - len(block.input_ids)]
            block.add(part, part)
            start += len(part)
            if len(block.input_ids) == block_size:
                yield block.filled(block_size, filler)
                block = Block()
    if block.input_ids:
        yield block.filled(block_size, filler)


def pack_samples(samples: Iterable[Sample], block_size: int, filler: int) -> Iterator[dict[str, list[int]]]:
    """Blocks from whole samples, in order; samples longer than a block are left out, and told."""
    block = Block()
    kept = long = 0
    for sample in samples:
        if len(sample.input_ids) > block_size:
            long += 1
            continue
        kept += 1
        if len(block.input_ids) + len(sample.input_ids) > block_size:
            yield block.filled(block_size, filler)
            block = Block()
        block.add(sample.input_ids, sample.labels)
    if block.input_ids:
        yield block.filled(block_size, filler)
    if long:
        say(f"Left out {long:,} of {kept + long:,} samples: longer than {block_size} tokens.")
