"""The control: the same continued pretraining on the base as it was, without new pieces.

It reads the same characters of every source as the pretraining does. In epochs, sources without weights are read
alike whatever the tokenizer; weights are shares of tokens and steps count them, so both are converted, once the data
is packed for both tokenizers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from chinese_llama.data.mixture import sources
from chinese_llama.errors import UserError
from chinese_llama.workspace import Workspace

Figures = list[dict[str, Any]]  # of the sources, as prepared data has them


def output(space: Workspace) -> Path:
    """Where the adapter of the control lies."""
    return space.path((space.settings.control or {}).get("output_dir") or "work/control")


def words(space: Workspace) -> list[str]:
    """What pt_lora is told for the control beyond its section, as far as it is known before the data is packed: the
    base, no rows that train, and the control's own settings."""
    base = space.base()
    told: dict[str, Any] = {
        "model_name_or_path": base,
        "tokenizer_name_or_path": base,
        "embeddings": "frozen",
        "embedding_learning_rate": None,
        "rows_only_steps": 0,
        "keep": True,
        **(space.settings.control or {}),
        "output_dir": str(output(space)),
    }
    if "data" in told:
        told["data"] = space.paths(told["data"])
    return _argv(told)


def argv(space: Workspace) -> list[str]:
    """All that pt_lora is told for the control."""
    return [*words(space), *(_argv(_converted(space)) if counts(space) else [])]


def counts(space: Workspace) -> bool:
    """Whether weights or steps are to be converted, which the control's own settings do not say."""
    own, section = space.settings.control or {}, space.settings.pt_lora
    if "data" in own or not section.get("data"):
        return False
    steps = _steps(section) and "max_steps" not in own
    return bool(steps) or sources(section["data"])[0].weight is not None


def counted(space: Workspace) -> bool:
    """Whether the data that `argv` counts is packed already, for both tokenizers."""
    from chinese_llama.adapt.packed import packed

    return all(packed(space, told) for told in ([], words(space)))


def _converted(space: Workspace) -> dict[str, Any]:
    """`data`, `num_train_epochs` and `max_steps` with which the base's tokenizer reads what the extended one reads."""
    from chinese_llama.adapt.launch import recipe
    from chinese_llama.train.jobs import prepare_ahead

    own, section = space.settings.control or {}, space.settings.pt_lora
    figures: list[Figures] = [
        prepare_ahead("pt_lora", ["--workspace", str(space.file), *told]).manifest.metrics["sources"]
        for told in (words(space), [])
    ]
    if not all(source["tokens"] for source in [*figures[0], *figures[1]]):
        raise UserError("control: the data of pt_lora holds no tokens.")
    found = sources(space.paths(section["data"]))
    growth = [base["tokens"] / ours["tokens"] for base, ours in zip(*figures, strict=True)]
    epoch, base_epoch = (sum(source["tokens"] for source in of) for of in reversed(figures))
    made: dict[str, Any] = {}
    wanted = float(base_epoch)  # tokens of the base's tokenizer for one epoch of the pretraining
    if (first := found[0].weight) is not None:
        weights = [(source.weight or first) * more for source, more in zip(found, growth, strict=True)]
        wanted = epoch * sum(weights) / sum(source.weight or first for source in found)
        made["data"] = [
            {
                "path": str(s.path),
                "weight": round(weight / sum(weights), 6),
                "files": s.files,
                "format": s.format,
            }
            for s, weight in zip(found, weights, strict=True)
        ]
        epochs = section.get("num_train_epochs", recipe("pt_lora", space).DEFAULTS.get("num_train_epochs", 1))
        made["num_train_epochs"] = round(epochs * wanted / base_epoch, 4)
    if steps := _steps(section):
        defaults = recipe("pt_lora", space).DEFAULTS
        tokens = _tokens({**defaults, **section}) / _tokens({**defaults, **section, **own})
        made["max_steps"] = max(1, round(steps * tokens * wanted / epoch))
    return {name: value for name, value in made.items() if name not in own}


def _steps(section: dict[str, Any]) -> float:
    """The steps that a section counts; 0 where epochs do, or something that is no number."""
    steps = section.get("max_steps")
    return steps if isinstance(steps, (int, float)) and steps > 0 else 0


def _tokens(settings: dict[str, Any]) -> float:
    """Tokens that a process reads in a step."""
    from chinese_llama.train.fields import DEFAULTS, PretrainingFields

    known = {**DEFAULTS, "gradient_accumulation_steps": 1, "block_size": PretrainingFields.block_size}
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "block_size")
    return math.prod(settings.get(name, known[name]) for name in names)


def _argv(told: dict[str, Any]) -> list[str]:
    """Settings as the command line of a recipe has them."""
    return [part for name, value in told.items() for part in (f"--{name}", _word(value))]


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
