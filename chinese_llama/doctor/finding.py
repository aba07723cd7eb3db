"""One thing that the doctor found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Severity = Literal["error", "warning", "note"]
LINES = 5  # of evidence


@dataclass(frozen=True)
class Finding:
    """`severity`: "error" (it fails, or gives wrong results), "warning" (likely trouble or loss), "note" (worth
    knowing); `check`: its name, as-in-this; `where`: a path, a tensor, a line; `what`: one sentence; `evidence`:
    what shows it, a line each; `remedy`: what to type or do."""

    severity: Severity
    check: str
    where: str
    what: str
    evidence: list[str] = field(default_factory=list)
    remedy: str = ""


def some(items: Sequence[str]) -> list[str]:
    """The first few items, and how many more there are: lines of evidence."""
    more = len(items) - LINES
    return [*items[:LINES], f"... and {more:,} more"] if more > 0 else list(items)


def listing(place: Path) -> list[str]:
    """What lies in a directory, or how large a file is: lines of evidence."""
    try:
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        lines = [f"{file.name}: {_is(file)}" for file in files]
    except OSError as error:
        return [str(error)]
    return some(lines) or ["it holds no files"]


def _is(file: Path) -> str:
    if file.is_file():
        return f"{file.stat().st_size:,} bytes"
    if file.is_symlink() and not file.exists():
        return f"a link to {file.readlink()}, which is not there"
    return "a directory" if file.is_dir() else "no plain file"


def guarded(place: Path, findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings of checks on what lies in `place`. What the checks stumble over is a finding, too: content that
    nobody foresaw is no reason to end without a word about the rest."""
    try:
        yield from findings
    except OSError as error:
        where, what = str(error.filename or place), f"It cannot be read ({error.strerror or error})."
        remedy = "Give yourself the right to read it, or copy it again."
        yield Finding("error", "file-not-readable", where, what, [str(error)], remedy)
    except Exception as error:
        what = "It holds something that it should not, and cannot be examined to the end."
        remedy = "Get it again from where it comes from, or make it again."
        yield Finding(
            "error", "not-examined", str(place), what, [f"{type(error).__name__}: {error}"[:300]], remedy
        )
