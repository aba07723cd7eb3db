"""Several sources as one data set: what they are, their names, and their shares of the tokens."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chinese_llama import hub
from chinese_llama.data.formats import PATTERNS, corpus_files
from chinese_llama.errors import UserError


@dataclass(frozen=True)
class Source:
    """A corpus and its weight: its share of the tokens, relative to the other weights.

    Without weights every source is seen once per epoch. `path` is a file, a directory, or the hub id of a
    dataset; of the latter two, `files` is a glob that chooses files. `format` is that of conversations.
    """

    path: Path
    weight: float | None = None
    files: str | None = None
    format: str = "auto"

    def list_files(self) -> list[Path]:
        """The files of the source in order, downloaded first if it is a hub id. Raises UserError."""
        path = self.path
        if hub.is_hub_id(path):
            path = hub.dataset(str(path), [self.files] if self.files else PATTERNS)
        return corpus_files(path, self.files)


def sources(data: Any) -> list[Source]:
    """Sources from the field `data`: a path or a hub id, or a list of those or of {path, weight, files, format}.

    Raises UserError where it is none of these, a weight is not positive, or only some have one.
    """
    items = data if isinstance(data, (list, tuple)) else [data]
    found = [_source(item) for item in items]
    if not found:
        raise UserError("data: no corpus is given.")
    if len({source.weight is None for source in found}) > 1:
        raise UserError("data: give every source a weight, or none.")
    return found


def _source(item: Any) -> Source:
    if isinstance(item, (str, Path)):
        return Source(Path(item))
    known = {field.name for field in dataclasses.fields(Source)}
    if not isinstance(item, dict) or "path" not in item or set(item) - known:
        raise UserError(
            f"data: {item!r} is neither a path nor {{path: FILE, weight: NUMBER, files: GLOB, format: NAME}}."
        )
    weight = item.get("weight")
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if weight is not None and not (number and 0 < weight < math.inf):
        raise UserError(f"data: {item['path']}: the weight {weight!r} is not a positive number.")
    for name in ("files", "format"):
        if not isinstance(item.get(name) or "", str):
            raise UserError(f"data: {item['path']}: {name} {item[name]!r} is not text.")
    return Source(Path(str(item["path"])), weight, item.get("files"), item.get("format") or "auto")


def names(found: Sequence[Source]) -> list[str]:
    """A short name for each source, none twice: that of its file or directory without suffixes.

    >>> names([Source(Path("a/zh.jsonl.gz")), Source(Path("b/zh.txt")), Source(Path("en"))])
    ['zh', 'zh-2', 'en']
    """
    made: list[str] = []
    for source in found:
        stem = source.path.name.partition(".")[0] or "data"
        number, name = 1, stem
        while name in made:
            number += 1
            name = f"{stem}-{number}"
        made.append(name)
    return made


def mix(
    found: Sequence[Source], lengths: Sequence[int], seed: int, tokens: Sequence[int] | None = None
) -> list[list[int]]:
    """For each source the indices of the blocks that make up one epoch.

    `lengths` are the sources' blocks, `tokens` their tokens (by default, all blocks are equally full). With
    weights, the epoch has the tokens of all sources together, and each source gets its share of them: repeated where it is too short, a random choice of blocks where it is too long.
    """
    if found[0].weight is None:
        return [list(range(length)) for length in lengths]
    whole = sum(source.weight or 0 for source in found)
    tokens = tokens or lengths
    full = [count / length for count, length in zip(tokens, lengths, strict=True)]  # tokens of a block
    shares = [sum(tokens) * (s.weight or 0) / whole / each for s, each in zip(found, full, strict=True)]
    chosen = []
    for number, (length, share) in enumerate(zip(lengths, shares, strict=True)):
        wanted = max(1, round(share))
        order = list(range(length))
        random.Random(f"{seed}:{number}").shuffle(order)
        chosen.append((order * math.ceil(wanted / length))[:wanted])
    return chosen
