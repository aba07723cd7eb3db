"""The stage `merge` as a workspace runs it."""

from __future__ import annotations

from pathlib import Path

from chinese_llama.artifacts import Manifest
from chinese_llama.errors import UserError
from chinese_llama.hub import local
from chinese_llama.merging.plan import parse_list, resolve
from chinese_llama.merging.stream import merge
from chinese_llama.stages import Options, options_of
from chinese_llama.workspace import Workspace


def merged_model(workspace: Workspace, given: Options, force: bool) -> tuple[Path, Manifest]:
    """Run `merge` with the options `given` and the workspace's for the others; adapters are found by
    name (merging.plan.resolve)."""
    section = workspace.settings.merge
    options = options_of(workspace, section, (), given)
    names = parse_list(options.pop("loras", ",".join(map(workspace.item, section.loras))))
    found = workspace if workspace.file.is_file() else None
    options["adapters"] = [resolve(name, found) for name in names]
    if "base" not in given:
        options["base"] = workspace.path(workspace.settings.extend_model.output)
        if not options["base"].is_dir():
            raise UserError(
                f"{options['base']} does not exist; make it with chinese-llama extend-model, or give --base."
            )
    options["base"] = local(options["base"])
    return options["output"], merge(**options, force=force)
