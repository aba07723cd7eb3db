"""Fill blocks of equal length with documents or samples, without a Python loop over tokens.

A block holds parts: whole documents or samples, or what a cut leaves of a document. The rest of a block
that is not full is filled only when a batch is made of it (chinese_llama.train.collate).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from chinese_llama.data.templates import IGNORE

Array = np.ndarray[Any, Any]
OPEN = 16  # blocks with room that a sample may go into


@dataclass
class Parts:
    """Documents, samples or parts of documents, one behind the other.

    `ids` int32 [tokens]; `lengths` (in tokens) and `documents` (the ordinal in its source of the document
    that each part belongs to) int64 [parts]; `learnt` bool [tokens], or None where every token is learnt.
    """

    ids: Array
    lengths: Array
    documents: Array
    learnt: Array | None = None

    def learnt_targets(self) -> int:
        """How many tokens are learnt; the first one of a part never is, nothing comes before it."""
        learnt = np.ones(len(self.ids), bool) if self.learnt is None else self.learnt.copy()
        learnt[(self.lengths.cumsum() - self.lengths)[self.lengths > 0]] = False
        return int(learnt.sum())


@dataclass
class Blocks:
    """Blocks one behind the other: `tokens` and `counts` (of parts), both int64 [blocks], say where each
    one ends in `parts`."""

    parts: Parts
    tokens: Array
    counts: Array


def parts(
    ids: Sequence[Sequence[int]], documents: Iterable[int], labels: Sequence[Sequence[int]] | None = None
) -> Parts:
    """Parts from lists, one for each; with `labels`, what is IGNORE there is not learnt."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    total = int(lengths.sum())
    return Parts(
        np.fromiter(chain.from_iterable(ids), np.int32, total),
        lengths,
        np.fromiter(documents, np.int64, len(ids)),
        None if labels is None else np.fromiter(chain.from_iterable(labels), np.int32, total) != IGNORE,
    )


def join(pieces: Sequence[Parts]) -> Parts:
    """All parts of the `pieces` (at least one), in order."""
    learnt = [piece.learnt for piece in pieces if piece.learnt is not None]
    return Parts(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.lengths for piece in pieces]),
        np.concatenate([piece.documents for piece in pieces]),
        np.concatenate(learnt) if learnt else None,
    )


def pack_documents(stream: Parts, block_size: int, last: bool) -> tuple[Blocks, Parts]:
    """Blocks from documents, cut where a block is full, and the rest, which is shorter than a block.

    With `last` the rest becomes the last block, and nothing is left over.
    """
    total = len(stream.ids)
    full = total if last else total - total % block_size
    ends = stream.lengths.cumsum()
    cuts = np.union1d(ends[ends > 0], np.arange(block_size, total, block_size))
    lengths = np.diff(cuts, prepend=0)
    starts = cuts - lengths
    documents = stream.documents[np.searchsorted(ends, starts, side="right")]
    inside = int(np.searchsorted(starts, full))
    blocks = Blocks(
        Parts(stream.ids[:full], lengths[:inside], documents[:inside]),
        np.diff(np.append(np.arange(0, full, block_size), full)),
        np.bincount(starts[:inside] // block_size),
    )
    return blocks, Parts(stream.ids[full:], lengths[inside:], documents[inside:])


def pack_samples(samples: Parts, block_size: int) -> Blocks:
    """Blocks from whole samples, none longer than a block; about in order (see `fill`)."""
    chosen = fill(samples.lengths.tolist(), block_size)
    counts = np.array([len(block) for block in chosen], np.int64)
    order = np.fromiter(chain.from_iterable(chosen), np.int64, len(samples.lengths))
    lengths = samples.lengths[order]
    old = samples.lengths.cumsum() - samples.lengths
    new = lengths.cumsum() - lengths
    tokens = np.repeat(old[order] - new, lengths) + np.arange(len(samples.ids))
    learnt = None if samples.learnt is None else samples.learnt[tokens]
    packed = Parts(samples.ids[tokens], lengths, samples.documents[order], learnt)
    firsts = counts.cumsum() - counts
    return Blocks(packed, np.add.reduceat(lengths, firsts) if len(firsts) else counts, counts)


def fill(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """The samples (by number) of each block: a sample goes into the oldest block that has room for it,
    among the `OPEN` newest ones."""
    blocks: list[list[int]] = []
    room: list[int] = []  # tokens
    for sample, length in enumerate(lengths):
        first = max(0, len(blocks) - OPEN)
        for block in range(first, len(blocks)):
            if room[block] >= length:
                break
        else:
            block = len(blocks)
            blocks.append([])
            room.append(block_size)
        blocks[block].append(sample)
        room[block] -= length
    return blocks
