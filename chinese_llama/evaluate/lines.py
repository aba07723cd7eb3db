"""Files of JSON records that grow line by line: answers on the way, votes, judgements. A kill loses at most
the record that was being written."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from chinese_llama.errors import BadFile, UserError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; [] where there is none. A last line that a kill has cut is left out; any other
    that is no JSON object raises BadFile."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            raise BadFile(path, "is no record of this tool; remove the line.", number)
    return records


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file (made where there is none); it is on the disk when this returns. Raises UserError
    where it cannot be written."""
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    try:
        with open(path, "a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # of other threads and processes; closing it ends it
            if last := _unended(stream):
                if _record(last) is None:
                    stream.truncate(stream.tell() - len(last))
                else:
                    line = b"\n" + line
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}).") from error


def _unended(stream: BinaryIO) -> bytes:
    """The last line, if nothing ends it: what a kill has cut, or an editor has left so."""
    if not (size := stream.seek(0, os.SEEK_END)):
        return b""
    stream.seek(size - 1)
    if stream.read(1) == b"\n":
        return b""
    stream.seek(0)
    return stream.read().rpartition(b"\n")[2]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
