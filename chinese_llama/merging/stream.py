"""The stage `merge`: base weights and adapters in, a plain model out, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from chinese_llama.artifacts import (
    Keep,
    Manifest,
    hash_ahead,
    identity_files,
    input_record,
    read_manifest,
    stands,
    write_manifest,
)
from chinese_llama.convert.convert import layout_of
from chinese_llama.convert.meta import MetaWeights, is_meta, open_model
from chinese_llama.convert.write import Restored, save_meta
from chinese_llama.directories import check_output, check_space, new_directory, write_text
from chinese_llama.errors import Interrupted
from chinese_llama.merging.belongings import (
    card,
    check_tokenizer,
    kept_settings,
    tokenizer_of,
    write_belongings,
)
from chinese_llama.merging.fit import check_fit
from chinese_llama.merging.journal import Journal
from chinese_llama.merging.merged import Loaded, Merged
from chinese_llama.merging.plan import Adapter, Step, check_base, check_lineage
from chinese_llama.merging.verify import probe, told, verify
from chinese_llama.model.adapters import read_tensors
from chinese_llama.model.resize import copy_tokenizer
from chinese_llama.model.shards import Changed, Hashes, Workers, save_shards
from chinese_llama.model.tensors import nbytes
from chinese_llama.progress import say


@dataclass
class Options:
    """How a merge is done. `dtype`: of the result (None: the base's); `format`: hf or meta; `workers`: threads
    that compute (0: one for each processor); `verify`: re-read the result and compare its logits; `resume`: go on
    with what a broken merge left (None: leave nothing to go on with); `force`: replace an output, and merge in spite of the lineage."""

    dtype: str | None = None
    format: str = "hf"
    workers: int = 0
    verify: bool = True
    resume: bool | None = False
    force: bool = False


class Work:
    """A merge that fits: its base, its adapters, the model that it makes and the tokenizer that belongs to it.

    Raises DoesNotFit or BadFile where something does not belong together. With `force`, `forced` are the
    sentences about the lineage that are overruled.
    """

    def __init__(self, base: Path, steps: Sequence[Step], options: Options) -> None:
        self.base, self.steps, self.options = base, steps, options
        check_base(base)
        self.forced = check_lineage(base, steps, options.force)
        self.source = open_model(base)
        self.loaded = load_steps(steps)
        self.rows = check_fit(self.source, base, self.loaded, self.forced if options.force else None)
        self.merged = Merged(self.source, self.loaded)
        dtype = getattr(torch, options.dtype) if options.dtype else None
        self.changes = self.merged.changes(self.rows, dtype)
        self.model = Changed(self.source, self.changes)
        own = self.source.tokenizer if isinstance(self.source, MetaWeights) else None  # it may lie above
        found = tokenizer_of(base, [a for step in steps for a in step.adapters])
        self.tokenizer = found or (own.parent if own else None)
        below = read_manifest(base)
        padded = below.vocab_size if below and below.metrics.get("rows") == self.rows else None
        self.vocab_size = (
            check_tokenizer(self.tokenizer, self.rows, "the merged model", padded) if self.tokenizer else None
        )
        self.bytes = sum(nbytes(*self.model.meta(name)) for name in self.model)

    def write(self, directory: Path, journal: Journal, workers: Workers) -> Hashes:
        """Write everything but card and manifest; return the hashes of the weights."""
        if self.options.format == "meta":
            if self.tokenizer:
                copy_tokenizer(self.tokenizer, directory)
            like = layout_of(self.base, self.source)
            return save_meta(self.model, directory, None, workers, like, "merging", xxhash.xxh3_128)
        write_belongings(self.base, self.source, self.tokenizer, self.rows, self.options.dtype, directory)
        return save_shards(
            self.model,
            directory,
            "merging",
            workers,
            xxhash.xxh3_128,
            journal.files,
            journal.note,
        )

    def verified(self, directory: Path, workers: Workers) -> dict[str, Any]:
        """Figures of what was written (see `verify`)."""
        ids = probe(directory, self.rows)
        written = open_model(directory)
        if self.options.format == "meta":
            written = Restored(written, self.model)
        return verify(written, self.merged, self.model, ids, workers)


def merge(
    base: Path, steps: Sequence[Step], output: Path, options: Options | None = None, keep: Keep = False
) -> Manifest:
    """Write `base` with the adapters of `steps` baked in, in their order, to `output`; return its manifest.

    W + sum of weight * scale * B @ A in float32, rounded once; vocabulary rows from the last adapter that has
    them; the tokenizer of the last adapter that brings one. Raises DoesNotFit where something does not belong
    together, Interrupted if it is stopped.
    """
    options = options or Options()
    adapters = [adapter for step in steps for adapter in step.adapters]
    places = {"base": base, **{f"adapter:{i}": adapter.path for i, adapter in enumerate(adapters)}}
    manifest = Manifest("model", "merge", settings=_settings(base, steps, options))
    if keep:
        manifest.inputs = {role: input_record(place) for role, place in places.items()}
        if stands(output, manifest, options.force, keep):
            return read_manifest(output) or manifest
    check_output(output, options.force)
    hash_ahead(places.values())
    work = Work(base, steps, options)
    for sentence in work.forced:
        say(f"Merged all the same (--force): {sentence}")
    manifest.vocab_size, manifest.metrics = work.vocab_size, _metrics(work)
    check_space(output, work.bytes)
    resume = None if options.format == "meta" else options.resume  # Meta's files are all finished at the end
    try:
        with (
            new_directory(output, options.force, places.values(), resume=resume) as partial,
            Workers(options.workers) as workers,
        ):
            journal = Journal(partial, _fingerprint(places, manifest.settings))
            hashes = work.write(partial, journal, workers)
            if options.format == "meta":
                manifest.metrics["hf"] = kept_settings(work.source, partial)
            if options.verify:
                manifest.metrics["verified"] = work.verified(partial, workers)
            write_text(partial / "README.md", card(base, steps, told(manifest.metrics.get("verified"))))
            manifest.inputs = {role: input_record(place) for role, place in places.items()}
            write_manifest(partial, manifest, hashes)
            journal.remove()
    except KeyboardInterrupt as error:
        if resume is None:
            raise
        raise Interrupted(
            "Stopped; what is finished is kept beside the output, and the same command with --resume goes on from it."
        ) from error
    return manifest


def load_steps(steps: Sequence[Step]) -> list[Loaded]:
    """The steps with the tensors of their adapters. Raises BadFile."""
    return [Loaded(step, [read_tensors(adapter) for adapter in step.adapters]) for step in steps]


def _settings(base: Path, steps: Sequence[Step], options: Options) -> dict[str, Any]:
    adapters = [adapter for step in steps for adapter in step.adapters]
    settings: dict[str, Any] = {"loras": [_name(adapter) for adapter in adapters]}
    settings["weights"] = [adapter.weight for adapter in adapters]
    settings["combined"] = [
        {"method": s.method, "density": s.density, "seed": s.seed, "loras": [_name(a) for a in s.adapters]}
        for s in steps
        if len(s.adapters) > 1
    ]
    settings |= {"dtype": options.dtype, "format": options.format}
    below = read_manifest(base)
    if is_meta(base):  # what Meta's files are or were like, for the way back
        settings["meta"] = MetaWeights(base).layout()
    elif below and "meta" in below.settings:
        settings["meta"] = below.settings["meta"]
    return settings


def _name(adapter: Adapter) -> str:
    """What the lineage knows an adapter by."""
    return adapter.published.name if adapter.published else adapter.name


def _metrics(work: Work) -> dict[str, Any]:
    metrics = {"rows": work.rows, "changed_tensors": len(work.changes), "tensors": len(list(work.source))}
    below = read_manifest(work.base)
    if below and "base_vocab_size" in below.metrics:
        metrics["base_vocab_size"] = below.metrics["base_vocab_size"]
    return metrics | ({"forced": work.forced} if work.forced else {})


def _fingerprint(places: dict[str, Path], settings: dict[str, Any]) -> list[Any]:
    """What a broken merge must have in common with the one that goes on with it."""
    files = [file for place in places.values() for file in identity_files(place)]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [settings, stats]
