"""What a path is: a model, an adapter, a tokenizer, data ... told by names, headers and published hashes.

Nothing here raises for bad content: what cannot be read is left out of the facts, and the checks tell why.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chinese_llama.artifacts import ADAPTER_FILES, Manifest, identity, read_manifest
from chinese_llama.data.formats import PATTERNS
from chinese_llama.directories import MANIFEST
from chinese_llama.errors import UserError
from chinese_llama.merging.adapter import read_object
from chinese_llama.merging.plan import load
from chinese_llama.merging.registry import Base, registry
from chinese_llama.workspace import FILE as WORKSPACE

Kind = Literal[
    "model", "adapter", "tokenizer", "data", "vocabulary", "meta checkpoint", "workspace", "unknown"
]
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# files that are a part of what lies in their directory
PARTS = (
    "config.json", "generation_config.json", "adapter_config.json", "params.json", MANIFEST, *ADAPTER_FILES,
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
MARKS = ("config.json", "params.json", WORKSPACE, "adapter_config.json", *ADAPTER_FILES, *TOKENIZER)
DEPTH = 6  # of directories in one another that are looked into
BESIDE = re.compile(r"(readme|license|notice|requirements.*)\.txt", re.IGNORECASE)  # no data
# a vocabulary that is no tokenizer of a model: SentencePiece's own, by the sha256 of the file
CHINESE_SP = "0f5f6f717181694ec2e1c9be4398e2db2e40a3902932325b06e12ad4cd64ac09"
UNREADABLE = (UserError, OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration)


@dataclass
class Thing:
    """`kind` and `title` (one line) say what a path is, `facts` what is known of it; `published`: the name in the
    registry of what it is a copy of, by sha256."""

    path: Path
    kind: Kind
    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    published: str | None = None


def recognise(path: Path) -> Thing:
    """What `path` is. A file that is part of a directory (weights, a config) stands for the directory."""
    path = Path(path)
    try:
        path = _whole(path)
        kind = _kind(path)
        return _READERS[kind](path)
    except PermissionError as error:
        return Thing(path, "unknown", "cannot be read", {"problem": error.strerror})
    except OSError as error:
        return Thing(path, "unknown", "cannot be read", {"problem": error.strerror or str(error)})


def _whole(path: Path) -> Path:
    """The directory that a file is a part of, where it is one; the snapshot in a directory of the hub's cache."""
    if path.is_dir():
        return _snapshot(path)
    weights = any(path.match(pattern) for pattern in (*WEIGHTS, "consolidated.*.pth"))
    if path.is_file() and path.name == MANIFEST:
        return path.parent
    if path.is_file() and (path.name in PARTS or weights) and _kind(path.parent) not in ("unknown", "data"):
        return path.parent
    return path


