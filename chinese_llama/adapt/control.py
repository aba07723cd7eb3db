"""The control: the same continued pretraining on the base as it was, without new pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from chinese_llama.errors import UserError
from chinese_llama.workspace import Workspace


def control_argv(space: Workspace, output: str) -> Callable[[], list[str]]:
    """What pt_lora is told for the control, beyond its section: the base, no rows that train, the same epochs; or,
    where the steps are counted, as many as read the same characters."""

    def argv() -> list[str]:
        own = dict(space.settings.control or {})
        own.pop("output_dir", None)
        base = space.base()
        words: dict[str, Any] = {
            "model_name_or_path": base,
            "tokenizer_name_or_path": base,
            "output_dir": str(space.path(output)),
        }
        words |= {
            "embeddings": "frozen",
            "embedding_learning_rate": None,
            "rows_only_steps": 0,
            "keep": True,
            **own,
        }
        steps = space.settings.pt_lora.get("max_steps")
        if steps and "max_steps" not in own:
            words["max_steps"] = _same_characters(space, base, int(steps))
        return [part for name, value in words.items() for part in (f"--{name}", _word(value))]

    return argv


def _word(value: object) -> str:
    """A value as the command line of a recipe has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _same_characters(space: Workspace, base: str, steps: int) -> int:
    """The steps in which the base's tokenizer reads what the extended one reads in `steps`."""
    from chinese_llama.train.jobs import prepare_ahead

    shared = ["--workspace", str(space.file)]
    tokens = []
    for words in ([*shared, "--tokenizer_name_or_path", base], shared):
        sources = prepare_ahead("pt_lora", words).manifest.metrics["sources"]
        if not (count := sum(source["tokens"] for source in sources)):
            raise UserError("control: the data of pt_lora holds no tokens.")
        tokens.append(count)
    return max(1, round(steps * tokens[0] / tokens[1]))
