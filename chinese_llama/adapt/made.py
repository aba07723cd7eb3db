"""What a workspace's result was made from, for the report: artifacts, vocabulary, training curves, settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from chinese_llama.adapt.subjects import Measured
from chinese_llama.artifacts import Manifest, read_manifest
from chinese_llama.hub import local
from chinese_llama.train.log import LOG, read_log
from chinese_llama.vocab import report as vocab_report
from chinese_llama.workspace import Workspace

Told = dict[str, Any]


def made_from(space: Workspace, found: list[Measured], manifest: Manifest) -> Told:
    """{"artifacts", "vocabulary", "curves", "settings"} of the stages that are there."""
    places = _places(space, found)
    manifests = {name: read_manifest(place) for name, place in places.items()}
    return {
        "artifacts": _artifacts(places, manifests, manifest),
        "vocabulary": _vocabulary(space),
        "curves": {name: log for name, place in places.items() if (log := _curve(place, manifests[name]))},
        "settings": _settings(space),
    }


def _places(space: Workspace, found: list[Measured]) -> dict[str, Path]:
    """Names of the artifacts of a workspace that are there, in the order in which they are made."""
    s = space.settings
    places = {
        "base": local(space.base()),
        "Chinese vocabulary": space.path(s.train_vocab.output),
        "tokenizer": space.path(s.extend_vocab.output),
        "extended": space.path(s.extend_model.output),
    }
    places |= {adapter.name: adapter.path for item in found for adapter in item.subject.adapters}
    places["merged"] = space.path(s.merge.output)
    return {name: place for name, place in places.items() if place.is_dir()}


def _artifacts(
    places: dict[str, Path], manifests: dict[str, Manifest | None], manifest: Manifest
) -> list[Told]:
    found = []
    for name, place in places.items():
        made = manifests[name]
        known = manifest.inputs.get(name, {}).get("sha256") or (made.sha256 if made else "")
        rows = made.vocab_size if made else None
        told = {"role": name, "path": str(place), "sha256": known, "vocab_size": rows}
        found.append(
            {**told, "made_by": made.command if made else None, "created": made.created if made else None}
        )
    texts = {
        r: v for r, v in manifest.inputs.items() if r.startswith("text:") or r in ("prompts", "wikitext")
    }
    return [*found, *({"role": role, **record} for role, record in texts.items())]


def _vocabulary(space: Workspace) -> Told | None:
    """What the tokenizer's report says of the text kept apart from its corpus, else of the probe texts."""
    place = space.path(space.settings.extend_vocab.output)
    if not (place / vocab_report.REPORT).is_file():
        return None
    told = vocab_report.read(place)
    name, figures = list(vocab_report.sets(told).items())[-1]
    return {
        "base_size": told["base_vocab_size"],
        "size": told["vocab_size"],
        "added": told["new_pieces"],
        "policy": told["policy"],
        "measured_on": name,
        "scripts": figures["scripts"],
    }


def _curve(place: Path, manifest: Manifest | None) -> list[Told]:
    """The log of a training, with the characters read so far where its manifest tells how many an epoch has."""
    if manifest is None:
        return []
    log = read_log(place / LOG) or manifest.metrics.get("log") or []
    each = _characters(manifest.metrics.get("sources") or [])
    return [
        {**entry, "characters": round(entry["epoch"] * each)} if each and "epoch" in entry else entry
        for entry in log
    ]


def _characters(sources: list[Told]) -> float:
    """Characters of an epoch: it has the tokens of all sources together, shared by their weights if they have any."""
    tokens = sum(source["tokens"] for source in sources)
    shares = [source["tokens"] if (w := source.get("weight")) is None else w for source in sources]
    read = sum(
        share * s["characters"] / s["tokens"] for share, s in zip(shares, sources, strict=True) if s["tokens"]
    )
    return tokens * read / sum(shares) if tokens else 0.0


def _settings(space: Workspace) -> Told:
    """The sections of the workspace file, and plain settings as a section of their own."""
    found = dataclasses.asdict(space.settings)
    sections = {name: value for name, value in found.items() if isinstance(value, dict) and value}
    plain = {
        name: value for name, value in found.items() if not isinstance(value, dict) and value is not None
    }
    return {"workspace": plain, **sections}
