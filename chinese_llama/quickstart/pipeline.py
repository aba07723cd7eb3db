"""The main job at toy size: a toy base, and every stage with the code that real runs use."""

from __future__ import annotations

import shutil
from pathlib import Path

from chinese_llama.directories import write_text
from chinese_llama.errors import OutputExists, UserError
from chinese_llama.progress import say
from chinese_llama.resources import PACKAGE, place_recipes
from chinese_llama.workspace import FILE, Workspace

RESOURCES = PACKAGE / "quickstart"
FOLDER = Path("quickstart")


def make(directory: Path, force: bool = False) -> Workspace:
    """A workspace in `directory` with its texts and its base, ready for `adapt`. What stands is kept. Raises
    UserError."""
    _place(directory)
    space = Workspace(directory / FILE)
    from chinese_llama.model.load import quiet_libraries
    from chinese_llama.quickstart.base import make_base

    quiet_libraries()
    base = Path(space.base())
    say(f"base: a tiny LLaMA in {base}")
    make_base(directory / FOLDER / "text" / "en.jsonl", base, force)
    return space


def _place(directory: Path) -> None:
    """Write the workspace file and the texts, unless they are there already."""
    file, ours = directory / FILE, (RESOURCES / FILE).read_text(encoding="utf-8")
    if file.is_file() and file.read_text(encoding="utf-8") != ours:
        raise OutputExists(f"{file} is another workspace; run quickstart in another directory.")
    with_text = directory / FOLDER / "text"
    try:
        with_text.mkdir(parents=True, exist_ok=True)
        for source in sorted((RESOURCES / "text").iterdir()):
            shutil.copyfile(source, with_text / source.name)
        place_recipes(directory)
    except OSError as error:
        raise UserError(f"{with_text} cannot be written ({error.strerror}).") from error
    write_text(file, ours)
