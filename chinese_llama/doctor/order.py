"""In which order adapters merge: which lies on which, and the command that merges them."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chinese_llama.artifacts import identity
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.things import UNREADABLE, Thing
from chinese_llama.merging.adapter import Adapter
from chinese_llama.model.adapters import whole_rows

MODELS = ("model", "meta checkpoint")


@dataclass
class Chain:
    """Adapters that merge one after another, on the base that they fit best (None: none was given), which gives
    `rows` rows; what does not fit."""

    adapters: list[Adapter]
    base: Thing | None = None
    rows: int | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def place(self) -> Path:
        return self.adapters[-1].path


def named_base(adapter: Adapter, models: Sequence[Thing]) -> Thing | None:
    """The model, of those that are given, that adapter_config.json names as the base; None if it names none."""
    name = adapter.config.get("base_model_name_or_path")
    with contextlib.suppress(OSError, ValueError):
        place = Path(name).resolve() if isinstance(name, str) and name else None
        return next((model for model in models if model.path.resolve() == place), None)
    return None


def chains_of(adapters: list[Adapter], models: Sequence[Thing]) -> list[list[Adapter]]:
    """The adapters in lists that merge one after another, each with what it lies on as far as it is given."""
    bases = {id(adapter): named_base(adapter, models) for adapter in adapters}
    below = {id(adapter): _below(adapter, adapters, bases) for adapter in adapters}
    inner = {id(one) for lists in below.values() for one in lists}
    return [[*below[id(adapter)], adapter] for adapter in adapters if id(adapter) not in inner]


def _below(adapter: Adapter, adapters: list[Adapter], bases: dict[int, Thing | None]) -> list[Adapter]:
    """What lies below an adapter, of those that are given: as its manifest or the registry has it; where nothing
    tells, those with fewer rows of vocabulary, then those given before it, that do not name another base."""
    others = [other for other in adapters if other is not adapter]
    if adapter.manifest:
        known = {identity(other.path): other for other in others}
        return [known[sha] for sha in adapter.parents if sha in known]
    if adapter.published:
        names = {other.published.name: other for other in others if other.published}
        return [names[name] for name in adapter.published.after if name in names]
    rows, place = _rows(adapter), [one.path for one in adapters].index(adapter.path)
    found = []
    for number, other in enumerate(adapters):
        told = other.manifest is not None or other.published is not None
        fewer = _rows(other) < rows or (not told and _rows(other) == rows and number < place)
        if other is not adapter and fewer:
            found.append(other)
    found.sort(key=_rows)
    named = (base for one in (adapter, *reversed(found)) if (base := bases[id(one)]))
    own = next(named, None)  # its base, or that of the nearest one below it
    return [one for one in found if bases[id(one)] in (None, own)]


def _rows(adapter: Adapter) -> int:
    with contextlib.suppress(*UNREADABLE):
        return adapter.vocabulary or whole_rows(adapter) or 0
    return 0


def given_order(given: Sequence[Path], chains: list[Chain]) -> Iterator[Finding]:
    """Whether the adapters were given in another order than they merge in; and whether nothing tells the order."""
    for chain in chains:
        silent = [one for one in chain.adapters if one.manifest is None and one.published is None]
        firm = [
            one for one in chain.adapters if one not in silent or _rows(one)
        ]  # the others were put as given
        order = [adapter.path for adapter in firm if adapter.path in given]
        as_given = [path for path in given if path in order]
        if order != as_given:
            lines = [f"given: {', '.join(map(str, as_given))}", f"order: {', '.join(map(str, order))}"]
            lines += [
                f"{one.path}: {_rows(one):,} rows of vocabulary" for one in chain.adapters if _rows(one)
            ]
            what = "The adapters were given in the wrong order: they merge in another one."
            remedy = f"Merge them so: {command(chain)}"
            yield Finding("warning", "order-as-given", str(chain.place), what, lines, remedy)
        if len(chain.adapters) > 1 and silent:
            what = "Nothing tells what these adapters were trained on; the order is a guess, by rows of vocabulary and as given."
            yield Finding(
                "note",
                "order-unknown",
                str(chain.place),
                what,
                [f"{one.path}: {_rows(one) or 'no'} rows of vocabulary" for one in silent],
                "Check it against how they were trained.",
            )


def command(chain: Chain) -> str:
    first = chain.adapters[0]
    base = str(chain.base.path) if chain.base else "BASE"
    recorded = first.manifest.inputs.get("base", {}).get("path", "") if first.manifest else ""
    if chain.base is None and recorded and Path(recorded).exists():
        base = recorded
    missing = []
    last = chain.adapters[-1].published
    if last:
        here = {adapter.published.name for adapter in chain.adapters if adapter.published}
        missing = [name for name in last.after if name not in here]
    loras = ",".join([*missing, *(str(adapter.path) for adapter in chain.adapters)])
    return f"chinese-llama merge --base {shlex.quote(base)} --loras {shlex.quote(loras)} --output merged"
