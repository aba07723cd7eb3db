"""Whether adapters fit a base and each other, told by shapes before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.merging.merged import Loaded
from chinese_llama.model.adapters import Tensors
from chinese_llama.model.shards import EMBED, HEAD, Model

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def check_fit(source: Model, base: Path, steps: Sequence[Loaded], forced: list[str] | None = None) -> int:
    """The rows of the merged vocabulary. What an adapter's file lacks is told in `forced`, if given, and
    overlooked.

    Raises DoesNotFit where a tensor has no place in the base (`base` names it) or another shape, where a
    module lacks its tensors, a vocabulary shrinks along the list, or a row comes from nowhere.
    """
    if EMBED not in source:
        raise DoesNotFit(f"{base} has no tensor {EMBED}; adapters are merged into LLaMA-family models only.")
    _check_layers(source, base)
    rows = source.meta(EMBED)[0][0]
    for loaded in steps:
        for part in loaded.parts:
            _check_names(source, base, part, forced)
            part.transposed = _is_transposed(source, part)
        rows = _check_vocabulary(source, loaded, rows, steps)
        for part in loaded.parts:
            for name in part.names():
                _check_place(source, base, part, name, rows)
    for name in (EMBED, HEAD):
        if name in source:
            _check_owned(source, steps, name, rows)
    return rows


def _check_layers(source: Model, base: Path) -> None:
    """The layers that config.json counts must be there."""
    said = source.config().get("num_hidden_layers")
    found = {match[1] for name in source if (match := LAYER.match(name))}
    if isinstance(said, int) and found and len(found) != said:
        raise DoesNotFit(
            f"{base}: config.json says {said} layers, and the weights are of {len(found)}; the copy is not whole."
        )


def _check_names(source: Model, base: Path, part: Tensors, forced: list[str] | None) -> None:
    """What adapter_config.json lists and the base has must be in the file."""
    adapter = part.adapter
    some = any(adapter.config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    for key, held in (("target_modules", part.pairs), ("modules_to_save", part.matrices)):
        listed = adapter.config.get(key)
        for target in listed if isinstance(listed, list) else ():
            there = [name for name in source if _is(name, target) and name.endswith(".weight")]
            lost = [name for name in there if name not in held]
            if lost and (len(lost) == len(there) or (key == "target_modules" and not some)):
                what = target if len(lost) == len(there) else lost[0].removesuffix(".weight")
                lacking = f"has no tensors for {what}, which adapter_config.json lists in {key}; the file is not whole"
                if forced is None:
                    raise BadFile(adapter.file, f"{lacking} (--force merges it all the same).")
                forced.append(f"{adapter.file} {lacking}.")
    if adapter.config.get("trainable_token_indices") and not part.rows:
        told = "has no rows for trainable_token_indices of adapter_config.json; the file is not whole."
        raise BadFile(adapter.file, told)


def _is_transposed(source: Model, part: Tensors) -> bool:
    """Whether the pairs are of weights stored as [in, out]. PEFT's fan_in_fan_out alone does not tell: PEFT
    itself ignores it for linear layers, as LLaMA's are. What is not square does."""
    if not part.adapter.config.get("fan_in_fan_out"):
        return False
    deltas = [(part.delta_shape(name), source.meta(name)[0]) for name in part.pairs if name in source]
    return any(delta != shape and delta[::-1] == shape for delta, shape in deltas)


def _is(name: str, module: str) -> bool:
    """Whether the weight `name` is that of a module given by the end of its name."""
    return f".{name}".rpartition(".")[0].endswith(f".{module}")


def _check_vocabulary(source: Model, loaded: Loaded, rows: int, steps: Sequence[Loaded]) -> int:
    grown = {part: wanted for part in loaded.parts if (wanted := part.vocabulary()) is not None}
    for part, wanted in grown.items():
        has_matrix = any(name in part.matrices for name in (EMBED, HEAD))
        if has_matrix and wanted < rows:
            raise DoesNotFit(
                f"The adapter {part.adapter.name!r} has {wanted:,} embedding rows, what lies below it {rows:,}: a "
                f"vocabulary never shrinks; {_right_order(steps)}."
            )
    most = max([rows, *grown.values()])
    if len(loaded.parts) > 1 and most > rows:
        _check_growing_together(source, loaded, most)
    return most


def _right_order(steps: Sequence[Loaded]) -> str:
    """What to do about a vocabulary that shrinks along the steps."""
    given = [part for loaded in steps for part in loaded.parts]
    by_rows = sorted(given, key=lambda part: part.vocabulary() or 0)
    if by_rows == given:
        return "merge it into the base that it was trained on"
    return f"the order is --loras {','.join(part.adapter.name for part in by_rows)}"


