"""What `eval` measures: which models, on which texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chinese_llama.errors import UserError
from chinese_llama.workspace import Workspace


def evaluation(workspace: Workspace, given: dict[str, Any]) -> tuple[list[str], dict[str, Path]]:
    """The models and the text sets of `eval`: by default the workspace's base and merged model."""
    if "text" in given:
        pairs = [item.partition("=") for item in given["text"]]
        for name, equals, file in pairs:
            if not (name and equals and file):
                raise UserError(f"--text {name}{equals}{file}: write NAME=FILE.")
        sets = {name: Path(file) for name, _, file in pairs}
    else:
        sets = {name: workspace.path(file) for name, file in workspace.settings.eval.text.items()}
        if not sets:
            raise UserError(f"{workspace.file} names no texts; add eval.text, or give --text NAME=FILE.")
    if "model" in given:
        return [given["model"]], sets
    merged = workspace.path(workspace.settings.merge.output)
    return [workspace.base(), *([str(merged)] if merged.is_dir() else [])], sets
