"""Hub ids: the only place that uses the network, and only when one is given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chinese_llama.errors import UserError

FILES = (
    ".txt",
    ".jsonl",
    ".json",
    ".parquet",
    ".gz",
    ".zst",
    ".model",
    ".yaml",
    ".jinja",
)  # no repository's name
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_hub_id(place: str | Path) -> bool:
    """True for "organisation/name", unless that names a file, or a directory "organisation" is here: then it is
    a path."""
    named = HUB_ID.fullmatch(str(place)) is not None and not str(place).endswith(FILES)
    return named and not Path(place).parent.exists()


def local(place: str | Path) -> Path:
    """`place` as a directory: itself, or the snapshot of a hub id, downloaded if need be.

    Raises UserError where the hub does not have it or cannot be reached.
    """
    return _snapshot(str(place)) if is_hub_id(place) else Path(place)


def dataset(name: str, patterns: Sequence[str]) -> Path:
    """The snapshot of the dataset with the hub id `name`: its files that match one of the `patterns`,
    downloaded if need be.

    Raises UserError where the hub does not have it or cannot be reached.
    """
    wider = [pattern.replace("**/", "*") for pattern in patterns]  # the hub's * matches / too
    return _snapshot(name, repo_type="dataset", allow_patterns=wider)


def _snapshot(name: str, **what: Any) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, **what))
    except Exception as error:  # network and hub errors have no common base
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = what.get("repo_type", "directory")
        raise UserError(f"{name} is no {kind} here, and the hub does not give it ({told}).") from error
