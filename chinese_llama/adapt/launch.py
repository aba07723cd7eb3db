"""The recipes as `adapt` runs them: in processes of their own, through accelerate."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import psutil

from chinese_llama.errors import BadFile, Interrupted, UserError
from chinese_llama.progress import say
from chinese_llama.resources import shipped
from chinese_llama.workspace import Workspace


def script(name: str, space: Workspace | None = None) -> Path:
    """The file of a recipe: the workspace's own copy, else the one that comes along."""
    own = space.file.parent / "recipes" / f"{name}.py" if space else None
    return own if own and own.is_file() else shipped("recipes") / f"{name}.py"


def recipe(name: str, space: Workspace | None = None) -> ModuleType:
    """A recipe as a module: its `main` and its `DEFAULTS`. Raises BadFile for an edited one that does not load."""
    path = script(name, space)
    loaded = ModuleType(f"chinese_llama_recipe_{name}")
    loaded.__file__ = str(path)
    try:  # not as an import, which would leave a __pycache__ beside it
        exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), loaded.__dict__)
        if isinstance(loaded.DEFAULTS, dict):
            return loaded
        what = "its DEFAULTS are no dict"
    except Exception as error:  # whatever the code in it raises
        what = f"{type(error).__name__}: {error}"
    raise BadFile(
        path, f"does not load as a recipe ({what}); mend it, or remove it to use the one that comes along."
    )


def launch_file(space: Workspace) -> Path | None:
    """accelerate's configuration file that the workspace names. Raises BadFile where there is none."""
    if not space.settings.launch:
        return None
    named = space.settings.launch
    file = space.path(named)
    ours = shipped("recipes").parent / named  # recipes/launch/... of a workspace without a copy of recipes/
    file = file if file.is_file() or not named.startswith("recipes/") else ours
    if not file.is_file():
        raise BadFile(file, "no such file (`launch:` is accelerate's configuration file).")
    return file


def train(space: Workspace, name: str, argv: Sequence[str]) -> None:
    """Run `accelerate launch` of a recipe with the workspace's settings and `argv`, until it ends.

    Stopped (Ctrl-C, SIGTERM), it tells the recipe's processes, waits for their checkpoint and raises Interrupted.
    Raises UserError where the recipe fails; it has told why.
    """
    words = [sys.executable, "-m", "chinese_llama.adapt.accelerated", "--quiet", *_options(space)]
    words += [str(script(name, space)), "--workspace", str(space.file), *argv]
    # Ctrl-C in a terminal goes to a whole session: in another one, the launcher does not die before its children.
    # What it prints is no result of `adapt`: to stderr.
    process = subprocess.Popen(words, cwd=space.file.parent, start_new_session=True, stdout=2)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        _stop(process)
        raise Interrupted(f"Stopped in {name}; the same command goes on from its last checkpoint.") from None
    if code:
        raise UserError(
            f"{name} ended with an error (see above); when it is mended, the same command goes on."
        )


def _options(space: Workspace) -> list[str]:
    """What accelerate is told: the workspace's file; else the user's own configuration; else all GPUs of this
    machine."""
    if file := launch_file(space):
        return ["--config_file", str(file)]
    from accelerate.commands.config.config_args import default_config_file

    if Path(default_config_file).is_file():
        return []
    import torch

    processes = max(1, torch.cuda.device_count())
    words = ["--num_processes", str(processes), "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*words, "--multi_gpu"] if processes > 1 else words


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End what the launcher started (not what that started in turn: workers that load data) and wait."""
    try:
        started = psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return
    try:
        for child in started or [process]:
            child.terminate()
        with contextlib.suppress(OSError):  # the terminal may be gone
            say("Stopping; a checkpoint is written first (again Ctrl-C: without one).")
        process.wait()
    except psutil.NoSuchProcess:
        process.wait()
    except KeyboardInterrupt:
        for child in started:
            child.kill()
        process.kill()
        process.wait()
