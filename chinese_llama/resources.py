"""Where the project's data lies: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path:
    """The folder `recipes`, `vocab` or `merge`, wherever the package is installed."""
    inside = PACKAGE / "shipped" / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def place_recipes(directory: Path) -> None:
    """Put a copy of recipes/ into a workspace that has none, so that `accelerate launch
    recipes/pt_lora.py` works there as typed."""
    if not (directory / "recipes").exists():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(shipped("recipes"), directory / "recipes", ignore=ignored)
