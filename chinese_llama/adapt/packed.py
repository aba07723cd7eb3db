"""Whether data is packed already, asked without packing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chinese_llama.workspace import Workspace


def packed(space: Workspace, words: Sequence[str]) -> bool:
    """Whether what `prepare_ahead` would make for pt_lora, told these words beyond its section, is there. Raises
    UserError."""
    from chinese_llama.data.prepare import key
    from chinese_llama.train.fields import Recipe, resolve
    from chinese_llama.train.jobs import JOBS, prepared_root

    fields, job = JOBS["pt_lora"]
    recipe: Recipe[Any] = resolve("pt_lora", fields, {}, ["--workspace", str(space.file), *words])
    return (prepared_root(recipe.fields) / key(job(recipe))[:16]).is_dir()
