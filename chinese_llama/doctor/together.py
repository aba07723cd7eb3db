"""Whether things belong together: which adapters on which base, in which order, with which tokenizer."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from chinese_llama.artifacts import identity
from chinese_llama.convert.meta import open_model
from chinese_llama.doctor.finding import Finding, guarded, listing, some
from chinese_llama.doctor.merges import alike, check_merged, check_related
from chinese_llama.doctor.model import added_to, check_size
from chinese_llama.doctor.order import MODELS, Chain, chains_of, command, given_order, named_base
from chinese_llama.doctor.tensors import FP16
from chinese_llama.doctor.things import UNREADABLE, Thing, manifest_of
from chinese_llama.errors import DoesNotFit
from chinese_llama.merging.adapter import Adapter, Step, load, recognise
from chinese_llama.merging.belongings import check_tokenizer, pieces_of, tokenizer_of
from chinese_llama.merging.fit import check_fit
from chinese_llama.merging.lineage import check_base, check_lineage
from chinese_llama.merging.merged import Loaded, Merged
from chinese_llama.merging.stream import load_steps
from chinese_llama.model.adapters import Tensors, whole_rows
from chinese_llama.model.shards import Model, blocks

LAYER = re.compile(r"layers\.(\d+)\.")
UNTIE = (  # BASE becomes a string of Python; in double quotes, so that those of the shell stay single
    "import torch; from transformers import AutoModelForCausalLM as A; "
    "m = A.from_pretrained(BASE); m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.clone()); "
    'm.config.tie_word_embeddings = False; m.save_pretrained("untied")'
)
# what the sentences of lineage and fit are about -> the check, and what to do where they do not say it
TOLD = (
    ("quantised", "quantised", "Give the model before it was quantised."),
    (" merged into ", "adapter-merged-already", "Leave it out, or give the base that it is not in."),
    ("are the same one", "adapter-twice", "Give it once."),
    ("never shrinks", "vocabulary-shrinks", "Merge the adapter with fewer rows first, into the base that it was trained on."),
    ("another base", "adapter-of-another-base", "Give the base that the adapter was trained on."),
    ("another model of that size", "adapter-of-another-base", "Give the base that the adapter was trained on."),
    (" is for ", "adapter-of-another-base", "Give the base that the adapter was trained on."),
    ("sha256", "not-as-published", "Fetch it again from where it was published."),
    ("the tokenizer in", "rows-do-not-fit", "Put the adapter's own tokenizer beside it."),
    ("must be merged", "adapters-out-of-order", "Merge in that order."),
    ("must come first", "adapters-out-of-order", "Merge in that order."),
    ("must grow to", "rows-missing", "Give the extended base (chinese-llama extend-model) as the base."),
    ("tie", "adapter-on-tied-base", ""),  # _untie
    ("does not have", "adapter-of-another-base", "Give the base that the adapter was trained on."),
    ("the base (", "adapter-of-another-base", "Give the base that the adapter was trained on."),
    ("the base [", "adapter-of-another-base", "Give the base that the adapter was trained on."),
    (" the base ", "adapter-of-another-base", "Give the base that the adapter was trained on."),
    ("", "does-not-fit", "Give base and adapters that belong together."),
)  # fmt: skip


def check_together(things: Sequence[Thing]) -> tuple[list[str], list[Finding]]:
    """In which order the adapters merge, as commands; and what does not fit."""
    findings = [finding for thing in things if thing.kind == "unknown" for finding in _unknown(thing)]
    models = [thing for thing in things if thing.kind in MODELS]
    adapters, twice = _loaded(things)
    findings += twice
    chains = []
    for members in chains_of(adapters, models):
        chain = Chain(members)
        findings += guarded(chain.place, _on_the_best(chain, models))
        chains.append(chain)
    findings += given_order([t.path for t in things if "found_in" not in t.facts], chains)
    for chain in chains:
        if chain.base:
            for other in models:
                if other is not chain.base:
                    findings += guarded(other.path, check_merged(other, chain.base, chain.adapters))
    if not chains:
        for other in models[1:]:
            findings += guarded(other.path, check_related(models[0], other))
    findings += _tokenizers(things, chains)
    return [command(chain) for chain in chains], [f for i, f in enumerate(findings) if f not in findings[:i]]


def _unknown(thing: Thing) -> Iterator[Finding]:
    inside = thing.facts.get("inside") or []
    what = f"It is no model, adapter, tokenizer or data that is known: it {'is ' if thing.path.exists() else ''}{thing.title}."
    if "problem" in thing.facts:
        what = f"It cannot be read ({thing.facts['problem']})."
    lines = some([Path(p).name for p in inside]) or listing(thing.path)
    remedy = "Look whether the path is right, and the download whole."
    if inside:
        remedy = "Give what lies in it: " + " ".join(inside)
    elif "problem" in thing.facts:
        remedy = "Give yourself the right to read it, or copy it again."
    yield Finding("error", "not-recognised", str(thing.path), what, lines, remedy)


def _loaded(things: Sequence[Thing]) -> tuple[list[Adapter], list[Finding]]:
    """The adapters that can be read, by their paths, so that what is said of them can be typed; those that were
    given twice, which are left out."""
    found: dict[str, Adapter] = {}
    twice = []
    for thing in [thing for thing in things if thing.kind == "adapter"]:
        with contextlib.suppress(*UNREADABLE):
            adapter = load(str(thing.path), thing.path)
            recognise(adapter)
            first = found.setdefault(identity(thing.path), adapter)
            if first is not adapter:
                what = f"The adapters {first.name} and {adapter.name} are the same one."
                lines = [f"sha256 of both: {identity(thing.path)}"]
                twice.append(
                    Finding(
                        "warning", "adapter-twice", adapter.name, what, lines, "Give, and merge, it once."
                    )
                )
    return list(found.values()), twice


# --- base and adapters


def _on_the_best(chain: Chain, models: list[Thing]) -> Iterator[Finding]:
    """Put a chain on the base, of those that are given, with which the least is wrong; what is wrong there."""
    if not models:
        yield from _alone(chain)
        return
    tried = [_tried(chain.adapters, model) for model in models]
    fewest = min(map(_wrong, tried))
    fitting = sorted((one for one in tried if _wrong(one) == fewest), key=lambda one: _place(one.base))
    named = named_base(chain.adapters[0], models)
    best = next((one for one in fitting if one.base is named), None) or next(
        (one for one in fitting if _is_below(one, fitting)), fitting[0]
    )
    chain.base, chain.rows = best.base, best.rows
    yield from best.findings
    if fewest == 0 and len(models) > 1 and best.base:
        into = "adapter-merged-already"  # which is no trouble where it was merged into what is given, too
        unfit = [one for one in tried if _wrong(one) and into not in [each.check for each in one.findings]]
        others = [str(one.base.path) for one in unfit if one.base]
        if others:
            names = ", ".join(adapter.name for adapter in chain.adapters)
            what = f"{names}: belongs on {best.base.path}, not on the others."
            yield Finding("note", "base-found", str(chain.place), what, some(others), "")


def _wrong(chain: Chain) -> int:
    """How much does not fit, tokenizers aside, which can be put in their places."""
    return len(
        [
            finding
            for finding in chain.findings
            if "token" not in finding.check and finding.check != "rows-do-not-fit"
        ]
    )


def _place(thing: Thing | None) -> tuple[bool, int]:
    """What is more likely a base comes first: what no merge made, what has fewer rows."""
    return thing is not None and thing.facts.get("made_by") == "merge", _size(thing)


def _is_below(one: Chain, fitting: list[Chain]) -> bool:
    """Whether another of the models that fit is the merge of this one and the adapters."""
    others = [
        other.base for other in fitting if other.base and one.base and _place(other.base) == _place(one.base)
    ]
    return any(
        finding.check == "is-the-merge"
        for other in others
        if one.base and other is not one.base
        for finding in guarded(other.path, check_merged(other, one.base, one.adapters))
    )


def _size(thing: Thing | None) -> int:
    rows = thing.facts.get("vocab_size") if thing else None
    return rows if isinstance(rows, int) else 0


def _alone(chain: Chain) -> Iterator[Finding]:
    first = chain.adapters[0]
    known = first.published.base.name if first.published else None
    recorded = first.manifest.inputs.get("base", {}).get("path") if first.manifest else None
    base = known or recorded or first.config.get("base_model_name_or_path")
    what = "No base is given, so whether the adapter fits one is not known."
    places = " ".join(shlex.quote(str(adapter.path)) for adapter in chain.adapters)
    remedy = f"Give it too: chinese-llama doctor {base or 'BASE'} {places}"
    yield Finding(
        "note", "base-not-given", str(first.path), what, [f"trained on {base}"] if base else [], remedy
    )


def _tried(adapters: list[Adapter], base: Thing) -> Chain:
    """The chain on one base, with what is wrong there."""
    chain = Chain(adapters, base)
    with contextlib.suppress(*UNREADABLE):
        try:
            check_base(base.path)
            chain.findings += [
                _told(text, adapters, base) for text in check_lineage(base.path, adapters, True)
            ]
        except DoesNotFit as error:
            chain.findings.append(_told(str(error), adapters, base))
    with contextlib.suppress(*UNREADABLE):  # what cannot be read was told of each thing
        source = open_model(base.path)
        loaded = load_steps([Step([adapter]) for adapter in adapters])
        try:
            chain.rows = check_fit(source, base.path, loaded, [])
        except DoesNotFit as error:
            told = _told(str(error), adapters, base)
            if told.check not in [finding.check for finding in chain.findings]:
                chain.findings.append(told)
            return chain
        for one in loaded:
            for part in one.parts:
                chain.findings += _layers(part, source, base)
        chain.findings += _named_otherwise(adapters[0], base, source)
        chain.findings += _overflow(source, loaded, base)
        chain.findings += _result(chain)
    return chain


def _layers(tensors: Tensors, source: Model, base: Thing) -> Iterator[Finding]:
    """Whether the adapter has nothing for whole layers of the base, without that being meant."""
    config = tensors.adapter.config
    meant = any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    named = isinstance(config.get("target_modules"), list) and not LAYER.search(str(config["target_modules"]))
    here, there = ({m[1] for n in names if (m := LAYER.search(n))} for names in (tensors.pairs, source))
    if named and not meant and here and (lost := sorted(there - here, key=int)):
        place = tensors.adapter.path
        what = f"The adapter {place} has tensors for {len(here)} of the {len(there)} layers of {base.path}: it is of a base with fewer layers, or not whole."
        lines = [f"nothing for layer {', '.join(lost[:8])}{' ...' if len(lost) > 8 else ''}"]
        remedy = "Give the base that it was trained on; or fetch the adapter again, and compare its size and sha256."
        yield Finding("error", "adapter-of-another-base", str(place), what, lines, remedy)


def _named_otherwise(adapter: Adapter, base: Thing, source: Model) -> Iterator[Finding]:
    """Whether the base is another one than adapter_config.json names, where that is here to be compared: another model,
    or the adapter merged into it already."""
    name = str(adapter.config.get("base_model_name_or_path") or "")
    if adapter.manifest or adapter.published or not (Path(name) / "config.json").is_file():
        return
    lines = [f"adapter_config.json: base_model_name_or_path {name!r}"]
    remedy = f"Give the base that it was trained on: chinese-llama doctor {name} {adapter.path}"
    if not alike(open_model(Path(name)), source):
        what = f"The adapter {adapter.name} was trained on {name}, and {base.path} has other weights: it is another model."
        lines.append(f"most weights of {name} and {base.path} differ")
        yield Finding("error", "adapter-of-another-base", str(adapter.path), what, lines, remedy)
    elif Path(name).resolve() != base.path.resolve():
        found = check_merged(base, Thing(Path(name), "model", ""), [adapter])
        if any(finding.check == "is-the-merge" for finding in found):
            what = f"The adapter {adapter.name} is merged into {base.path} already: a second time it would count twice."
            yield Finding("error", "adapter-merged-already", str(adapter.path), what, lines, remedy)


def _told(sentence: str, adapters: list[Adapter], base: Thing) -> Finding:
    bare = sentence
    for place in sorted([base.path, *(adapter.path for adapter in adapters)], key=lambda p: -len(str(p))):
        bare = bare.replace(str(place), "") if "/" in str(place) else bare  # else a word like "base" would go
    check, remedy = next((check, remedy) for sign, check, remedy in TOLD if sign in bare)
    remedy = remedy or _untie(base.path)
    return Finding("error", check, str(adapters[-1].path), sentence, [f"base: {base.path}"], remedy)


def _untie(base: Path) -> str:
    program = UNTIE.replace("BASE", json.dumps(str(base), ensure_ascii=False))
    return (
        f"Untie the base: python -c {shlex.quote(program)} ; then copy the tokenizer's files from {base} into "
        "untied. Or train with ensure_weight_tying."
    )


def _overflow(source: Model, loaded: list[Loaded], base: Thing) -> Iterator[Finding]:
    """Weights that float16, the type of the base, does not hold once the adapters are in. A product is computed
    only where the norms of its factors do not rule it out."""
    said = str(source.config().get("dtype") or source.config().get("torch_dtype"))
    merged, lines = Merged(source, loaded), []
    for name in dict.fromkeys(name for one in loaded for part in one.parts for name in part.pairs):
        if name not in source or torch.float16 not in (source.meta(name)[1], getattr(torch, said, None)):
            continue
        bound = 0.0
        for part in [part for one in loaded for part in one.parts if name in part.pairs]:
            factors = part.factors(name)
            left, right = factors.left.norm(dim=1).max(), factors.right.norm(dim=0).max()
            bound += float(left * right) if factors.magnitude is None else torch.inf
        if not bound < FP16 / 2:
            shape = source.meta(name)[0]
            tops = (
                merged.total(name, shape, start, stop).abs().max()
                for _, start, stop in blocks(source, [name])
            )
            largest = max(map(float, tops))
            lines += [f"{name}: up to {largest:,.6g}"] if largest > FP16 else []
    if lines:
        what = f"Merged, {len(lines):,} weights are too large for float16, the type of the base."
        yield Finding(
            "error", "fp16-overflow", str(base.path), what, some(lines), "Merge with --dtype bfloat16."
        )


# --- tokenizers


def _result(chain: Chain) -> Iterator[Finding]:
    """Whether the tokenizer that the merged model gets is of its rows; what each adapter's tokenizer makes of the
    pieces of the base's."""
    if chain.base is None or chain.rows is None:
        return
    found = tokenizer_of(chain.base.path, chain.adapters)
    own = {whole_rows(a) for a in chain.adapters if a.path == found} | (
        {_size(chain.base)} if found == chain.base.path else set()
    )
    if found and chain.rows not in own:  # else it was told of the thing itself
        manifest = manifest_of(chain.base.path)
        padded = manifest.vocab_size if manifest and manifest.metrics.get("rows") == chain.rows else None
        try:
            check_tokenizer(found, chain.rows, "the merged model", padded)
        except DoesNotFit as error:
            remedy = "Put the tokenizer that the last adapter was trained with beside it."
            yield Finding(
                "error",
                "rows-do-not-fit",
                str(found),
                str(error),
                [f"rows when merged: {chain.rows:,}"],
                remedy,
            )
    below = chain.base.path
    for adapter in chain.adapters:
        if adapter.tokenizer and (line := _other_pieces(below, adapter.tokenizer)):
            what = f"The tokenizer beside the adapter does not go on from the one in {below}: rows stand for other pieces."
            remedy = "Put the tokenizer there that the adapter was trained with, or give the base that it was trained on."
            yield Finding("error", "tokenizers-differ", str(adapter.path), what, [line], remedy)
        below = adapter.tokenizer or below


