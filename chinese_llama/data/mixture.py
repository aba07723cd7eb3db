"""Several sources as one data set: each packed on its own, then mixed by share of tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chinese_llama.errors import UserError


@dataclass
class Source:
    """A corpus and its weight: its share of the tokens, relative to the other weights.

    Without weights every source is seen once per epoch.
    """

    path: Path
    weight: float | None = None


def sources(data: Any) -> list[Source]:
    """Sources from the field `data`: a path, a list of paths, or a list of {path, weight}.

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
    if not isinstance(item, dict) or "path" not in item or set(item) - {"path", "weight"}:
        raise UserError(f"data: {item!r} is neither a path nor {{path: FILE, weight: NUMBER}}.")
    weight = item.get("weight")
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if weight is not None and not (number and 0 < weight < math.inf):
        raise UserError(f"data: {item['path']}: the weight {weight!r} is not a positive number.")
    return Source(Path(str(item["path"])), weight)


def mix(found: list[Source], lengths: list[int], seed: int) -> list[list[int]]:
    """For each source the indices of the blocks that make up one epoch.

    With weights, the epoch is as long as all sources together, and each source gets its share of
    it: repeated where it is too short, a random choice of blocks where it is too long.
    """
    if found[0].weight is None:
        return [list(range(length)) for length in lengths]
    whole = sum(source.weight or 0 for source in found)
    shares = [sum(lengths) * (source.weight or 0) / whole for source in found]
    chosen = []
    for number, (length, share) in enumerate(zip(lengths, shares, strict=True)):
        wanted = max(1, round(share))
        order = list(range(length))
        random.Random(f"{seed}:{number}").shuffle(order)
        chosen.append((order * math.ceil(wanted / length))[:wanted])
    return chosen


def dataset(
    found: list[Source],
    blocks: Callable[[Path], Iterable[dict[str, list[int]]]],
    cache: Path,
    seed: int,
) -> Any:
    """A `datasets.Dataset` of packed blocks, kept on disk below `cache` and mapped into memory."""
    import datasets

    datasets.disable_progress_bars()
    columns = ("input_ids", "labels", "position_ids")
    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in columns})
    parts = []
    for number, source in enumerate(found):
        if next(iter(blocks(source.path)), None) is None:
            raise UserError(f"{source.path}: nothing to train on: no sample fits into the block.")
        try:
            part = datasets.Dataset.from_generator(
                blocks,
                gen_kwargs={"path": source.path},
                features=features,
                cache_dir=str(cache),
                fingerprint=f"source-{number}",
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise
        parts.append(part)
    chosen = mix(found, [len(part) for part in parts], seed)
    mixed = [
        part if len(indices) == len(part) and source.weight is None else part.select(indices)
        for source, part, indices in zip(found, parts, chosen, strict=True)
    ]
    return datasets.concatenate_datasets(mixed).with_format("torch")
