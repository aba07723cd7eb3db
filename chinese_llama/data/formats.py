"""Documents and records from files: .txt, .jsonl, .json, .parquet; the first three also .gz, .zst.

All but .json files stream. A .txt file holds one document a line (empty lines are skipped); the others hold
records, with a field `text` where they are documents (for others see chinese_llama.data.conversations).
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from chinese_llama.errors import BadFile, UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
PATTERNS = [f"*{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz", ".zst")]


def documents(path: Path) -> Iterator[str]:
    """The documents (non-empty texts) of a corpus file or of all corpus files in a directory.

    Raises BadFile with the line for what cannot be read, and where there is no document at all.
    """
    return _texts(path, file_documents)


def texts(path: Path) -> Iterator[str]:
    """Like `documents`, of whatever records: `text`, or else all that people wrote in a record
    (instruction and answer, the turns of a conversation), joined by newlines.

    For what only looks at characters, such as a vocabulary.
    """
    return _texts(path, lambda file: _file_texts(file, _all_text))


def _texts(path: Path, texts_of: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    found = False
    for file in corpus_files(path):
        for text in texts_of(file):
            found = True
            yield text
    if not found:
        raise BadFile(path, "holds no text.")


def file_documents(file: Path) -> Iterator[str]:
    """The documents of one corpus file; none is no error."""
    return _file_texts(file, _text_field, "text")


def _file_texts(
    file: Path, text_of: Callable[[Path, int | None, Any], str], column: str | None = None
) -> Iterator[str]:
    for line, record in records(file, column):
        text = valid_unicode(file, line, record) if isinstance(record, str) else text_of(file, line, record)
        if text.strip():
            yield text


def corpus_files(path: Path, pattern: str | None = None) -> list[Path]:
    """`path` itself, or the corpus files below it if it is a directory, in order of name; with a
    `pattern` (a glob such as `zh/*.parquet`) those that match it."""
    path = Path(path)
    if path.is_dir():
        try:
            below = path.rglob("*") if pattern is None else path.glob(pattern)
            files = sorted({file for file in below if file.is_file() and _is_corpus(file)})
        except (ValueError, NotImplementedError) as error:
            raise BadFile(path, f"files: {pattern!r} is no pattern for the files in it ({error}).") from error
        if not files:
            matches = f"matches {pattern!r} and " if pattern is not None else ""
            what = f"has no file that {matches}ends in {', '.join(SUFFIXES)} (or those + .gz, .zst)."
            raise BadFile(path, what)
        return files
    if path.is_file() and pattern is not None:
        raise BadFile(path, f"is a file; files ({pattern!r}) chooses among those of a directory.")
    if not path.is_file():
        raise BadFile(path, "no such file.")
    if _kind(path) not in SUFFIXES:
        raise BadFile(path, f"unknown format; known are {', '.join(SUFFIXES)} (also + .gz, .zst).")
    return [path]


def as_paths(value: Any) -> list[Path]:
    """A path or a list of paths, as a list."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or any(item is None for item in values):
        raise UserError("no corpus is given.")
    return [Path(str(item)) for item in values]


def _is_corpus(file: Path) -> bool:
    """Not what lies beside data: hidden files, a data set's description."""
    return _kind(file) in SUFFIXES and not file.name.startswith((".", "dataset_info"))


def _kind(path: Path) -> str:
    suffixes = path.suffixes
    packed = suffixes[-1:] in ([".gz"], [".zst"])
    return (suffixes[:-1] if packed else suffixes)[-1] if len(suffixes) > packed else ""