def _snapshot(path: Path) -> Path:
    """Of a directory of the hub's cache the snapshot that refs/main names, else the newest; else the directory
    itself (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    snapshots = sorted((path / "snapshots").glob("*/"), key=lambda place: place.stat().st_mtime)
    main = path / "refs" / "main"
    named = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    found = [place for place in snapshots if place.name == named]
    return (found or snapshots or [path])[-1]


def _kind(path: Path) -> Kind:
    """The kind of a directory, or of a file that stands for itself."""
    if not path.exists():
        return "unknown"
    if path.is_file():
        return _kind_of_file(path)
    files = [file for file in path.iterdir() if file.is_file()]
    names = {file.name for file in files}
    weights = any(
        file.match(pattern) for file in files for pattern in WEIGHTS if file.name not in ADAPTER_FILES
    )
    if "params.json" in names or (
        "config.json" not in names and any(file.match("consolidated.*.pth") for file in files)
    ):
        return "meta checkpoint"
    if "adapter_config.json" in names or names & set(ADAPTER_FILES):
        return "model" if weights and "config.json" in names else "adapter"
    if weights or "config.json" in names:
        return "model"
    if WORKSPACE in names:
        return "workspace"
    if names & set(TOKENIZER):
        return "tokenizer"
    if any(name.endswith(".model") for name in names):
        return "vocabulary"
    if MANIFEST in names:
        return "data"
    return "unknown" if _inside(path) or not any(map(_is_data, path.rglob("*"))) else "data"


def _inside(path: Path) -> list[str]:
    """What lies in a directory that is something, however deep: directories, and data beside them."""
    found = list(_walk(path, DEPTH))
    return [str(place) for place in found] if any(place.is_dir() for place in found) else []


def _walk(path: Path, depth: int) -> Iterator[Path]:
    places = [place for place in sorted(path.iterdir()) if not place.name.startswith(".")]
    # of the checkpoints of one run the last: they do not merge with one another
    steps = {int(place.name[11:]): place for place in places if re.fullmatch(r"checkpoint-\d+", place.name)}
    for place in [place for place in places if place not in steps.values() or place == steps[max(steps)]]:
        if not place.is_dir():
            if _is_data(place) and not BESIDE.fullmatch(place.name) and _is_list(place):
                yield place
        elif any((_snapshot(place) / mark).is_file() for mark in MARKS):
            yield _snapshot(place)
        elif depth and not place.is_symlink():
            yield from _walk(place, depth - 1)


def _is_list(file: Path) -> bool:
    """Whether a .json file may hold records, and no settings; other data may."""
    if file.suffix != ".json":
        return True
    with open(file, "rb") as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"["


def _kind_of_file(path: Path) -> Kind:
    if path.name == WORKSPACE:
        return "workspace"
    if path.name in TOKENIZER:
        return "tokenizer"
    if path.suffix == ".model":
        return "vocabulary"
    return "data" if _is_data(path) else "unknown"


def _is_data(file: Path) -> bool:
    return (
        any(file.match(pattern) for pattern in PATTERNS) and not file.name.startswith(".") and file.is_file()
    )


def _model(path: Path) -> Thing:
    config = _object(path / "config.json")
    facts = {
        "model_type": config.get("model_type"),
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "vocab_size": config.get("vocab_size"),
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "tied": bool(config.get("tie_word_embeddings")),
    }
    return _described(path, "model", facts, _published_base(path, facts["hidden_size"], facts["layers"]))


def _meta(path: Path) -> Thing:
    params = _object(path / "params.json")
    facts = {"layers": params.get("n_layers"), "hidden_size": params.get("dim")}
    facts["vocab_size"] = params.get("vocab_size") if params.get("vocab_size") != -1 else None
    return _described(
        path, "meta checkpoint", facts, _published_base(path, facts["hidden_size"], facts["layers"])
    )


def _adapter(path: Path) -> Thing:
    config = _object(path / "adapter_config.json")
    facts = {
        "type": config.get("peft_type"),
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
        "base": config.get("base_model_name_or_path"),
    }
    published = None
    from chinese_llama.model.adapters import whole_rows

    with contextlib.suppress(*UNREADABLE):
        file = next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
        found = registry().by_sha256(identity(file)) if file and file.suffix == ".bin" else None
        published = found.name if found else None
        facts["rows"] = whole_rows(load(path.name, path))
    return _described(path, "adapter", facts, published)


def _tokenizer(path: Path) -> Thing:
    return _described(path, "tokenizer", {}, published_tokenizer(path))


def _vocabulary(path: Path) -> Thing:
    return _described(path, "vocabulary", {}, published_tokenizer(path))


def _data(path: Path) -> Thing:
    return _described(path, "data", {})


def _workspace(path: Path) -> Thing:
    return _described(path, "workspace", {})


def _unknown(path: Path) -> Thing:
    if not path.exists():
        return Thing(path, "unknown", "does not exist")
    if path.is_file():
        return Thing(
            path, "unknown", f"a file of {path.stat().st_size:,} bytes of no known kind", {"file": True}
        )
    empty = not any(path.iterdir())
    title = "an empty directory" if empty else "a directory of no known kind"
    return Thing(path, "unknown", title, {"inside": _inside(path)})


_READERS: dict[Kind, Callable[[Path], Thing]] = {
    "model": _model,
    "meta checkpoint": _meta,
    "adapter": _adapter,
    "tokenizer": _tokenizer,
    "vocabulary": _vocabulary,
    "data": _data,
    "workspace": _workspace,
    "unknown": _unknown,
}


def _described(path: Path, kind: Kind, facts: dict[str, Any], published: str | None = None) -> Thing:
    """A thing with what its manifest says of it, and a title made of the facts."""
    if manifest := manifest_of(path):
        facts |= {"made_by": manifest.command, "made_of": manifest.kind}
    if kind in ("model", "meta checkpoint", "adapter"):
        tokenizer = [path / name for name in TOKENIZER[:2] if (path / name).is_file()]
        facts["tokenizer"] = published_tokenizer(path) or (tokenizer[0].name if tokenizer else None)
    return Thing(path, kind, _title(kind, facts, published), facts, published)


def _title(kind: Kind, facts: dict[str, Any], published: str | None) -> str:
    words = {
        "model": f"a model ({facts.get('model_type') or 'of no said type'})",
        "meta checkpoint": "a checkpoint in Meta's form",
        "adapter": f"a {str(facts.get('type') or 'PEFT').replace('LORA', 'LoRA')} adapter",
        "vocabulary": "a SentencePiece vocabulary",
        "data": "prepared data" if facts.get("made_by") else "data",
    }
    parts = [words.get(kind, f"a {kind}")]
    said = {
        "layers": "{} layers",
        "hidden_size": "hidden size {}",
        "vocab_size": "{:,} rows",
        "dtype": "{}",
        "r": "r {}",
        "alpha": "alpha {:g}",
        "rows": "{:,} rows of vocabulary",
        "base": "of {}",
    }
    for name, form in said.items():
        value = facts.get(name)
        if isinstance(value, (int, float)) or (isinstance(value, str) and value):
            parts.append(
                form.format(value) if "{}" in form or not isinstance(value, str) else f"{name} {value}"
            )
    parts += ["tied"] if facts.get("tied") else []
    parts += [f"made by {facts['made_by']}"] if facts.get("made_by") else []
    parts += [f"published as {published}"] if published else []
    return ", ".join(parts)


def manifest_of(path: Path) -> Manifest | None:
    """The manifest of a directory, None where there is none that can be read."""
    with contextlib.suppress(*UNREADABLE):
        return read_manifest(path) if path.is_dir() else None
    return None


def published_tokenizer(path: Path) -> str | None:
    """The registry's name of a tokenizer.model (in a directory, or the file) with a published sha256."""
    with contextlib.suppress(*UNREADABLE):
        files = [path] if path.is_file() else sorted(path.glob("*.model"))
        for file in files:
            if file.suffix == ".model":
                sha256 = identity(file)
                known = {entry.sha256: entry.name for entry in registry().tokenizers.values()}
                return (known | {CHINESE_SP: "chinese_sp.model"}).get(sha256)
    return None


def _published_base(path: Path, hidden: Any, layers: Any) -> str | None:
    """The registry's name of a base whose weight files have its sha256, in order. Hashed only where sizes, and the
    number of files, are those of one."""
    with contextlib.suppress(*UNREADABLE):
        for base in registry().bases.values():
            if (base.hidden_size, base.layers) == (hidden, layers) and _is_copy(path, base):
                return base.name
    return None


def _is_copy(path: Path, base: Base) -> bool:
    for pattern, published in (("consolidated.*.pth", base.meta), ("pytorch_model*.bin", base.huggingface)):
        files = sorted(path.glob(pattern))
        if len(files) == len(published) and all(map(_matches, files, published)):
            return True
    return False


def _matches(file: Path, sha256: str) -> bool:
    return identity(file) == sha256


def _object(file: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none."""
    with contextlib.suppress(*UNREADABLE):
        return read_object(file)
    return {}
