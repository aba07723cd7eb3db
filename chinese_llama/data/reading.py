"""Read a source in batches, from any point on, while the batches before are worked on."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from chinese_llama.progress import track

BATCH = 1 << 20  # characters that are tokenised in one call
AHEAD = 2  # batches

A = TypeVar("A")
B = TypeVar("B")


class Position(NamedTuple):
    """How far a source is read: the files before number `file`, `items` of that one, `documents` in all."""

    file: int = 0
    items: int = 0
    documents: int = 0


@dataclass
class Batch:
    """Documents or conversations, and their ordinals in the source; texts that are held out; how many records
    were left out of the files that end in this batch, by reason; the position after it."""

    items: list[Any] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    end: Position = field(default_factory=Position)


def batches(
    files: Sequence[Path],
    read: Callable[[Path, Counter[str]], Iterator[Any]],
    size: Callable[[Any], int],
    share: float,
    start: Position,
) -> Iterator[Batch]:
    """What `read` gives of the `files` from `start` on, about `BATCH` characters (by `size`) at a time; the
    last batch may be empty. `share` of the documents are held out, see `held_out`.

    A batch depends on nothing that comes before it, so reading may go on after any of them.
    """
    batch, characters = Batch(), 0
    ordinal = start.documents
    for number in range(start.file, len(files)):
        before = start.items if number == start.file else 0
        left_out = Counter[str]()
        items = islice(read(files[number], left_out), before, None)
        for count, item in enumerate(
            track(items, f"preparing {files[number].name}", unit="documents"), before + 1
        ):
            if share and held_out(item, share):
                batch.held_out.append(item)
            else:
                batch.items.append(item)
                batch.ordinals.append(ordinal)
            ordinal += 1
            characters += size(item)
            if characters >= BATCH:
                batch.end = Position(number, count, ordinal)
                yield batch
                batch, characters = Batch(), 0
        batch.left_out += left_out
    batch.end = Position(len(files), 0, ordinal)
    yield batch


def held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the `share` that is held out: by its text alone (without white space
    around it), so that equal texts are on one side, wherever they stand.

    >>> held_out("同", 0.5) == held_out(" 同\\n", 0.5)
    True
    """
    digest = hashlib.sha256(text.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def ahead(items: Iterable[A], work: Callable[[A], B]) -> Iterator[tuple[A, B]]:
    """Each item and `work(item)`, which a thread does for the next items in the meantime."""
    waiting: deque[tuple[A, Future[B]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            waiting.append((item, thread.submit(work, item)))
            if len(waiting) > AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
