"""Whether all of a workspace stands just as it did when `adapt` last saw it stand, told from files' times and sizes,
without the libraries that the stages load, which take seconds. Where it cannot be told, every stage is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chinese_llama.adapt import launch
from chinese_llama.adapt.plan import REMEMBERED, Stage
from chinese_llama.artifacts import read_manifest
from chinese_llama.directories import write_text
from chinese_llama.errors import UserError
from chinese_llama.hub import is_hub_id
from chinese_llama.resources import PACKAGE
from chinese_llama.workspace import Workspace

SEAL = "stands"  # beside what `eval` remembers


def settled(space: Workspace, found: list[Stage]) -> bool:
    """Whether `settle` was called on this workspace as it is now."""
    with contextlib.suppress(OSError, UserError):
        return _seal(space).read_text(encoding="utf-8") == _digest(space, found)
    return False


def settle(space: Workspace, found: list[Stage]) -> None:
    """Remember that all stages of this workspace stand, where that can be told from files alone."""
    with contextlib.suppress(OSError, UserError):
        digest, seal = _digest(space, found), _seal(space)
        if digest and not (seal.is_file() and seal.read_text(encoding="utf-8") == digest):
            seal.parent.mkdir(parents=True, exist_ok=True)
            write_text(seal, digest)


def _seal(space: Workspace) -> Path:
    return space.path(space.settings.eval.output).with_name(REMEMBERED) / SEAL


def _digest(space: Workspace, found: list[Stage]) -> str | None:
    """sha256 over the settings and all files that the stages' states depend on, each by its times and size; None where
    a stage has made nothing, or something lies on the hub."""
    settings = dataclasses.asdict(space.settings)
    places = {PACKAGE, *(stage.output for stage in found)}
    for stage in found:
        manifest = read_manifest(stage.output)
        if manifest is None or is_hub_id(space.base()):
            return None
        places |= {Path(place) for place in manifest.places()}
    places |= {
        path for text in _texts(settings) if (path := space.path(text.partition("=")[2] or text)).exists()
    }
    places |= {launch.script(name, space) for name in ("pt_lora", "sft_lora")}
    if file := launch.launch_file(space):
        places.add(file)
    if (torch := importlib.util.find_spec("torch")) and torch.origin:
        places.add(Path(torch.origin))
    if not all(place.exists() for place in places):
        return None
    gpus = [os.environ.get("CUDA_VISIBLE_DEVICES"), *sorted(map(str, Path("/dev").glob("nvidia*")))]
    told = [str(space.file), settings, [stage.name for stage in found], gpus]
    told += [_described(place) for place in sorted(places)]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def _texts(value: Any) -> Iterator[str]:
    """All texts in settings: paths are among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _described(place: Path) -> list[Any]:
    """A file, or all files in a directory, by name, inode, size and times."""
    if place.is_dir():
        files = sorted(
            Path(folder, name)
            for folder, inner, names in os.walk(place, followlinks=True)
            for name in names
            if not folder.endswith("__pycache__")
        )
    else:
        files = [place]
    stats = [(str(file), file.stat()) for file in files]
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]
