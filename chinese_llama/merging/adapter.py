"""One adapter: found by what a user calls it, read, and told whether it can be merged at all. No torch here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chinese_llama import workspace
from chinese_llama.artifacts import ADAPTER_FILES, Manifest, identity, read_manifest
from chinese_llama.errors import BadFile, UserError, nearest
from chinese_llama.hub import is_hub_id, local
from chinese_llama.merging.registry import Published, registry

# init_lora_weights that leave the base as it is: before training, scale * B @ A is zero
KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
# What W + scale * B @ A does not describe: keys of adapter_config.json in PEFT, and why. (DoRA is merged;
# VeLoRA and MonteCLoRA change the training only.)
NOT_A_SUM = {
    "alora_invocation_tokens": "it is an aLoRA, which works only from certain tokens of a text on",
    "arrow_config": "Arrow chooses among adapters for every token",
    "kasa_config": "KaSA cuts singular values off the base weights",
    "layer_replication": "it repeats layers of the base, which the base does not have",
    "target_parameters": "it changes parameters that are no modules of their own",
    "use_bdlora": "BD-LoRA holds blocks instead of whole factors",
    "use_qalora": "QA-LoRA pools what comes in, over a base quantised in groups",
}


@dataclass
class Adapter:
    """One adapter of a plan: its name, directory, adapter_config.json and manifest (if it has one); what is
    published of it, if it is one of the registry; the weight that its delta is multiplied with."""

    name: str
    path: Path
    config: dict[str, Any]
    manifest: Manifest | None
    published: Published | None = None
    weight: float = 1.0

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
        roles = [role for role in inputs if re.fullmatch(r"parent:\d+", role)]
        return [inputs[role]["sha256"] for role in sorted(roles, key=lambda role: int(role[7:]))]

    @property
    def vocabulary(self) -> int | None:
        """Rows of the vocabulary that it was trained with, where the registry or its manifest tells."""
        if self.published:
            return self.published.tokenizer.pieces
        return self.manifest.vocab_size if self.manifest else None


@dataclass
class Step:
    """One adapter (method "sequence"); or several that share what lies below them, combined by `method`
    (linear, ties, dare_linear, dare_ties). `density` is the share of each delta that is kept, `seed` what
    DARE draws with."""

    adapters: list[Adapter]
    method: str = "sequence"
    density: float = 1.0
    seed: int = 0


def resolve(item: str, found: workspace.Workspace | None, root: Path | None = None) -> Adapter:
    """The adapter that `item` means: `name=directory`, a name of the workspace, a directory (relative to
    `root`, default: here), a name of the registry, or a hub id. Raises UserError saying which names exist,
    and where; BadFile for what cannot be merged."""
    adapter = _found(item, found, root or Path())
    recognise(adapter)
    check_mergeable(adapter)
    return adapter


def _found(item: str, found: workspace.Workspace | None, root: Path) -> Adapter:
    name, has_place, place = item.partition("=")
    if has_place and not (root / item).is_dir():
        if not (name.strip() and place.strip()):
            raise UserError(f"{item!r}: write name=directory.")
        return load(name.strip(), _place(place.strip(), root))
    own = found.adapters() if found else {}
    if item in own:
        return load(item, _own(item, own[item]))
    path = root / Path(item).expanduser()
    if path.is_dir():
        return load(path.resolve().name if path.name in ("", "..") else path.name, path)
    if published := registry().adapter(item):
        adapter = load(published.name, local(published.hub))
        adapter.published = published
        return adapter
    if is_hub_id(item) and not path.parent.exists():
        return load(item.split("/")[1], local(item))
    raise UserError(_unknown(item, own, found))


def _place(text: str, root: Path) -> Path:
    """A directory as it is written (relative to `root`), or the snapshot of a hub id."""
    path = root / Path(text).expanduser()
    return local(text) if is_hub_id(text) and not path.parent.exists() else path


def _own(name: str, place: str) -> Path:
    """The directory of the workspace's adapter `name`."""
    recipe = {"plus": "pt_lora", "alpaca": "sft_lora"}.get(name)
    if recipe and not Path(place).exists() and not is_hub_id(place):
        raise UserError(
            f"The adapter {name!r} is not trained yet ({place} does not exist); "
            f"train it with `accelerate launch recipes/{recipe}.py`."
        )
    return local(place)


def _unknown(item: str, own: dict[str, str], found: workspace.Workspace | None) -> str:
    here = f"{found.file} names {', '.join(own)}" if found else f"there is no {workspace.FILE} here"
    known = list(registry().adapters)
    return (
        f"No adapter {item!r}{nearest(item, [*own, *known])}: it is no directory, {here}, and the "
        f"registry of published adapters has {', '.join(known)}; or write name=directory."
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
    content = read_object(config)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise BadFile(config, f"is an adapter of type {kind}; only LORA adapters can be merged.")
    try:
        _check_config(content)
    except (ValueError, TypeError) as error:
        raise BadFile(config, f"{error}.") from error
    return Adapter(name, path, content, read_manifest(path))


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadFile."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise BadFile(file, f"is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise BadFile(file, "must hold a JSON object.")
    return content


def _check_config(content: dict[str, Any]) -> None:
    """Fill in PEFT's defaults, and raise ValueError or TypeError for what cannot be meant."""
    for key in ("r", "lora_alpha"):
        content.setdefault(key, 8)
        _number(key, content[key], whole=key == "r")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = content.get(key) or {}
        if not isinstance(patterns, dict):
            raise TypeError(f"{key} must be a mapping of names to numbers")
        for pattern, value in patterns.items():
            _number(f"{key}: {pattern}", value, whole=key == "rank_pattern")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{key}: {pattern!r} is no pattern ({error})") from error
    for key in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(content.get(key), (bool, type(None))):
            raise TypeError(f"{key} must be true or false, not {content[key]!r}")
    indices = content.get("trainable_token_indices") or []
    for ids in indices.values() if isinstance(indices, dict) else [indices]:
        if not (isinstance(ids, list) and all(isinstance(i, int) and i >= 0 for i in ids)):
            raise TypeError("trainable_token_indices must be lists of token ids")
        if len(set(ids)) < len(ids):
            raise ValueError("trainable_token_indices names a token id twice")


def _number(key: str, value: Any, whole: bool) -> None:
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits or not 0 <= value < 2**31 or (whole and value == 0):
        raise ValueError(f"{key} must be a {'whole ' if whole else ''}number, not {value!r}")


def recognise(adapter: Adapter) -> None:
    """Fill in what is published of an adapter whose adapter_model.bin is a published one, wherever it lies."""
    if adapter.published is None and adapter.file.suffix == ".bin":
        adapter.published = registry().by_sha256(identity(adapter.file))


def check_mergeable(adapter: Adapter) -> None:
    """Raise BadFile if its settings say that W + scale * B @ A on the base is not what was trained."""
    config = adapter.path / "adapter_config.json"
    for key, why in NOT_A_SUM.items():
        if adapter.config.get(key):
            raise BadFile(config, f"{why}; such an adapter cannot be merged ({key}).")
    init = adapter.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in KEEPS_BASE:
        raise BadFile(
            config,
            f"the adapter was initialised with {init!r}, which changes the base (only {', '.join(KEEPS_BASE)} do "
            "not); save it converted to plain LoRA (peft: path_initial_model_for_weight_conversion).",
        )
