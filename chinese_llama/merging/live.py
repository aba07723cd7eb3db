"""Adapters on a model in memory: baked into its weights, or live beside them, as PEFT runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chinese_llama.errors import DoesNotFit
from chinese_llama.merging.fit import check_fit
from chinese_llama.merging.merged import bake
from chinese_llama.merging.plan import Adapter, Step
from chinese_llama.merging.stream import load_steps
from chinese_llama.model.shards import Weights


def fitting_rows(place: Path, adapters: Sequence[Adapter]) -> int:
    """The rows of the vocabulary of the model in `place` with `adapters` on it, by their headers. Raises
    DoesNotFit or BadFile where something has no place in it."""
    return check_fit(Weights(place), place, load_steps([Step([adapter]) for adapter in adapters]))


def grow(model: Any, rows: int | None) -> None:
    """Room for the rows that an adapter brings whole (the published ones bring all of them)."""
    if rows and rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def bake_in(model: Any, place: Path, adapters: Sequence[Adapter]) -> None:
    """Merge `adapters` into `model`, which was loaded from `place`; its vocabulary grows with theirs."""
    if adapters:
        grow(model, fitting_rows(place, adapters))
        bake(model, load_steps([Step([adapter]) for adapter in adapters]))


def live(model: Any, adapter: Adapter) -> Any:
    """A PeftModel of `model` (with as many rows as the adapter has) and `adapter`, unmerged, in evaluation
    mode. Raises DoesNotFit for what PEFT cannot load."""
    from peft import PeftModel

    from chinese_llama.model.lean import lean

    try:
        return lean(PeftModel.from_pretrained(model, str(adapter.path)).eval())
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise DoesNotFit(f"{adapter.path} cannot be put on the base ({what}).") from error
