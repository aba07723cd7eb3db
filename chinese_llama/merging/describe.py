"""A plan as `merge --dry-run` prints it: what goes in, what each step changes, what comes out, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chinese_llama.merging.adapter import Adapter, Step
from chinese_llama.merging.plan import Plan

INDENT = " " * 10


@dataclass
class Contents:
    """What an adapter holds: LoRA pairs, whole matrices (those with rows of vocabulary have `vocabulary` rows), and
    single rows."""

    pairs: int = 0
    matrices: int = 0
    rows: int = 0
    vocabulary: int | None = None


@dataclass
class Cost:
    """What a merge reads, writes and needs. Rows are those of the vocabulary; `seconds` and `memory` (bytes) are
    estimates."""

    tensors: int
    changed: int
    parameters: int
    rows_before: int
    rows: int
    dtype_before: str
    dtype: str
    bytes_read: int
    bytes_written: int
    flops: float
    memory: int
    seconds: float


def describe(
    plan: Plan,
    base: Path,
    output: Path | None,
    cost: Cost,
    contents: Sequence[Contents],
    warnings: Sequence[str] = (),
) -> str:
    """The plan as aligned lines. `contents` are those of `plan.adapters`, in order; `warnings` what `--force`
    overrules."""
    held = iter(contents)
    lines = _line(
        "base", f"{base}  {_model(cost.dtype_before, cost.rows_before)}, {cost.parameters:,} numbers"
    )
    for number, step in enumerate(plan.steps, start=1):
        lines += _step(number, step, [next(held) for _ in step.adapters])
    kind = f"{plan.format or 'hf'} format, {_model(cost.dtype, cost.rows)}"
    lines += _line("result", f"{output or '(no output given)'}  {kind}")
    lines += _line("changes", f"{cost.changed:,} of {cost.tensors:,} tensors; {_rows(cost)}")
    lines += _line("cost", _cost(cost))
    for warning in warnings:
        lines += _line("forced", warning)
    return "\n".join(lines)


def _line(head: str, text: str) -> list[str]:
    return [f"{head:<10}{text}"]


def _step(number: int, step: Step, held: list[Contents]) -> list[str]:
    if len(step.adapters) == 1:
        return _adapter(f"{number}", step.adapters[0], held[0])
    lines = _line(f"{number}", f"combined by {_method(step)}:")
    for part, (adapter, one) in enumerate(zip(step.adapters, held, strict=True), start=1):
        lines += _adapter(f"{number}.{part}", adapter, one)
    return lines


def _method(step: Step) -> str:
    """The method of a step that combines, and its settings."""
    words = [step.method]
    if step.method != "linear":
        words.append(f"density {step.density:g}")
    if step.method.startswith("dare"):
        words.append(f"seed {step.seed}")
    return ", ".join(words)


def _adapter(head: str, adapter: Adapter, held: Contents) -> list[str]:
    published = adapter.published.name if adapter.published else None
    known = f"  (published: {published})" if published and published != adapter.name else ""
    config = adapter.config
    kinds = [word for key, word in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
    kind = " and ".join(kinds) or "LoRA"
    what = f"{kind}, r {config.get('r')}, alpha {config.get('lora_alpha')}, weight {adapter.weight:g}: {_held(held)}"
    return [*_line(head, f"{adapter.name}  {adapter.path}{known}"), INDENT + what]


def _held(held: Contents) -> str:
    """What an adapter changes, in words.

    >>> _held(Contents(pairs=224, matrices=2, vocabulary=49953))
    '224 LoRA pairs, 2 whole matrices (vocabulary of 49,953 rows)'
    """
    vocabulary = f" (vocabulary of {held.vocabulary:,} rows)" if held.matrices and held.vocabulary else ""
    parts = [
        _count(held.pairs, "LoRA pair"),
        _count(held.matrices, "whole matrix", "whole matrices") + vocabulary if held.matrices else "",
        _count(held.rows, "single row"),
    ]
    return ", ".join(part for part in parts if part) or "nothing"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}" if number else ""


def _model(dtype: str, rows: int) -> str:
    return f"{dtype}, {rows:,} rows"


def _rows(cost: Cost) -> str:
    if cost.rows == cost.rows_before:
        return f"the vocabulary keeps its {cost.rows:,} rows"
    return f"the vocabulary grows from {cost.rows_before:,} to {cost.rows:,} rows"


def _cost(cost: Cost) -> str:
    return (
        f"{size(cost.bytes_read)} read, {size(cost.bytes_written)} written, {_operations(cost.flops)}; about "
        f"{size(cost.memory)} of memory and {_time(cost.seconds)}"
    )


def size(count: float) -> str:
    """Bytes in words.

    >>> size(13_476_838_400), size(512)
    ('13.5 GB', '512 bytes')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def _operations(flops: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= scale:
            return f"{flops / scale:.1f} {unit}FLOP"
    return f"{flops:,.0f} FLOP"


def _time(seconds: float) -> str:
    """Seconds in words.

    >>> _time(0.4), _time(64), _time(200)
    ('a second', '64 seconds', '3.3 minutes')
    """
    if seconds < 1.5:
        return "a second"
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"
