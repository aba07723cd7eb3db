"""What all benchmarks share: how a command is measured, and where its table goes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "out"  # what benchmarks make, unless told otherwise; git ignores it
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PACKAGES = ("torch", "transformers", "peft", "tokenizers")
COSTS = ("", "seconds", "times cp and flush", "peak MiB")
COPY = ["sh", "-c", "cp -r base out && sync -f out"]  # flushed to the disk, as all that the tool writes is
SAMPLED = 0.1  # seconds between two looks at the memory of a command's processes

# A command is started by a small process: what it counts as its peak begins at the size of who started it.
STARTER = """\
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss / 1024]))
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""

T = TypeVar("T")


class Measured(NamedTuple):
    """What a command took: wall seconds; the peak of its resident memory in MiB (of its largest process, or of
    all together where that is more); what it wrote to stdout."""

    seconds: float
    peak_mib: float
    output: str


def options_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the module's text as its help, and --results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the file that the table is appended to"
    )
    return parser


def measured(
    command: Sequence[str | Path], work: Path = ROOT, environment: Mapping[str, str] | None = None
) -> Measured:
    """Run a command in the directory `work` and measure it; `environment` is added to this one's.

    What it writes to stderr is seen. Raises SystemExit where it fails.
    """
    words = [str(word) for word in command]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, *words],
        cwd=work,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    together = 0.0
    while True:
        try:
            output, _ = process.communicate(timeout=SAMPLED)
            break
        except subprocess.TimeoutExpired:
            together = max(together, _memory_below(process.pid))
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed.")
    *before, last = output.splitlines()
    seconds, largest = json.loads(last)
    return Measured(seconds, max(largest, together), "\n".join(before))


def _memory_below(pid: int) -> float:
    """MiB of the processes that `pid` has started, pages that several share counted once; 0 where there are
    less than two, for the kernel knows the peak of one."""
    import psutil

    try:
        below = psutil.Process(pid).children(recursive=True)
        return sum(one.memory_full_info().pss for one in below) / 2**20 if len(below) > 1 else 0.0
    except (psutil.Error, AttributeError, OSError):  # it has just ended; or a system without PSS
        return 0.0


def in_turns(ways: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each way gives, once in every round: a machine whose speed wanders is as slow for all of them."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for number in range(1, rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name].append(way())
            print(f"{number}. {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return found


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """The median over the rounds of `mine` / `other`: each round's two were measured side by side."""
    return statistics.median(one / two for one, two in zip(mine, other, strict=True))


def costs(found: Mapping[str, Sequence[Measured]], unit: str) -> list[list[str]]:
    """Rows of a table: each way's median seconds, how many times those of `unit`, and its peak memory (under `COSTS`)."""
    seconds = {name: [run.seconds for run in runs] for name, runs in found.items()}
    return [
        [
            name,
            f"{statistics.median(seconds[name]):.1f}",
            f"{ratio(seconds[name], seconds[unit]):.1f}",
            f"{max(run.peak_mib for run in runs):,.0f}",
        ]
        for name, runs in found.items()
    ]


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def machine() -> str:
    """The GPU where there is one, the processor, memory, Python and the packages' versions, and the date."""
    parts = [*_gpu(), f"{_processor()} ({_threads()} hardware threads)", f"{_memory_gib():.0f} GiB"]
    parts += [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([time.strftime("%Y-%m-%d", time.gmtime()), *parts])


def _gpu() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return [f"{torch.cuda.get_device_name(0)} ({memory:.0f} GiB, CUDA {torch.version.cuda})"]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def command_line() -> str:
    """What was typed, without --results; of a path that begins at the root (or NAME=path) only its last part."""
    words = sys.argv[1:]
    if "--results" in words:
        at = words.index("--results")
        del words[at : at + 2]
    return " ".join(["python -m benchmarks", *(re.sub(r"(^|=)/.*/", r"\1", word) for word in words)])


def record(name: str, table_markdown: str, notes: str, results: Path) -> None:
    """Print a table, and append it to the section of the benchmark `name` in `results`, which is made where it is
    not there: the machine, the command, the `notes` (may be empty) and the table."""
    entry = f"{machine()}; `{command_line()}`."
    entry = "\n\n".join(part for part in (entry, notes.strip(), table_markdown.strip()) if part)
    print(f"\n{entry}\n", flush=True)
    text = results.read_text(encoding="utf-8") if results.is_file() else "# Results\n"
    sections = text.rstrip().split("\n## ")
    of = f"`python -m benchmarks {name}"
    for number, section in enumerate(sections):
        head = section.partition("\n")[0]
        if f"{of}`" in head or f"{of} " in head:
            sections[number] = f"{section.rstrip()}\n\n{entry}\n"
            break
    else:
        sections[-1] = sections[-1].rstrip() + "\n"
        sections.append(f"{name}: {of}`\n\n{entry}\n")
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text("\n## ".join(sections).rstrip() + "\n", encoding="utf-8")
