"""Which adapters, from where, in which order: settled before any tensor is read. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chinese_llama import workspace
from chinese_llama.artifacts import ADAPTER_FILES, Manifest, identity, read_manifest
from chinese_llama.config import load_yaml
from chinese_llama.errors import BadFile, DoesNotFit, UserError, nearest
from chinese_llama.hub import is_hub_id, local
from chinese_llama.resources import shipped


@dataclass
class Adapter:
    """One adapter of a plan: its name, directory, adapter_config.json and manifest (if it has one)."""

    name: str
    path: Path
    config: dict[str, Any]
    manifest: Manifest | None
    published: dict[str, Any] | None = None  # its entry in the registry

    @property
    def file(self) -> Path:
        """The file with the tensors."""
        return next(self.path / name for name in ADAPTER_FILES if (self.path / name).is_file())

    @property
    def tokenizer(self) -> Path | None:
        """The directory of the tokenizer that travels with the adapter."""
        names = ("tokenizer.model", "tokenizer.json")
        return self.path if any((self.path / name).is_file() for name in names) else None

    @property
    def parents(self) -> list[str]:
        """sha256 of the adapters that were baked in below this one while it was trained."""
        inputs = self.manifest.inputs if self.manifest else {}
        roles = [role for role in inputs if role.startswith("parent:")]
        return [inputs[role]["sha256"] for role in sorted(roles, key=lambda role: int(role[7:]))]


def parse_list(text: str) -> list[str]:
    """The items of `--loras a,b,name=dir`. Raises UserError for an empty or repeated item."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UserError(f"--loras {text!r}: an item is empty; write names or directories with commas.")
    if len(set(items)) < len(items):
        raise UserError(f"--loras {text!r}: an adapter is given twice.")
    return items


def resolve(item: str, found: workspace.Workspace | None) -> Adapter:
    """The adapter that `item` means: `name=directory`, a name of the workspace, a directory, a name
    of the registry, or a hub id. Raises UserError saying which names exist, and where."""
    name, has_place, place = item.partition("=")
    if has_place:
        return load(name, local(place))
    own = found.adapters() if found else {}
    if item in own:
        path = Path(own[item])
        if found and item in ("plus", "alpaca") and not path.exists() and not is_hub_id(own[item]):
            recipe = {"plus": "pt_lora", "alpaca": "sft_lora"}[item]
            raise UserError(
                f"The adapter {item!r} is not trained yet ({path} does not exist); "
                f"train it with `accelerate launch recipes/{recipe}.py`."
            )
        return load(item, local(own[item]))
    if Path(item).is_dir():
        return load(Path(item).name, Path(item))
    registry = load_yaml(shipped("merge") / "adapters.yaml")
    hubs = {entry["hub"]: name for name, entry in registry.items()}
    if item in registry or item in hubs:
        published = item if item in registry else hubs[item]
        adapter = load(published, local(registry[published]["hub"]))
        adapter.published = registry[published]
        return adapter
    if is_hub_id(item):
        return load(item.split("/")[1], local(item))
    raise UserError(_unknown(item, own, list(registry), found))


def _unknown(item: str, own: dict[str, str], registry: list[str], found: Any) -> str:
    here = f"{found.file} names {', '.join(own)}" if found else f"there is no {workspace.FILE} here"
    return (
        f"No adapter {item!r}{nearest(item, [*own, *registry])}: it is no directory, {here}, and the "
        f"registry of published adapters has {', '.join(registry)}; or write name=directory."
    )


def load(name: str, path: Path) -> Adapter:
    """Read what an adapter directory says of itself. Raises BadFile where it is no LoRA adapter."""
    if not path.is_dir():
        raise BadFile(path, f"no such directory (adapter {name!r}).")
    config = path / "adapter_config.json"
    if not config.is_file():
        raise BadFile(path, "is not an adapter (no adapter_config.json).")
    if not any((path / file).is_file() for file in ADAPTER_FILES):
        raise BadFile(path, "has no adapter_model.safetensors or adapter_model.bin.")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFile(config, f"is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise BadFile(config, "must hold a JSON object.")
    kind = content.get("peft_type")
    if kind != "LORA":
        raise BadFile(config, f"is an adapter of type {kind}; only LORA adapters can be merged.")
    return Adapter(name, path, content, read_manifest(path))


def check_lineage(base: Path, adapters: list[Adapter]) -> None:
    """Raise DoesNotFit if a manifest says that an adapter belongs to another base or another place
    in the order. Adapters without a manifest are checked by their tensors only."""
    digests: dict[str, str] = {}
    for position, adapter in enumerate(adapters):
        digest = identity(adapter.path)
        if digest in digests:
            raise DoesNotFit(f"The adapters {digests[digest]!r} and {adapter.name!r} are the same one.")
        digests[digest] = adapter.name
        _check_published(adapter, [other.name for other in adapters[:position]])
        if adapter.manifest is None:
            continue
        _check_base(base, adapter)
        if adapter.parents != list(digests)[:position]:
            raise DoesNotFit(_wrong_order(adapter, adapters))


def _check_published(adapter: Adapter, below: list[str]) -> None:
    needed = adapter.published["after"] if adapter.published else below
    if below != needed:
        raise DoesNotFit(
            f"The adapter {adapter.name!r} must be merged {'after ' + ', '.join(needed) if needed else 'first'}: "
            f"--loras {','.join([*needed, adapter.name])}."
        )


def _check_base(base: Path, adapter: Adapter) -> None:
    trained_on = adapter.manifest.inputs.get("base") if adapter.manifest else None
    if trained_on and trained_on["sha256"] and trained_on["sha256"] != identity(base):
        raise DoesNotFit(
            f"The adapter {adapter.name!r} was trained on another base ({trained_on['path']}), not on {base}."
        )


def _wrong_order(adapter: Adapter, adapters: list[Adapter]) -> str:
    names = {identity(other.path): other.name for other in adapters}
    places = adapter.manifest.inputs if adapter.manifest else {}
    parents = [(sha, places[f"parent:{i}"]["path"]) for i, sha in enumerate(adapter.parents)]
    if not parents:
        return f"The adapter {adapter.name!r} was trained on the bare base; it must come first in --loras."
    below = [names.get(sha, path) for sha, path in parents]
    return (
        f"The adapter {adapter.name!r} was trained on top of {', '.join(below)}, and must be merged right "
        f"after: --loras {','.join([*below, adapter.name])}."
    )
