"""Manifests: what a directory is, what it was made from, and whether it still is what is asked for.

The manifest (`chinese_llama.json`) of a result names its inputs (sha256), its settings and figures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from chinese_llama import __version__
from chinese_llama.directories import MANIFEST, check_output, write_text
from chinese_llama.errors import BadFile, OutputExists, UserError
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
        manifest = Manifest(**{key: value for key, value in raw.items() if key in known})
        _check_manifest(manifest)
        return manifest
    except (ValueError, TypeError, AttributeError) as error:
        raise BadFile(path, f"is not a manifest of this tool ({error})") from error


def _check_manifest(manifest: Manifest) -> None:
    """Raise TypeError where a part is not of the kind that all readers take it for."""
    for name in ("inputs", "settings", "metrics", "files"):
        if not isinstance(getattr(manifest, name), dict):
            raise TypeError(f"{name} is no mapping")
    for name, keys in (("inputs", {"path", "sha256"}), ("files", {"bytes", "mtime_ns"})):
        for entry, record in getattr(manifest, name).items():
            if not isinstance(record, dict) or not keys <= set(record):
                raise TypeError(f"{name}: {entry} lacks {' or '.join(sorted(keys))}")


def write_manifest(
    directory: Path, manifest: Manifest, known: Mapping[str, dict[str, str]] | None = None
) -> Manifest:
    """Hash the identity files of `directory` into `manifest` and write it there. Files whose hashes are
    `known` by name ({"sha256": ...} or {"xxh3_128": ...}) are not read; without all sha256, the one of the
    directory is left open, until something is made of it."""
    manifest.files = {}
    for path in identity_files(directory):
        name = path.relative_to(directory).as_posix()
        manifest.files[name] = _file_record(path, (known or {}).get(name))
    if all("sha256" in record for record in manifest.files.values()):
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
    weights = weights or [n for n in names if n.startswith("consolidated.") and n.endswith(".pth")]
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


LARGE = 64 << 20  # bytes that take a while to hash
_hashed: dict[str, Future[str]] = {}
_guard = threading.Lock()


def _sha256_once(path: Path) -> str:
    """`sha256_file`, once for each file as long as it stays as it is; that of a large one is remembered in
    the user's cache directory."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    with _guard:
        future, mine = _hashed.get(key), key not in _hashed
        if future is None:
            future = _hashed[key] = Future()
    if mine:
        try:
            settled = time.time() - stat.st_mtime > 2  # not just being written
            keep = stat.st_size >= LARGE and settled
            future.set_result(_remembered(key, path) if keep else sha256_file(path))
        except BaseException as error:
            del _hashed[key]
            future.set_exception(error)
    return future.result()


