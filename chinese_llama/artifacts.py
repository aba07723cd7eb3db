"""Directories that the stages write and read: whole or not at all, with a manifest inside.

A stage writes into a hidden directory beside its target, which is synced to disk and renamed when
everything is there. The manifest (`chinese_llama.json`) says what the directory is, which inputs it
was made from (sha256), with which settings, and what was measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chinese_llama import __version__
from chinese_llama.errors import BadFile, OutputExists, UserError
from chinese_llama.progress import track

MANIFEST = "chinese_llama.json"
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


def stands(target: Path, wanted: Manifest, force: bool) -> bool:
    """True if `target` holds what `wanted` (inputs and settings) would make.

    Raises OutputExists where something else is there, naming the first difference, unless `force`.
    """
    if force or not target.is_dir() or not any(target.iterdir()):
        return False
    found = read_manifest(target)
    if found is None:
        check_output(target, force)
        return False
    difference = _difference(found, wanted)
    if difference:
        raise OutputExists(
            f"{target} was made with another {difference}; --force makes it again, or give another output."
        )
    return True


def again(command: str) -> str:
    """What to type to make the result of a workspace's command again."""
    if command.endswith("_lora"):
        return f"accelerate launch recipes/{command}.py --force true"
    return f"chinese-llama {command} --force"


def _difference(found: Manifest, wanted: Manifest) -> str:
    if found.command != wanted.command:
        return f"command ({found.command})"
    for role in sorted({*found.inputs, *wanted.inputs}):
        hashes = [made.inputs.get(role, {}).get("sha256") for made in (found, wanted)]
        if hashes[0] != hashes[1]:
            return f"input '{role}'"
    settings = json.loads(json.dumps(wanted.settings))
    for name in sorted({*found.settings, *settings}):
        if found.settings.get(name) != settings.get(name):
            return f"setting {name} ({found.settings.get(name)} there, {settings.get(name)} asked)"
    return ""


def check_output(target: Path, force: bool) -> None:
    """Raise OutputExists if `target` is there (an empty directory is not), unless `force`.

    With `force`, what may be replaced is a result of this tool or a directory of files only, never
    the current directory or one above it.
    """
    try:
        target.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(target, error) from error
    if target.is_file():
        raise OutputExists(f"{target} is a file; give a directory that does not exist yet.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise OutputExists(f"{target} exists; --force replaces it, or give another output directory.")
    ours = (target / MANIFEST).is_file()
    here = Path.cwd().is_relative_to(target.resolve())
    if here or not (ours or all(path.is_file() for path in target.iterdir())):
        raise OutputExists(
            f"{target} holds more than a result of this tool; remove it yourself, or give another output."
        )


@contextlib.contextmanager
def new_directory(target: Path, force: bool = False) -> Iterator[Path]:
    """A directory to write into that becomes `target` when the block ends, or vanishes if it fails.

    Raises OutputExists (see `check_output`) and UserError where nothing can be written. A target
    that `force` replaces stays until the new one is complete.
    """
    target = Path(os.path.abspath(target))
    check_output(target, force)
    created = _make_parents(target)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        try:
            _remove_stale(target)
            partial.mkdir()
        except OSError as error:
            raise _unwritable(target, error) from error
        yield partial
        _sync_tree(partial)
        _replace(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise UserError(f"{target}: the disk is full; nothing was written.") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written ({error.strerror}).") from error
        raise


def _make_parents(target: Path) -> list[Path]:
    """Make the parents of `target`; return those that were missing, deepest first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    return missing


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(f"{target} cannot be written ({error.strerror}); give a writable output.")


def _remove_stale(target: Path) -> None:
    """Remove what killed runs of this tool left beside `target`; put back what one had moved aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.(partial|old)")
    for left in list(target.parent.iterdir()):
        match = pattern.fullmatch(left.name)
        if not match or _alive(int(match[1])):
            continue
        kind = match[2]
        if kind == "old" and not target.exists():
            os.rename(left, target)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


def _alive(pid: int) -> bool:
    """True for another process that runs; this one leaves nothing behind that it still needs."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(directory: Path) -> None:
    """Flush all files to disk; give them the usual permissions (safetensors writes 0600)."""
    os.umask(mask := os.umask(0o022))
    for root, _, names in os.walk(directory):
        for name in names:
            (Path(root) / name).chmod(0o666 & ~mask)
        for name in [*names, "."]:
            _sync(Path(root) / name)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; an old target is moved aside first and then removed."""
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    if target.exists() or target.is_symlink():
        os.rename(target, old)
    os.rename(partial, target)
    _sync(target.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)
