"""Outputs that appear whole or not at all.

A stage writes into a hidden directory beside its target, which is synced to disk and renamed when
everything is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from chinese_llama.errors import Interrupted, OutputExists, UserError

FULL = ("No space left", "File too large", "Disk quota", "PytorchStreamWriter failed", "unexpected pos")
MANIFEST = "chinese_llama.json"  # what marks a directory as a result of this tool


def check_output(target: Path, force: bool) -> None:
    """Raise OutputExists if `target` is there (an empty directory is not), unless `force`.

    With `force`, what may be replaced is a result of this tool (its manifest says so), never the current
    directory or one above it.
    """
    try:
        target.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(target, error) from error
    if target.is_file():
        raise OutputExists(f"{target} is a file; give a directory that does not exist yet.")
    if os.path.ismount(target):
        raise OutputExists(f"{target} is a mount point, which cannot be replaced; give a directory in it.")
    if target.is_dir() and Path.cwd().is_relative_to(target.resolve()):
        raise OutputExists(f"{target} is the directory that you are in; give another output directory.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise OutputExists(f"{target} exists; --force replaces it, or give another output directory.")
    if not (target / MANIFEST).is_file():
        raise OutputExists(
            f"{target} is no result of this tool, which --force would replace; remove it yourself, or give "
            "another output."
        )


def check_apart(target: Path, inputs: Iterable[Path | str]) -> None:
    """Raise UserError if `target` is one of the `inputs` or holds one: it would be replaced by what is
    made from it."""
    whole = Path(target).resolve()
    for given in inputs:
        if Path(given).resolve().is_relative_to(whole):
            raise UserError(f"{target} is or holds an input of this command ({given}); give another output.")


@contextlib.contextmanager
def new_directory(
    target: Path, force: bool = False, inputs: Iterable[Path | str] = (), resume: bool | None = None
) -> Iterator[Path]:
    """A directory to write into that becomes `target` when the block ends, or vanishes if it fails.

    With `resume`, which tells of work that can be resumed, it stays beside `target` if the work is stopped
    (KeyboardInterrupt, Interrupted); if true, it begins as what stopped or killed work left there.

    Raises OutputExists (see `check_output`), UserError if it would replace one of the `inputs`, and UserError where nothing can be written. A target
    that `force` replaces stays until the new one is complete.
    """
    target = whole_path(target)
    check_apart(target, inputs)
    check_output(target, force)
    created = _make_parents(target)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    lock = None
    try:
        try:
            left = _clear_stale(target, adopt=resume is True)
            os.rename(left, partial) if left else partial.mkdir()
            lock = _locked(partial)
        except FileExistsError as error:
            raise UserError(
                f"{target} is being written by another process; wait, or give another output."
            ) from error
        except OSError as error:
            raise _unwritable(target, error) from error
        stood = target.exists()
        yield partial
        sync_tree(partial)
        if not stood:
            check_output(target, force)  # it may have appeared meanwhile
        _replace(partial, target)
    except BaseException as error:
        if resume is not None and isinstance(error, (KeyboardInterrupt, Interrupted)):
            raise
        if lock is not None:  # else it is another process's
            shutil.rmtree(partial, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if disk_is_full(error):
            raise UserError(f"{target}: the disk is full; nothing was written.") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def whole_path(target: Path) -> Path:
    """`target` from the root; where it is a link to a directory, that directory, which then is replaced."""
    target = Path(os.path.abspath(target))
    return target.resolve() if os.path.islink(target) and target.is_dir() else target


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that of a disk that takes no more.

    torch and safetensors tell it in words of their own.
    """
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(sign in str(error) for sign in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_space(target: Path, needed: int) -> None:
    """Raise UserError if the disk of `target` has less than `needed` bytes free. What killed runs left beside it
    counts as free: `new_directory` begins with it, or removes it."""
    target = whole_path(target)
    place = next(parent for parent in [target, *target.parents] if parent.is_dir())
    left = _stale(target)["partial"] if target.parent.is_dir() else []
    needed -= sum(file.lstat().st_size for part in left for file in part.rglob("*"))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{target}: {needed / 1e9:,.1f} GB are to be written, and the disk has {free / 1e9:,.1f} GB free; free "
            "some, or give an output on another disk."
        )


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


def _clear_stale(target: Path, adopt: bool) -> Path | None:
    """Remove what killed runs of this tool left beside `target`, and put back what one had moved aside. With
    `adopt`, the newest unfinished directory among it is returned instead."""
    stale = _stale(target)
    for old in stale["old"]:
        if not target.exists():
            os.rename(old, target)
    unfinished = [left for left in stale["partial"] if left.is_dir() and not left.is_symlink()]
    adopted = max(unfinished, key=lambda left: left.stat().st_mtime_ns) if adopt and unfinished else None
    for left in [*stale["partial"], *stale["old"]]:
        if left.is_dir() and not left.is_symlink():
            if left != adopted:
                shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return adopted


def _stale(target: Path) -> dict[str, list[Path]]:
    """What killed runs left beside `target`: "partial", unfinished, and "old", moved aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.(partial|old)")
    stale: dict[str, list[Path]] = {"partial": [], "old": []}
    for left in target.parent.iterdir():
        match = pattern.fullmatch(left.name)
        if match and _abandoned(left):
            stale[match[1]].append(left)
    return stale


def _locked(directory: Path) -> int:
    """A handle that locks a directory for as long as it is open, and this process lives. Process numbers do not tell:
    in containers two processes have the same. Raises BlockingIOError if it is locked."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Work in a directory in which no other process works. Raises UserError where one does."""
    try:
        lock = _locked(directory)
    except BlockingIOError as error:
        raise UserError(f"Another process works in {directory}; wait for it, or stop it.") from error
    try:
        yield
    finally:
        os.close(lock)


def empty(directory: Path) -> None:
    """Remove what is in a directory."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _abandoned(place: Path) -> bool:
    """Whether no process works in a directory (what is no directory was left by nobody who still needs it)."""
    try:
        os.close(_locked(place))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def sync_tree(directory: Path) -> None:
    """Flush all files to disk; give them the usual permissions (safetensors writes 0600)."""
    os.umask(mask := os.umask(0o022))
    for root, _, names in os.walk(directory):
        for name in names:
            (Path(root) / name).chmod(0o666 & ~mask)
        for name in [*names, "."]:
            sync(Path(root) / name)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; an old target is moved aside first and then removed."""
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    lock = (
        _locked(target) if target.is_dir() and not target.is_symlink() else None
    )  # nobody else puts it back
    try:
        if target.exists() or target.is_symlink():
            os.rename(target, old)
        os.rename(partial, target)
        sync(target.parent)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)
    finally:
        if lock is not None:
            os.close(lock)