def _check_growing_together(source: Model, loaded: Loaded, most: int) -> None:
    """Rows that nothing below has are averaged: every sibling must bring all of them."""
    for part in loaded.parts:
        brought = [part.matrix(n)[0][0] if n in part.matrices else 0 for n in (EMBED, HEAD) if n in source]
        if min(brought) != most:
            raise DoesNotFit(
                f"Adapters that are combined must all bring the {most:,} rows of the larger vocabulary, and "
                f"{part.adapter.name!r} does not; merge the one that grows it first."
            )
    if not sum(adapter.weight for adapter in loaded.step.adapters) > 0:
        raise DoesNotFit(
            "The weights of adapters that are combined and bring new rows must add up to more than 0."
        )


def _check_place(source: Model, base: Path, part: Tensors, name: str, rows: int) -> None:
    who = f"The adapter {part.adapter.name!r}"
    if name in (EMBED, HEAD) and HEAD not in source and source.config().get("tie_word_embeddings"):
        _check_tied(base, part)
        if name == HEAD:
            return  # the embeddings' own tensor holds these rows
    if name not in source:
        raise DoesNotFit(f"{who} changes {name}, which {base} does not have.")
    shape, dtype = source.meta(name)
    if not dtype.is_floating_point:
        raise DoesNotFit(
            f"{who} changes {name}, which is {dtype} in {base}; give the model before it was quantised."
        )
    if name in part.pairs:
        delta = part.delta_shape(name)
        fits = delta[::-1] if part.transposed else delta
        grown = name in (EMBED, HEAD) and (shape[0] <= fits[0] <= rows and fits[1:] == shape[1:])
        if fits != shape and not grown:
            raise DoesNotFit(f"{who} has {delta} for {name}, the base {shape}.")
    if name in part.matrices:
        found = part.matrix(name)[0]
        if found != shape and (name not in (EMBED, HEAD) or len(found) != 2):
            raise DoesNotFit(f"{who} has another shape for {name} ({found}) than the base ({shape}).")
        if found[1:] != shape[1:]:
            raise DoesNotFit(f"{who} has {found[1]} columns in {name}, the base {shape[1]}.")
    if name in part.rows:
        ids, key = part.rows[name]
        if min(ids) < 0 or part.file.meta(key)[0] != (len(ids), *shape[1:]):
            raise DoesNotFit(f"{who}: the rows for {name} do not fit the base.")


def _check_tied(base: Path, part: Tensors) -> None:
    """On a tied base an adapter's output rows must be its input rows. PEFT trains whole matrices, and LoRA on
    them, apart from the output if it is not told otherwise: then a tied model cannot hold what was trained."""
    apart = not part.adapter.config.get("ensure_weight_tying")
    if apart and (EMBED in part.pairs or (EMBED in part.matrices and HEAD not in part.matrices)):
        raise DoesNotFit(
            f"The adapter {part.adapter.name!r} changes the embeddings and not lm_head, but {base} ties them (it was trained "
            "without ensure_weight_tying): the result cannot be a tied model."
        )
    ids = {name: part.rows[name][0] for name in (EMBED, HEAD) if name in part.rows}
    keys = [[kind[name] for name in (EMBED, HEAD) if name in kind] for kind in (part.matrices, _keys(part))]
    same = HEAD not in part.pairs and (HEAD not in ids or ids[HEAD] == ids.get(EMBED))
    for name, kind in ((HEAD, part.matrices), (HEAD, _keys(part))):
        same = same and (name not in kind or EMBED in kind)
    for pair in keys:
        if same and len(pair) == 2:
            same = torch.equal(part.file.load(pair[0]), part.file.load(pair[1]))
    if not same:
        raise DoesNotFit(
            f"The adapter {part.adapter.name!r} has an lm_head of its own, but {base} ties it to the embeddings."
        )


def _keys(part: Tensors) -> dict[str, str]:
    return {name: key for name, (_, key) in part.rows.items()}


def _check_owned(source: Model, steps: Sequence[Loaded], name: str, rows: int) -> None:
    """Every row that the base does not have must come from an adapter."""
    parts = [part for loaded in steps for part in loaded.parts]
    whole = max([source.meta(name)[0][0], *(p.matrix(name)[0][0] for p in parts if name in p.matrices)])
    single = {row for part in parts for row in part.rows.get(name, ((), ""))[0] if row >= whole}
    missing = rows - whole - len(single)
    if missing > 0:
        raise DoesNotFit(
            f"{name} must grow to {rows:,} rows, but no adapter has {missing:,} of them; merge into the "
            "extended base (chinese-llama extend-model) that the adapters were trained on."
        )
