"""Which adapters, from where, in which order, how weighted: settled before any tensor is read. No torch here.

A plan is a YAML file (see merge/README.md), or what `--loras` and `--weights` say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chinese_llama.config import load_yaml, typed
from chinese_llama.errors import UserError, nearest
from chinese_llama.hub import is_hub_id
from chinese_llama.merging.adapter import Adapter, Step, check_mergeable, load, resolve
from chinese_llama.merging.lineage import check_base, check_lineage
from chinese_llama.resources import shipped
from chinese_llama.workspace import Workspace

__all__ = [
    "Adapter", "Plan", "Step", "check_base", "check_lineage", "check_mergeable", "find_plan", "load", "parse_list", "parse_weights",
    "plan_of", "read_plan", "resolve", "shipped_plans",
]  # fmt: skip

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("hf", "meta")
LINEAR, TIES, DARE_LINEAR, DARE_TIES = METHODS = ("linear", "ties", "dare_linear", "dare_ties")


@dataclass
class Plan:
    """What is merged: steps in order; as far as a plan file says, into which base (a path or a hub id), as
    which dtype and format, and where to."""

    steps: list[Step]
    base: str | None = None
    output: str | None = None
    dtype: str | None = None
    format: str | None = None
    file: Path | None = None

    @property
    def adapters(self) -> list[Adapter]:
        """All adapters in order."""
        return [adapter for step in self.steps for adapter in step.adapters]


@dataclass
class _File:
    """A plan file as it is written."""

    base: str | None = None
    adapters: list[Any] = field(default_factory=list)
    dtype: str | None = None
    output: str | None = None
    format: str | None = None


@dataclass
class _One:
    """An item of `adapters`."""

    adapter: str = ""
    weight: Any = 1.0


@dataclass
class _Several:
    """An item of `adapters` that combines some."""

    combine: str = ""
    adapters: list[Any] = field(default_factory=list)
    density: Any = None
    seed: Any = None


def parse_list(text: str) -> list[str]:
    """The items of `--loras a,b,name=dir`. Raises UserError for an empty or repeated item."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UserError(f"--loras {text!r}: an item is empty; write names or directories with commas.")
    if len(set(items)) < len(items):
        raise UserError(f"--loras {text!r}: an adapter is given twice.")
    return items


def parse_weights(text: str) -> list[float]:
    """The numbers of `--weights 1.0,0.7`. Raises UserError for what is no weight."""
    return [_weight(item.strip(), f"--weights {text!r}") for item in text.split(",")]


