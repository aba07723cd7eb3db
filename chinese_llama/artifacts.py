"""Manifests: what a directory is, what it was made from, and whether it still is what is asked for.

The manifest (`chinese_llama.json`) of a result names its inputs (sha256), its settings and figures.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from chinese_llama import __version__
from chinese_llama.directories import MANIFEST, check_output, write_text
from chinese_llama.errors import BadFile, OutputExists
from chinese_llama.progress import track

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass
class Manifest:
    """What a directory is and where it came from.

    `inputs` maps a role ("base", "tokenizer", "parent:0") to {"path", "sha256"}; `files` maps the
    names that make up the directory's identity to {"bytes", "mtime_ns", "sha256"}; `sha256` is the
    digest over those.
    """

    kind: str
    command: str
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    sha256: str = ""
    tool: str = f"chinese_llama {__version__}"
    created: str = ""

    def places(self) -> list[str]:
        """Where the inputs lie."""
        return [record["path"] for record in self.inputs.values()]


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of `directory`, None where there is none. Raises BadFile if it is damaged."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        known = Manifest.__dataclass_fields__
        return Manifest(**{key: value for key, value in raw.items() if key in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise BadFile(path, f"is not a manifest of this tool ({error})") from error


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Hash the identity files of `directory` into `manifest` and write it there."""
    manifest.files = {
        path.relative_to(directory).as_posix(): _file_record(path) for path in identity_files(directory)
    }
    manifest.sha256 = _digest(manifest.files)
    manifest.created = now()
    write_text(directory / MANIFEST, json.dumps(asdict(manifest), ensure_ascii=False, indent=1) + "\n")
    return manifest


def now() -> str:
    """The time in UTC, to the second, as manifests have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def identity_files(directory: Path) -> list[Path]:
    """The files whose bytes make `directory` what it is: an adapter, weights, or a tokenizer; all
    files below it where it is none of these (a corpus)."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    adapter = [name for name in names if name in ADAPTER_FILES]
    if adapter:
        return [directory / name for name in [*adapter, "adapter_config.json"] if name in names]
    weights = [name for name in names if name.endswith(".safetensors")]
    weights = weights or [n for n in names if n.startswith("pytorch_model") and n.endswith(".bin")]
    if weights:
        return [directory / name for name in weights]
    tokenizer = [name for name in names if name.startswith("tokenizer.") or name.endswith(".model")]
    if tokenizer:
        return [directory / name for name in tokenizer]
    return sorted(file for file in directory.rglob("*") if file.is_file() and file.name != MANIFEST)


def sha256_file(path: Path) -> str:
    """sha256 of the bytes of `path`, as 64 hex digits."""
    digest = hashlib.sha256()
    size = 1 << 20
    with open(path, "rb") as stream:
        blocks = iter(lambda: stream.read(size), b"")
        for block in track(blocks, f"hashing {path.name}", -(-path.stat().st_size // size), "MiB"):
            digest.update(block)
    return digest.hexdigest()


def identity(path: Path) -> str:
    """sha256 that names a file, or a directory by its identity files (see `identity_files`).

    Hashes recorded in a manifest are trusted for files whose size and modification time still
    are the recorded ones; a base without a manifest is read as a whole.
    """
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise BadFile(path, "no such file or directory.")
    manifest = read_manifest(path)
    known = manifest.files if manifest else {}
    records = {}
    for file in identity_files(path):
        name = file.relative_to(path).as_posix()
        record, stat = known.get(name), file.stat()
        if record and (record["bytes"], record["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            records[name] = record
        else:
            records[name] = _file_record(file)
    return _digest(records)


def input_record(path: Path) -> dict[str, str]:
    """What a manifest says of one input."""
    return {"path": str(path), "sha256": identity(path)}


def _file_record(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_file(path)}


def _digest(files: dict[str, dict[str, Any]]) -> str:
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


Keep = bool | Literal["inputs"]  # keep an output that stands; "inputs": made with any settings


def stands(target: Path, wanted: Manifest, force: bool, keep: Keep = True) -> bool:
    """True if `target` holds what `wanted` (inputs and settings) would make.

    With `keep` "inputs", settings may differ: whoever made it chose them. Raises OutputExists where
    something else is there, naming the first difference, unless `force`.
    """
    if force or not target.is_dir() or not any(target.iterdir()):
        return False
    found = read_manifest(target)
    if found is None:
        check_output(target, force)
        return False
    if difference := _difference(found, wanted, settings=keep is True):
        raise OutputExists(
            f"{target} was made {difference}; give another output, or make it again: {again(wanted.command)}."
        )
    return True


def again(command: str) -> str:
    """What to type to make the result of a workspace's command again."""
    if command.endswith("_lora"):
        return f"accelerate launch recipes/{command}.py --force true"
    return f"chinese-llama {command} --force"


def _difference(found: Manifest, wanted: Manifest, settings: bool) -> str:
    if found.command != wanted.command:
        return f"by another command ({found.command})"
    for role in sorted({*found.inputs, *wanted.inputs}):
        then, asked = found.inputs.get(role, {}), wanted.inputs.get(role, {})
        if then.get("sha256") != asked.get("sha256"):
            return (
                f"from another {role} than {asked['path']}"
                if asked
                else f"from a {role} ({then['path']}) too"
            )
    new = json.loads(json.dumps(wanted.settings))
    for name in sorted({*found.settings, *new}) if settings else ():
        if found.settings.get(name) != new.get(name):
            return f"with {name} {found.settings.get(name)}, and {new.get(name)} is asked for"
    return ""
