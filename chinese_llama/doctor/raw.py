"""Files by their first bytes: what a name promises and what is there."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from chinese_llama.doctor.finding import Finding, listing, some
from chinese_llama.errors import UserError
from chinese_llama.merging.adapter import read_object

HEAD = 1 << 18  # bytes that are looked at
POINTER = b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
# what browsers, curl, wget, hf and aria2 call, or put beside, a file that they have not whole yet
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".incomplete", ".aria2")
HF = ".cache/huggingface/download"  # where `hf download --local-dir` keeps them, below the directory
MAGIC = {
    b"\x1f\x8b": "gzip (.gz)",
    b"\x28\xb5\x2f\xfd": "Zstandard (.zst)",
    b"PAR1": "Parquet (.parquet)",
    b"PK\x03\x04": "a ZIP archive (.zip, .xlsx, .docx)",
    b"%PDF": "PDF",
    b"GGUF": "a GGUF model (llama.cpp's)",
}
COMMON = frozenset(
    "的一是不了在人有我他这個这个上们來来到时時大地为為子中你说說生国國年着就那和要她出也得里后後自以会會家可下而过過天去能对對小多然于於心学學么之都好看起发發当當没沒成只如事把还還用第样樣道想作"
)


def broken(file: Path) -> Finding | None:
    """What is wrong with a file before its content is looked at: it is empty, a pointer, or cannot be read."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(200)
    except OSError as error:
        return Finding(
            "error",
            "file-not-readable",
            str(file),
            f"The file cannot be read ({error.strerror}).",
            [str(error)],
            "Give yourself the right to read it, or copy it again.",
        )
    if start.startswith(POINTER):
        return Finding(
            "error", "git-lfs-pointer", str(file),
            "The file is a pointer of git-lfs, not the content.",
            [start.decode("utf-8", "replace").splitlines()[-1]],
            "Fetch the content: `git lfs pull` in the clone, or download the file again from the hub.",
        )  # fmt: skip
    if not start.strip(b"\xef\xbb\xbf \t\r\n"):
        return Finding(
            "error", "file-empty", str(file), "The file is empty.", listing(file), "Get or make it again."
        )
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or start.lstrip()[:5].lower() == b"<html":
        return Finding(
            "error", "file-is-text", str(file),
            "The file is a web page, not the content: the download led to a page.",
            [repr(start[:80].decode("utf-8", "replace"))],
            "Download it again; on a hub the link has /resolve/ in it, not /blob/.",
        )  # fmt: skip
    return None


def unfinished(path: Path) -> Iterator[Finding]:
    """Downloads in a directory, or the file, that were broken off."""
    top = path if path.is_dir() else path.parent
    files = [*top.iterdir(), *(top / HF).rglob("*")] if path.is_dir() else [path]
    names = sorted(str(file.relative_to(top)) for file in files if file.suffix in UNFINISHED)
    if names:
        # aria2 reserves the whole file at once: what lies beside its .aria2 has its size, and holes
        grave = path.is_file() or any(name.endswith(".aria2") for name in names)
        yield Finding(
            "error" if grave else "warning", "download-not-finished", str(path),
            "A download was broken off: the file is not whole.",
            some(names),
            "Download it again, or go on with it, and compare its size with the source; delete what is left over.",
        )  # fmt: skip


def json_object(file: Path, found: list[Finding]) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none or it cannot be read, which is put into `found`."""
    if not file.is_file():
        return {}
    if (problem := broken(file)) is not None:
        found.append(problem)
        return {}
    try:
        return read_object(file)
    except (UserError, UnicodeError, RecursionError) as error:
        told = str(error).removeprefix(f"{file}: ")
        found.append(
            Finding(
                "error",
                "invalid-json",
                str(file),
                f"The file {told}",
                listing(file),
                "Correct it at the place that is named, or get it again.",
            )
        )
        return {}


def head(file: Path) -> bytes:
    """The first bytes of a file, unpacked where its name says that it is packed; fewer where it is damaged."""
    found = b""
    with contextlib.suppress(OSError, EOFError, zstandard.ZstdError, zlib.error), _unpacked(file) as stream:
        while len(found) < HEAD and (block := stream.read(HEAD - len(found))):
            found += block
    return found


def _unpacked(file: Path) -> Any:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    return zstandard.open(file, "rb") if file.suffix == ".zst" else open(file, "rb")  # type: ignore[arg-type]


def other_content(file: Path) -> str | None:
    """What a file is by its first bytes, where its name says something else."""
    with open(file, "rb") as stream:
        start = stream.read(8)
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
    names = {".gz": "gzip (.gz)", ".zst": "Zstandard (.zst)", ".parquet": "Parquet (.parquet)"}
    wanted = names.get(file.suffix)
    return None if kind == wanted else kind or f"not {wanted}"


def encoding(start: bytes) -> str | None:
    """The encoding of a text that is not UTF-8, by its beginning; "unknown" where it is none of the known ones.
    None for UTF-8."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    text = start.decode("utf-8", "replace")
    strange = text.count("\ufffd") - start.count("\ufffd".encode())
    if strange <= 1 or strange <= 0.05 * sum(character > "\x7f" for character in text):
        return None  # at most a character cut by the end of the head, or a rare line
    shares = {name: _common(start, name) for name in ("gb18030", "big5")}
    best = max(shares, key=lambda name: shares[name])
    return {"gb18030": "GBK (GB18030)", "big5": "Big5"}[best] if shares[best] > 0.02 else "unknown"


def _common(text: bytes, name: str) -> float:
    """The share of the commonest Chinese characters among the non-ASCII ones, read in an encoding."""
    letters = [c for c in text.decode(name, "replace") if c > "\x7f"]
    return sum(c in COMMON for c in letters) / max(1, len(letters))


def is_json_line(line: str) -> bool:
    """Whether a line holds a JSON object."""
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