def _remembered(key: str, path: Path) -> str:
    """The sha256 of `path`, which `key` describes, from the cache directory; put there if it is not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chinese_llama" / "sha256"
    file = cache / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError):
        known = file.read_text()
        if len(known) == 64:
            return known
    digest = sha256_file(path)
    with contextlib.suppress(OSError, UserError):
        cache.mkdir(parents=True, exist_ok=True)
        write_text(file, digest)
    return digest


def hash_ahead(paths: Iterable[Path]) -> None:
    """Begin to compute what `identity` of these paths will ask for, while other work goes on."""

    def run(path: Path) -> None:
        with contextlib.suppress(Exception):  # whoever asks for it meets it again
            identity(path)

    for path in paths:
        threading.Thread(target=run, args=(path,), daemon=True).start()


def identity(path: Path) -> str:
    """sha256 that names a file, or a directory by its identity files (see `identity_files`).

    Hashes recorded in a manifest are trusted for files whose size and modification time still
    are the recorded ones; a base without a manifest is read as a whole.
    """
    path = Path(path)
    if path.is_file():
        return _sha256_once(path)
    if not path.is_dir():
        raise BadFile(path, "no such file or directory.")
    manifest = read_manifest(path)
    known = manifest.files if manifest else {}
    records = {}
    for file in identity_files(path):
        name = file.relative_to(path).as_posix()
        record, stat = known.get(name), file.stat()
        if (
            record
            and "sha256" in record
            and (record["bytes"], record["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        ):
            records[name] = record
        else:
            records[name] = _file_record(file)
    return _digest(records)


def input_record(path: Path) -> dict[str, str]:
    """What a manifest says of one input; the identity of a model is that of its weights, `config` is told apart."""
    record = {"path": str(Path(path).absolute()), "sha256": identity(path)}
    config = Path(path) / "config.json"
    return record | ({"config": _sha256_once(config)} if config.is_file() else {})


def _file_record(path: Path, hashes: dict[str, str] | None = None) -> dict[str, Any]:
    stat = path.stat()
    hashes = hashes or {"sha256": _sha256_once(path)}
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, **hashes}


def _digest(files: dict[str, dict[str, Any]]) -> str:
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


Keep = bool | Literal["inputs", "ask"]  # keep what stands; "inputs": whatever the settings; "ask": see Asked


class Asked(Exception):
    """What `stands` found, where it was only asked: nothing is made. `state` and `why` are those of `state_of`."""

    def __init__(self, state: str, why: str) -> None:
        super().__init__(f"{state} {why}".strip())
        self.state, self.why = state, why


def stands(target: Path, wanted: Manifest, force: bool, keep: Keep = True) -> bool:
    """True if `target` holds what `wanted` (inputs and settings) would make.

    With `keep` "inputs", settings may differ: whoever made it chose them. Raises OutputExists where
    something else is there, naming the first difference, unless `force`; Asked with `keep` "ask".
    """
    if keep == "ask":
        raise Asked(*state_of(target, wanted))
    if force:
        return False
    state, why = state_of(target, wanted, settings=keep is True)
    if state == "stale":
        raise OutputExists(
            f"{target} was made {why}; give another output, or make it again: {again(wanted.command)}."
        )
    return state == "stands"


def state_of(target: Path, wanted: Manifest, settings: bool = True) -> tuple[str, str]:
    """ "missing", "stands" or "stale" of an output, and how a stale one "was made". Raises OutputExists for what this
    tool has not made."""
    if not target.is_dir() or not any(target.iterdir()):
        return "missing", ""
    found = read_manifest(target)
    if found is None:
        check_output(target, False)
        return "missing", ""
    why = _difference(found, wanted, settings) or _damage(target, found)
    return ("stale", why) if why else ("stands", "")


def _damage(target: Path, manifest: Manifest) -> str:
    for name, record in manifest.files.items():
        file = target / name
        if not file.is_file() or not _is_recorded(file, record):
            return f"whole, but its {name} has been {'changed' if file.is_file() else 'removed'} since"
    return ""


def _is_recorded(file: Path, record: dict[str, Any]) -> bool:
    """Whether a file has the bytes that its manifest tells of; one that was copied or touched is read."""
    stat = file.stat()
    if stat.st_size != record["bytes"] or stat.st_mtime_ns == record["mtime_ns"]:
        return stat.st_size == record["bytes"]
    return "sha256" not in record or _sha256_once(file) == record["sha256"]


def again(command: str) -> str:
    """What to type to make the result of a workspace's command again."""
    if command.endswith("_lora"):
        return f"accelerate launch recipes/{command}.py --force true"
    return f"chinese-llama {command}{' --only eval' if command == 'adapt' else ''} --force"


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
        if "config" in then and then["config"] != asked.get("config"):  # earlier versions did not record it
            return f"from a {role} with another config.json than that in {asked['path']}"
    new = json.loads(json.dumps(wanted.settings))
    for name in sorted({*found.settings, *new}) if settings else ():
        if found.settings.get(name) != new.get(name):
            had, wants = (_shortened(one.get(name)) for one in (found.settings, new))
            return f"with {name} {had}, and {wants} is asked for"
    return ""


def _shortened(value: Any) -> str:
    """A setting as it is told: a whole chat template is not."""
    said = str(value)
    return said if len(said) <= 60 else said[:57] + "..."
