"""The log of a run, line by line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

LOG = "log.jsonl"  # where a run works, and with its adapter


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log written by `JsonLog`; [] where there is none."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a kill may cut the last line
            entries.append(json.loads(line))
    return entries