def records(
    path: Path, column: str | None = None, bad: Callable[[BadFile], None] | None = None
) -> Iterator[tuple[int | None, Any]]:
    """(line number or None, text or record) of one file; with `column`, of a Parquet file only that.

    A line that is not JSON raises BadFile, or is given to `bad` and left out.
    """
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet(path, column)
        return
    if kind == ".json" and not _holds_lines(path):
        yield from _json(path)
        return
    for number, line in _lines(path, bad):
        if kind == ".txt":
            yield number, line.rstrip("\r\n")
        elif line.strip():
            try:
                record = _parse(path, line, number)
            except BadFile as error:
                if bad is None:
                    raise
                bad(error)
                continue
            yield number, record


def _holds_lines(path: Path) -> bool:
    """True for a .json file that holds a record a line, as many published ones do."""
    first = list(islice((line for _, line in _lines(path) if line.strip()), 2))
    try:
        return len(first) == 2 and all(isinstance(json.loads(line), dict) for line in first)
    except (ValueError, RecursionError):
        return False


def _lines(path: Path, bad: Callable[[BadFile], None] | None = None) -> Iterator[tuple[int, str]]:
    """(number, line) of `path`, unpacked and decoded (UTF-8; a byte-order mark is dropped).

    A line that is not UTF-8 raises BadFile, or is given to `bad` and left out.
    """
    try:
        with open(path, "rb") as raw:
            for number, line in enumerate(_unpacked(path, raw), 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    what = "is not UTF-8; convert it first (iconv -f GB18030 -t UTF-8)."
                    told = BadFile(path, what, number)
                    if bad is None:
                        raise told from error
                    bad(told)
                    continue
                yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise BadFile(path, f"cannot be unpacked ({error}).") from error
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error.strerror}).") from error


def _unpacked(path: Path, raw: BinaryIO) -> Iterable[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 17)  # finds lines faster than GzipFile
    if path.suffix == ".zst":
        return io.BufferedReader(_Unzstd(raw))
    return raw


class _Unzstd(io.RawIOBase):
    """The content of a .zst file; EOFError where it ends inside a frame (zstandard's own reader
    stops there without a word)."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._left = b""
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            block = self._left or self._raw.read(1 << 17)
            self._left = b""
            if not block and self._frame is not None:
                raise EOFError("the file ends inside a frame")
            if not block:
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._out = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._out))
        buffer[:count], self._out = self._out[:count], self._out[count:]
        return count


def _parse(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = line if line is not None else getattr(error, "lineno", None)
        raise BadFile(path, f"is not valid JSON ({getattr(error, 'msg', error)}).", at) from error


def _json(path: Path) -> Iterator[tuple[None, Any]]:
    loaded = _parse(path, "".join(line for _, line in _lines(path)), None)
    if isinstance(loaded, dict) and isinstance(loaded.get("data"), list):
        loaded = loaded["data"]
    if not isinstance(loaded, list):
        raise BadFile(path, "must hold a list of records.")
    for record in loaded:
        yield None, record


def _parquet(path: Path, column: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [column] if column in table.schema_arrow.names else None
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadFile(path, f"is not a readable Parquet file ({error}).") from error


def _text_field(path: Path, line: int | None, record: Any) -> str:
    if not isinstance(record, dict) or "text" not in record:
        names = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise BadFile(path, f"has no field 'text' (found: {names or 'nothing'}).", line)
    if not isinstance(record["text"], str):
        raise BadFile(path, "the field 'text' is not text.", line)
    return valid_unicode(path, line, record["text"])


def _all_text(path: Path, line: int | None, record: Any) -> str:
    if isinstance(record, dict) and "text" in record:
        return _text_field(path, line, record)
    parts = list(_strings(record)) if isinstance(record, dict) else []
    if not parts:
        names = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise BadFile(path, f"has no field with text (found: {names or 'nothing'}).", line)
    return valid_unicode(path, line, "\n".join(parts))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("from", "role", "id", "source"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def valid_unicode(path: Path, line: int | None, text: str) -> str:
    """`text`, if it can be written as UTF-8: JSON may hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"holds half a surrogate pair ({text[error.start]!r}); it is not valid Unicode."
        raise BadFile(path, what, line) from error
    return text