def _weight(value: Any, where: str) -> float:
    """A weight: a number other than 0 (less than 0 takes away what an adapter learnt)."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number == 0:
        raise UserError(f"{where}: {value!r} is no weight; give a number other than 0 for each adapter.")
    return number


def plan_of(items: Sequence[str], weights: Sequence[float] | None, workspace: Workspace | None) -> Plan:
    """The plan that `--loras` and `--weights` say: one adapter after another. Raises UserError if there are
    not as many weights as adapters, or an adapter is not found."""
    given = [1.0] * len(items) if weights is None else list(weights)
    if len(given) != len(items):
        raise UserError(
            f"--weights has {len(given)} numbers for {len(items)} adapters ({', '.join(items)}); give one for each."
        )
    for weight in given:
        _weight(weight, "--weights")
    adapters = [resolve(item, workspace) for item in items]
    for adapter, weight in zip(adapters, given, strict=True):
        adapter.weight = weight
    return Plan([Step([adapter]) for adapter in adapters])


def shipped_plans() -> dict[str, Path]:
    """The plans that come with the package, by name."""
    return {file.stem: file for file in sorted((shipped("merge") / "plans").glob("*.yaml"))}


def find_plan(text: str) -> Path:
    """The file that `--plan` means: a file, else the shipped plan of that name. Raises UserError naming those."""
    path = Path(text).expanduser()
    if path.is_file():
        return path
    plans = shipped_plans()
    if text in plans:
        return plans[text]
    raise UserError(
        f"--plan {text}: no such file{nearest(text, plans)}; plans that come along: {', '.join(plans)}."
    )


def read_plan(file: Path, workspace: Workspace | None) -> Plan:
    """The plan in a YAML file; its paths are relative to the file. Raises BadFile and UserError, naming the
    file and the item, for what is no plan; BadFile for an adapter that cannot be merged."""
    written = typed(_File, load_yaml(file), str(file))
    if not written.adapters:
        raise UserError(f"{file}: names no adapters; add `adapters: [NAME, ...]`.")
    root = file.parent
    for name, value, known in (("dtype", written.dtype, DTYPES), ("format", written.format, FORMATS)):
        if value is not None and value not in known:
            raise UserError(f"{file}: {name} {value!r}{nearest(value, known)}; one of {', '.join(known)}.")
    reader = _Reader(root, workspace)
    steps = [
        reader.step(item, f"{file}: adapters, item {number}")
        for number, item in enumerate(written.adapters, start=1)
    ]
    output = str(root / Path(written.output).expanduser()) if written.output else None
    return Plan(steps, _base(written.base, root), output, written.dtype, written.format, file)


def _base(text: str | None, root: Path) -> str | None:
    """A base as a whole path, or a hub id as it is."""
    if text is None:
        return None
    path = root / Path(text).expanduser()
    return text if is_hub_id(text) and not path.parent.exists() else str(path)


@dataclass
class _Reader:
    """Reads items of a plan's `adapters`: each a name, or a mapping."""

    root: Path
    workspace: Workspace | None

    def step(self, item: Any, where: str) -> Step:
        if isinstance(item, dict) and ("combine" in item or "adapters" in item):
            return self._combined(item, where)
        return Step([self._one(item, where)])

    def _one(self, item: Any, where: str) -> Adapter:
        if isinstance(item, dict) and "combine" in item:
            raise UserError(f"{where}: a step that combines adapters holds adapters, not steps.")
        if not isinstance(item, (str, dict)):
            raise UserError(f"{where}: {item!r} is no adapter; write a name, a directory, or name=directory.")
        one = typed(_One, {"adapter": item} if isinstance(item, str) else item, where)
        if not one.adapter.strip():
            raise UserError(f"{where}: names no adapter (adapter: NAME).")
        weight = _weight(one.weight, f"{where}, weight")
        adapter = resolve(one.adapter.strip(), self.workspace, self.root)
        adapter.weight = weight
        return adapter

    def _combined(self, item: dict[str, Any], where: str) -> Step:
        step = typed(_Several, item, where)
        if step.combine not in METHODS:
            raise UserError(
                f"{where}: combine {step.combine!r}{nearest(step.combine, METHODS)}; one of {', '.join(METHODS)}."
            )
        if len(step.adapters) < 2:
            raise UserError(
                f"{where}: {step.combine} combines two adapters or more (adapters: [NAME, NAME])."
            )
        density, seed = _density(step, where), _seed(step, where)
        adapters = [
            self._one(one, f"{where}, adapter {number}") for number, one in enumerate(step.adapters, start=1)
        ]
        return Step(adapters, step.combine, density, seed)


def _density(step: _Several, where: str) -> float:
    """The share of each delta that is kept: needed by all methods but linear, which keeps everything."""
    if step.combine == LINEAR:
        if step.density is not None:
            raise UserError(f"{where}: density is for {', '.join(METHODS[1:])}; linear keeps everything.")
        return 1.0
    number = isinstance(step.density, (int, float)) and not isinstance(step.density, bool)
    if not number or not 0 < step.density <= 1:
        told = "" if step.density is None else f" {step.density!r}"
        raise UserError(
            f"{where}: density{told}: {step.combine} needs the share of each delta that is kept, above 0 and at "
            "most 1 (for example 0.5)."
        )
    return float(step.density)


def _seed(step: _Several, where: str) -> int:
    if step.seed is None:
        return 0
    if step.combine not in (DARE_LINEAR, DARE_TIES):
        raise UserError(f"{where}: seed is for {DARE_LINEAR} and {DARE_TIES}; {step.combine} draws nothing.")
    if not isinstance(step.seed, int) or isinstance(step.seed, bool) or step.seed < 0:
        raise UserError(f"{where}: seed {step.seed!r}: a whole number from 0 on.")
    return step.seed
