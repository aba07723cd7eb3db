"""Whether a base and a list of adapters belong together, told without a tensor: by the manifests, by what is
published, by configurations and tokenizers. No torch here.

What is found is either final (the result would mean nothing), or something that `--force` may overrule: then the
sum is still what it says, if not what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chinese_llama.artifacts import identity, read_manifest
from chinese_llama.errors import DoesNotFit
from chinese_llama.merging.adapter import Adapter, Step, read_object, recognise
from chinese_llama.merging.registry import Base, Published, registry
from chinese_llama.vocab.readers import open_readers

FORCE = "--force merges it all the same."


@dataclass
class Finding:
    """Something that does not belong together, as a sentence without its full stop."""

    text: str
    final: bool = False


@dataclass
class Place:
    """An adapter in its place: the adapters below its step, in order, and the others of its step."""

    adapter: Adapter
    below: list[Adapter]
    siblings: list[Adapter]


@dataclass
class History:
    """A way to see a base: an older one (`sha256`; "" is the base itself) with adapters merged into it in
    order: their identities, and their names then."""

    sha256: str = ""
    adapters: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def check_lineage(base: Path, adapters: Sequence[Adapter | Step], forced: bool = False) -> list[str]:
    """Raise DoesNotFit if the adapters, or the steps of a plan, do not belong on `base` in this order.

    With `forced`, what may be overruled is returned instead, as sentences. Fills in `published` of adapters
    whose file is a published one.
    """
    places = _places([item if isinstance(item, Step) else Step([item]) for item in adapters])
    for place in places:
        recognise(place.adapter)
    findings = [
        *_repeated(base, places),
        *_vocabularies(places),
        *_tokenizers(places),
        *_published_bases(base, places),
        *(
            finding
            for place in places
            for finding in [*_published(base, place), *_trained(base, place, places)]
        ),
    ]
    for finding in findings:
        if finding.final:
            raise DoesNotFit(f"{finding.text}.")
    if findings and not forced:
        raise DoesNotFit(f"{findings[0].text}; {FORCE}")
    return [f"{finding.text}." for finding in findings]


def check_base(base: Path) -> None:
    """Raise DoesNotFit for a quantised base: adapters are merged into plain weights."""
    quantised = _config(base).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise DoesNotFit(
            f"{base} is quantised ({method or 'quantization_config'} in its config.json), and adapters are merged "
            "into plain weights: give the model that it was quantised from, and quantise the result."
        )


def _places(steps: Sequence[Step]) -> list[Place]:
    below: list[Adapter] = []
    places = []
    for step in steps:
        for adapter in step.adapters:
            places.append(Place(adapter, list(below), [a for a in step.adapters if a is not adapter]))
        below += step.adapters
    return places


def _repeated(base: Path, places: list[Place]) -> Iterator[Finding]:
    """An adapter that is given twice, or that the base has in it already."""
    seen: dict[str, str] = {}
    inside = {sha: name for h in _histories(base) for sha, name in zip(h.adapters, h.names, strict=True)}
    for adapter in (place.adapter for place in places):
        digest = identity(adapter.path)
        if digest in seen:
            yield Finding(f"The adapters {seen[digest]!r} and {adapter.name!r} are the same one", final=True)
        if digest in inside:
            yield Finding(
                f"The adapter {adapter.name!r} is merged into {base} already (as {inside[digest]!r})",
                final=True,
            )
        seen[digest] = adapter.name


def _vocabularies(places: list[Place]) -> Iterator[Finding]:
    """Vocabularies that shrink along the list, or differ in a step."""
    for place in places:
        adapter, rows = place.adapter, place.adapter.vocabulary
        if rows is None:
            continue
        larger = [a for a in place.below if a.vocabulary is not None and a.vocabulary > rows]
        if larger:
            order = [*larger[0].published.after, larger[0].name] if larger[0].published else []
            order = order or [adapter.name, larger[0].name]
            yield Finding(
                f"The adapter {adapter.name!r} has {rows:,} rows of vocabulary, {larger[0].name!r} below it "
                f"{larger[0].vocabulary:,}, and a vocabulary never shrinks: --loras {','.join(order)}",
                final=True,
            )
        for other in place.siblings:
            if other.vocabulary is not None and other.vocabulary > rows:
                yield Finding(
                    f"{adapter.name!r} has {rows:,} rows of vocabulary and {other.name!r} {other.vocabulary:,}: "
                    "adapters of two vocabularies cannot be combined in one step",
                    final=True,
                )


def _tokenizers(places: list[Place]) -> Iterator[Finding]:
    """Tokenizers that lie beside published adapters and are not theirs."""
    for adapter in (place.adapter for place in places):
        if adapter.published is None or adapter.tokenizer is None:
            continue
        wanted = adapter.published.tokenizer
        file = adapter.tokenizer / "tokenizer.model"
        same = file.is_file() and identity(file) == wanted.sha256
        pieces = wanted.pieces if same else len(open_readers(adapter.tokenizer)[0].pieces)
        if pieces != wanted.pieces:
            yield Finding(
                f"{adapter.name!r} is an adapter of {wanted.pieces:,} pieces, and the tokenizer in {adapter.path} "
                f"has {pieces:,}: put the tokenizer of {wanted.name} there, of {wanted.pieces:,} pieces",
                final=True,
            )
        elif file.is_file() and not same:
            yield Finding(f"{file} is not the published tokenizer of {wanted.name} (another sha256)")


def _published_bases(base: Path, places: list[Place]) -> Iterator[Finding]:
    """What can be told of the base without a manifest: its size, its files, its vocabulary."""
    first: dict[str, Published] = {}
    for adapter in (place.adapter for place in places):
        if adapter.published:
            first.setdefault(adapter.published.base.name, adapter.published)
    for entry in first.values():
        yield from _size(base, entry)
        yield from _files(base, entry.base)
    lowest = next((place.adapter for place in places if place.adapter.published), None)
    rows = _config(base).get("vocab_size")
    if lowest and lowest.published and isinstance(rows, int) and rows > lowest.published.tokenizer.pieces:
        yield Finding(
            f"{base} has {rows:,} rows of vocabulary, the adapter {lowest.name!r} {lowest.published.tokenizer.pieces:,}, "
            f"and a vocabulary never shrinks: give {lowest.published.base.name} itself as the base",
            final=True,
        )


def _size(base: Path, entry: Published) -> Iterator[Finding]:
    config, wanted = _config(base), entry.base
    hidden = config.get("hidden_size", config.get("dim"))
    layers = config.get("num_hidden_layers", config.get("n_layers"))
    if None not in (hidden, layers) and (hidden, layers) != (wanted.hidden_size, wanted.layers):
        yield Finding(
            f"{entry.name} is for {wanted.name} (hidden size {wanted.hidden_size}, {wanted.layers} layers); {base} "
            f"has {hidden} and {layers}",
            final=True,
        )
        return
    epsilon = config.get("rms_norm_eps", config.get("norm_eps"))
    if epsilon is not None and epsilon != wanted.norm_eps:
        yield Finding(
            f"{entry.name} is for {wanted.name}, and {base} is another model of that size (rms_norm_eps {epsilon} instead "
            f"of {wanted.norm_eps}: Llama 2?)"
        )


def _files(base: Path, wanted: Base) -> Iterator[Finding]:
    """Weight files that are as many as the published ones, and other ones."""
    meta, converted = "consolidated.*.pth", "pytorch_model*.bin"
    for pattern, published in ((meta, wanted.meta), (converted, wanted.huggingface)):
        files = sorted(base.glob(pattern)) if base.is_dir() else []
        if len(files) != len(published) or any(base.glob("*.safetensors")):
            continue  # others than those
        wrong = [file.name for file, sha in zip(files, published, strict=True) if identity(file) != sha]
        if wrong:
            yield Finding(
                f"{base} is not {wanted.name} as it is published: {', '.join(wrong)} "
                f"{'has' if len(wrong) == 1 else 'have'} another sha256 (damaged, or another model)"
            )


def _published(base: Path, place: Place) -> Iterator[Finding]:
    """A published adapter that is damaged, or not where it belongs."""
    adapter, entry = place.adapter, place.adapter.published
    if entry is None:
        return
    if adapter.file.suffix == ".bin" and identity(adapter.file) != entry.sha256:
        yield Finding(
            f"{adapter.file} is not the published {entry.name} (its sha256 is not {entry.sha256[:12]}...): fetch it "
            f"again from {entry.hub}"
        )
    below = [a.published.name if a.published else a.name for a in place.below]
    if any([*history.names, *below] == list(entry.after) for history in _histories(base)):
        return
    where = f"after {', '.join(entry.after)}" if entry.after else "first"
    hint = _in_base(base, entry)
    yield Finding(
        f"The adapter {adapter.name!r} must be merged {where}: --loras {','.join([*entry.after, adapter.name])}{hint}"
    )


def _in_base(base: Path, entry: Published) -> str:
    """What the rows of the base make likely."""
    needed = [registry().adapters[name] for name in entry.after]
    rows = _config(base).get("vocab_size")
    if needed and rows == needed[-1].tokenizer.pieces:
        return f" (unless {base}, with its {rows:,} rows, has {needed[-1].name} in it)"
    return ""


def _trained(base: Path, place: Place, places: list[Place]) -> Iterator[Finding]:
    """What the manifest says of the base and the adapters below, against what they are here."""
    adapter = place.adapter
    if adapter.manifest is None:
        return
    recorded = adapter.manifest.inputs.get("base") or {"path": "", "sha256": ""}
    histories = _histories(base)
    if recorded["sha256"]:
        fitting = [h for h in histories if (h.sha256 or identity(base)) == recorded["sha256"]]
        if not fitting:
            yield Finding(
                f"The adapter {adapter.name!r} was trained on another base ({recorded['path']}), not on {base}"
            )
        histories = fitting or histories
    below = [identity(other.path) for other in place.below]
    if adapter.parents not in [[*history.adapters, *below] for history in histories]:
        yield Finding(_wrong_order(place, places))


def _wrong_order(place: Place, places: list[Place]) -> str:
    adapter = place.adapter
    names = {identity(other.adapter.path): other.adapter.name for other in places}
    inputs = adapter.manifest.inputs if adapter.manifest else {}
    parents = [(sha, inputs[f"parent:{i}"]["path"]) for i, sha in enumerate(adapter.parents)]
    if not parents:
        return (
            f"The adapter {adapter.name!r} was trained on the bare base; it must come first in --loras, or be combined "
            "in one step of a plan with those that were too"
        )
    trained_on = [names.get(sha, path) for sha, path in parents]
    siblings = [other.name for other in place.siblings if other.name in trained_on]
    if siblings:
        return (
            f"The adapter {adapter.name!r} was trained on top of {', '.join(trained_on)}, and cannot be combined with "
            f"{siblings[0]!r} in one step: --loras {','.join([*trained_on, adapter.name])}"
        )
    return (
        f"The adapter {adapter.name!r} was trained on top of {', '.join(trained_on)}, and must be merged right "
        f"after: --loras {','.join([*trained_on, adapter.name])}"
    )


def _histories(base: Path) -> list[History]:
    """The ways to see `base`: itself, and, if `merge` made it, what it was made from, back to the first."""
    found = [History()]
    manifest = read_manifest(base) if base.is_dir() else None
    if manifest is None or manifest.command != "merge" or "base" not in manifest.inputs:
        return found
    roles = [role for role in manifest.inputs if re.fullmatch(r"adapter:\d+", role)]
    roles.sort(key=lambda role: int(role[8:]))
    adapters = [manifest.inputs[role]["sha256"] for role in roles]
    names = [str(name) for name in manifest.settings.get("loras", [])]
    if len(names) != len(adapters):
        names = [Path(manifest.inputs[role]["path"]).name for role in roles]
    record = manifest.inputs["base"]
    found.append(History(record["sha256"], adapters, names))
    older = Path(record["path"])
    below = read_manifest(older) if older.is_dir() else None
    if below and below.command == "merge" and identity(older) == record["sha256"]:
        for history in _histories(older)[1:]:
            found.append(History(history.sha256, history.adapters + adapters, history.names + names))
    return found


def _config(base: Path) -> dict[str, Any]:
    """The base's config.json, or Meta's params.json; {} where there is neither. Raises BadFile."""
    for file in (base / "config.json", base / "params.json"):
        if file.is_file():
            return read_object(file)
    return {}
