"""What the commands share: common options, options that were given, the workspace, models, JSON files."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chinese_llama import workspace
from chinese_llama.artifacts import now, read_manifest
from chinese_llama.errors import UserError
from chinese_llama.progress import say

STARTED = now()
Output = Annotated[
    Path | None, typer.Option(help="Directory to write; must not exist yet.", show_default="the workspace's")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Base = Annotated[
    Path | None, typer.Option(help="The base model or its tokenizer.", show_default="the workspace's")
]
Below = Annotated[
    str | None,
    typer.Option("--base", help="What --loras are put on.", show_default="the workspace's extended model"),
]
Loras = Annotated[
    str | None,
    typer.Option(help="Adapters in order, left unmerged: names, directories, hub ids, or name=directory."),
]
REPEATED = ("--corpus", "--text", "--choices", "--max-regression")  # options that take several values
EXAMPLES = "\n\n[bold]Examples[/bold]\n\n"


def frugal() -> None:
    """Let all threads share one heap (glibc): what one frees another takes, so the peak is lower."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def workspace_for(command: str, given: dict[str, Any], *needed: str) -> workspace.Workspace:
    """The workspace; needed where one of `needed` is not given. With everything given, an empty one
    serves."""
    missing = [name for name in needed if name not in given]
    if missing:
        options = " and ".join("--" + name.replace("_", "-") for name in missing)
        return workspace.required(command, options)
    return workspace.find() or workspace.Workspace.empty()


def note_if_kept(directory: Path) -> None:
    """Say so where a command left a result that stands as it was."""
    manifest = read_manifest(directory)
    if manifest and manifest.created < STARTED:
        say(f"{directory} stands: made {manifest.created} from the same inputs; --force makes it again.")


def check_json(file: Path | None) -> None:
    """Raise UserError, before any work, for a --json that `write_json` cannot write."""
    if file and not (file.absolute().parent.is_dir() and not file.is_dir()):
        raise UserError(f"--json {file} cannot be written; give a file in a directory that exists.")


def write_json(file: Path | None, content: Any) -> None:
    if file is not None:
        from chinese_llama.directories import write_text

        write_text(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def repeated(argv: Sequence[str]) -> list[str]:
    """`--corpus a b` as `--corpus a --corpus b`: lists are written as users write them."""
    words: list[str] = []
    option = ""
    if argv and argv[0] not in ("train-vocab", "extend-vocab", "extend-model", "audit-vocab", "eval"):
        return list(argv)
    for word in argv:
        if word.startswith("-"):
            option = word if word in REPEATED else ""
        elif option and words[-1] != option:
            words.append(option)
        words.append(word)
    return words
