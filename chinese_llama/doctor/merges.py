"""A model given beside a base and adapters: is it that merge? And did it keep what config.json must say?

Without a manifest the numbers tell: some rows of some weights, against those that base and adapters make.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chinese_llama.artifacts import Manifest, identity
from chinese_llama.convert.meta import open_model
from chinese_llama.doctor.config import rotary_base
from chinese_llama.doctor.finding import Finding, Severity, some
from chinese_llama.doctor.things import UNREADABLE, Thing, manifest_of
from chinese_llama.merging.adapter import Adapter, Step
from chinese_llama.merging.fit import check_fit
from chinese_llama.merging.merged import Loaded, Merged
from chinese_llama.merging.stream import load_steps
from chinese_llama.model.shards import EMBED, HEAD, Model

ROWS = 8  # of a weight that are compared, in as many places
WEIGHTS = 8  # that are compared
NEAR = 0.05  # of what the adapters change: what is as near as that is the merge, whoever rounded it
# what transformers takes where config.json does not say
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
}


@dataclass
class Compared:
    """Rows of a weight: as they are in a model, as base and adapters make them, as the base has them."""

    name: str
    found: torch.Tensor
    wanted: torch.Tensor
    below: torch.Tensor
    eps: float

    def factor(self) -> float | None:
        """How many times the change of the adapters was added: 1 as it should be, 0 nothing; None where it is not
        that change that was added, or it is lost in rounding."""
        delta, moved = self.wanted - self.below, self.found - self.below
        size = float(delta.norm())
        noise = self.eps * float(self.wanted.norm())
        if size <= 4 * noise:
            return None
        times = float((moved * delta).sum()) / size**2
        off = float((moved - times * delta).norm())
        return times if off <= NEAR * size * max(1.0, abs(times)) + 2 * noise else None

    def near(self) -> bool:
        """Whether it is the merge, up to rounding."""
        noise = 2 * self.eps * float(self.wanted.norm())
        return float((self.found - self.wanted).norm()) <= noise + NEAR * float(
            (self.wanted - self.below).norm()
        )


def check_merged(other: Thing, base: Thing, adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """What `other` is to a base and adapters that fit it: their merge, or what is wrong with it."""
    manifest = manifest_of(other.path)
    if manifest and manifest.command != "merge":
        return
    try:
        source, found = open_model(base.path), open_model(other.path)
        loaded = load_steps([Step([adapter]) for adapter in adapters])
        rows = check_fit(source, base.path, loaded, [])
        digest = identity(base.path) if manifest else ""
    except UNREADABLE:
        return  # told of each, or of the chain
    if found.meta(EMBED)[0][0] < source.meta(EMBED)[0][0]:
        return  # what the base was extended from
    if manifest:
        same = yield from _recorded(other, base, adapters, manifest, digest)
        if not same:
            return
    if not manifest and not alike(source, found):
        what = f"{other.path} has nothing in common with {base.path}: it is not made of it."
        yield Finding("note", "models-unrelated", str(other.path), what, [], "")
        return
    sample = list(_sample(source, found, loaded, rows))
    yield from _verdict(other, base, adapters, sample, (source, found, loaded), rows)
    yield from _same_config(base, other, source.config(), found.config())


def check_related(one: Thing, other: Thing) -> Iterator[Finding]:
    """Two models without adapters: fields of config.json that one lost, where they are of one family."""
    try:
        source, found = open_model(one.path), open_model(other.path)
        related = alike(source, found)
    except UNREADABLE:
        return
    if related:
        mine, theirs = source.config(), found.config()
        if len(_silent(mine)) > len(_silent(theirs)):  # what says less was made of what says more
            one, other, mine, theirs = other, one, theirs, mine
        yield from _same_config(one, other, mine, theirs)


def _silent(config: dict[str, Any]) -> list[str]:
    """The fields that config.json does not say, of those that the weights depend on."""
    return [name for name in (*DEFAULTS, "num_key_value_heads", "rope") if _why(name, config)]


def _recorded(
    other: Thing, base: Thing, adapters: Sequence[Adapter], manifest: Manifest, digest: str
) -> Generator[Finding, None, bool]:
    """What the manifest of a merge says that it was made of; returns whether that is the base, with the sha256 `digest`,
    and the adapters."""
    inputs, where = manifest.inputs, str(other.path)
    then = [inputs[f"adapter:{i}"] for i in range(len(inputs)) if f"adapter:{i}" in inputs]
    merged, given = [record["sha256"] for record in then], [identity(adapter.path) for adapter in adapters]
    if not set(merged) & set(given):
        return False  # of other adapters
    if inputs.get("base", {}).get("sha256") != digest:
        what = f"{other.path} was merged into another base than {base.path}."
        lines = [f"base then: {inputs.get('base', {}).get('path')}"]
        remedy = "Merge again, into the base that you mean."
        yield Finding("warning", "merge-of-another-base", where, what, lines, remedy)
        return False
    if merged != given:
        reordered = sorted(merged) == sorted(given)
        what = f"{other.path} was merged from {'these adapters in another order' if reordered else 'other adapters'} than given here."
        lines = [
            f"merged: {' + '.join(record['path'] for record in then)}",
            f"given: {' + '.join(a.name for a in adapters)}",
        ]
        severity: Severity = "warning" if reordered else "note"
        yield Finding(
            severity,
            "merge-of-other-adapters",
            where,
            what,
            lines,
            "Merge again, in the order that is told here.",
        )
    return merged == given


def alike(source: Model, found: Model) -> bool:
    """Whether two models come from one: the first old rows are the same, or most of a weight that few trainings move
    far is."""
    if EMBED in found and torch.equal(source.rows(EMBED, 0, ROWS), found.rows(EMBED, 0, ROWS)):
        return True
    near, names = [], [name for name in source if name.endswith(("_proj.weight", EMBED))]
    for name in names[:: max(1, len(names) // WEIGHTS)]:
        if name not in found or found.meta(name)[0][1:] != source.meta(name)[0][1:]:
            return False
        mine, theirs = source.rows(name, 0, ROWS).float(), found.rows(name, 0, ROWS).float()
        near.append(float((mine - theirs).norm()) <= 0.7 * float(mine.norm()))
    return sum(near) > len(near) / 2


def _sample(source: Model, found: Model, loaded: Sequence[Loaded], rows: int) -> Iterator[Compared]:
    """Rows of weights that the adapters change; a weight that `found` lacks, or has in another shape, is left out."""
    merged = Merged(source, loaded)
    names = [name for name in merged.changes(rows) if len(source.meta(name)[0]) == 2]
    few = [name for name in names if name in (EMBED, HEAD)] + names[:: max(1, len(names) // WEIGHTS)]
    for name in dict.fromkeys(few):
        shape = (rows, *source.meta(name)[0][1:]) if name in (EMBED, HEAD) else source.meta(name)[0]
        if name not in found or found.meta(name)[0] != shape:
            continue
        starts = range(0, shape[0], max(ROWS, shape[0] // ROWS))
        for start in starts:
            stop = min(
                start + ROWS,
                shape[0],
                source.meta(name)[0][0] if start < source.meta(name)[0][0] else shape[0],
            )
            wanted = merged.exact(name, shape, start, stop)
            have = source.meta(name)[0][0]
            below = source.rows(name, start, stop).float() if stop <= have else torch.zeros_like(wanted)
            eps = max(torch.finfo(d).eps for d in (found.meta(name)[1], source.meta(name)[1]))
            yield Compared(name, found.rows(name, start, stop).float(), wanted, below, eps)


def _verdict(
    other: Thing,
    base: Thing,
    adapters: Sequence[Adapter],
    sample: list[Compared],
    models: tuple[Model, Model, Sequence[Loaded]],
    merged: int,
) -> Iterator[Finding]:
    source, found, loaded = models
    names = " + ".join(adapter.name for adapter in adapters)
    remedy = f"Merge again: chinese-llama merge --base {base.path} --loras {','.join(a.name for a in adapters)} --output merged"
    where, factors = str(other.path), {one.name: one.factor() for one in sample if one.factor() is not None}
    rows = found.meta(EMBED)[0][0]
    whole = all(
        found.meta(name)[0][0] == merged for name in (EMBED, HEAD) if name in source and name in found
    )
    if sample and whole and all(one.near() for one in sample):
        what = f"It is the merge of {base.path} + {names}, as far as {len(sample)} samples of rows tell."
        yield Finding("note", "is-the-merge", where, what)
        return
    silent = any(adapter.manifest is None and adapter.published is None for adapter in adapters)
    chosen = [list(range(count)) for count in range(len(adapters) - 1, 0, -1)]
    for inside in [*chosen, *([number] for number in range(1, len(adapters)))]:
        part = list(_sample(source, found, [loaded[i] for i in inside], max(rows, source.meta(EMBED)[0][0])))
        if part and all(one.near() for one in part if one.name not in (EMBED, HEAD)):
            outside = [adapter.name for i, adapter in enumerate(adapters) if i not in inside]
            what = f"It holds {' + '.join(adapters[i].name for i in inside)} and not {' + '.join(outside)}."
            lines = some(list(dict.fromkeys(one.name for one in part)))
            severity: Severity = "note" if silent else "warning"  # nothing says that they go together
            yield Finding(severity, "merge-lacks-adapters", where, what, lines, remedy)
            return
    times = [factor for factor in factors.values() if factor is not None]
    lines = [
        f"{name}: {factor:.3g} times the change" for name, factor in factors.items() if factor is not None
    ]
    if times and all(abs(factor) < NEAR for factor in times):
        what = f"Nothing of {names} is in it: its weights are those of {base.path}."
        # the base, extended; or a copy of it that happens to lie in the same directory
        aside = rows > source.meta(EMBED)[0][0] or "found_in" in other.facts
        yield Finding("note" if aside else "error", "nothing-merged", where, what, some(lines), remedy)
    elif times and max(times) - min(times) < 2 * NEAR * abs(max(times)) and abs(times[0] - 1) > NEAR:
        what = f"The adapters were added {times[0]:.3g} times instead of once: alpha / r was left out, or they were merged twice."
        yield Finding("error", "merge-scaled", where, what, some(lines), remedy)
    else:
        off = [
            f"{one.name}: off by {_off(one):.2g} of what the adapters change"
            for one in sample
            if not one.near()
        ]
        off += [] if whole else [f"{rows:,} rows of vocabulary; the merge has others"]
        what = f"It is made of {base.path}, but not what base + {names} give."
        yield Finding("warning", "merge-differs", where, what, some(list(dict.fromkeys(off))), remedy)


def _off(one: Compared) -> float:
    return float((one.found - one.wanted).norm() / (one.wanted - one.below).norm().clamp_min(1e-30))


def _same_config(one: Thing, other: Thing, mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Finding]:
    """Fields that must survive a merge or a conversion."""
    left, right = _effective(mine), _effective(theirs)
    if "meta checkpoint" in (one.kind, other.kind):  # which does not say it
        left.pop("max_position_embeddings"), right.pop("max_position_embeddings")
    wrong = [name for name in left if left[name] != right.get(name)]
    if wrong:
        lines = [
            f"{name}: {left[name]} in {one.path}, {right.get(name)} in {other.path}{_why(name, theirs)}"
            for name in wrong
        ]
        what = f"config.json does not agree with the model that it comes from: {', '.join(wrong)}."
        remedy = f"Write into {other.path}/config.json what {one.path}/config.json says of them, if the one was made of the other."
        longer = wrong == ["max_position_embeddings"] and not _why(wrong[0], theirs)  # it only bounds a cache
        severity: Severity = "warning" if longer else "error"
        yield Finding(severity, "config-fields-lost", f"{other.path}/config.json", what, some(lines), remedy)


def _effective(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of config.json, of the fields that the weights depend on."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "type", "rope_type")}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found = {
        name: config.get(name) if config.get(name) is not None else value for name, value in DEFAULTS.items()
    }
    return found | {
        "rope_theta": rotary_base(config) or 10_000.0,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling},
        "num_attention_heads": config.get("num_attention_heads"),
        "num_key_value_heads": config.get("num_key_value_heads") or config.get("num_attention_heads"),
    }


def _why(name: str, config: dict[str, Any]) -> str:
    fields = ("rope_parameters", "rope_theta", "rope_scaling") if name.startswith("rope") else (name,)
    return "" if any(config.get(one) is not None for one in fields) else " (not said; the default)"
