"""Progress bars on stderr, for work that takes longer than two seconds, where a person looks on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 2.0  # seconds


def track(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "it", scale: bool = False
) -> Generator[T, None, None]:
    """Yield `items`, showing a bar named `what` on a terminal once it has taken `PATIENCE` seconds."""
    from tqdm import tqdm

    bar = tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        unit_scale=scale,
        delay=PATIENCE,
        leave=False,
        disable=None,
        file=sys.stderr,
    )
    with bar:
        for item in items:
            yield item
            bar.update()


def say(line: str) -> None:
    """One line of what is going on, to stderr (results go to stdout); from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.start