def _other_pieces(one: Path, other: Path) -> str | None:
    """The first id that is another piece in two tokenizers, in words; None where one is the beginning of the other,
    or one cannot be read."""
    with contextlib.suppress(*UNREADABLE):
        mine, theirs = ({i: piece for piece, i in pieces_of(place).items()} for place in (one, other))
        wrong = next((i for i in sorted(mine.keys() & theirs.keys()) if mine[i] != theirs[i]), None)
        if wrong is not None:
            return f"id {wrong}: {mine[wrong]!r} in {one}, {theirs[wrong]!r} in {other}"
    return None


def _tokenizers(things: Sequence[Thing], chains: list[Chain]) -> Iterator[Finding]:
    """Tokenizers that were given by themselves, against everything that has rows; and against one another."""
    rows = {str(thing.path): _size(thing) for thing in things if thing.kind in MODELS and _size(thing)}
    rows |= {str(t.path): t.facts["rows"] for t in things if t.kind == "adapter" and t.facts.get("rows")}
    rows |= {
        "merged: " + " + ".join(a.name for a in chain.adapters): chain.rows for chain in chains if chain.rows
    }
    for thing in [thing for thing in things if thing.kind == "tokenizer"]:
        place, refused = thing.path if thing.path.is_dir() else thing.path.parent, []
        with contextlib.suppress(*UNREADABLE):
            pieces = max(*pieces_of(place).values(), *added_to(place).values()) + 1
            for what, count in rows.items():
                try:
                    check_size(place, count, what)
                except DoesNotFit:
                    refused.append(f"{what}: {count:,} rows")
            if rows and len(refused) == len(rows):
                what = (
                    f"The tokenizer has {pieces:,} pieces, and nothing that was given has rows for just them."
                )
                remedy = "Use the tokenizer that the model was made with, or grow the model: chinese-llama extend-model."
                yield Finding("error", "rows-do-not-fit", str(thing.path), what, some(refused), remedy)
    alone = [thing.path for thing in things if thing.kind == "tokenizer" and thing.path.is_dir()]
    holders = [t.path for t in things if t.facts.get("tokenizer") and t.path not in alone]
    for number, place in enumerate(alone):
        for other in [*alone[number + 1 :], *holders]:
            if line := _other_pieces(place, other):
                what = f"The tokenizers in {place} and {other} differ; what one makes of a text means nothing to a model of the other."
                remedy = "Use the one that the model was made with."
                yield Finding("warning", "tokenizers-differ", str(place), what, [line], remedy)
