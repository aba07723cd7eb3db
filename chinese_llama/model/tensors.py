"""Files of tensors, read by rows: .safetensors, and what `torch.save` writes (.bin, .pth).

Rows come as memory of their own and the file's pages do not stay, so memory is what the caller keeps.
No pickle is executed (`weights_only=True`).
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from chinese_llama.errors import BadFile

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CODES = {code: dtype for dtype, code in DTYPES.items()}
SENT = 32 << 20  # bytes after which the system is told to begin to write them
MAPPED = 32 << 20  # bytes that are read from a mapping before it is made anew
Meta = tuple[tuple[int, ...], torch.dtype]


class TensorFile(Protocol):
    """One file of tensors. All methods may be called from several threads."""

    file: Path

    def keys(self) -> list[str]:
        """Names, in the order in which they lie in the file."""

    def meta(self, name: str) -> Meta:
        """(shape, dtype) of a tensor."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, [stop - start, ...], as they are stored, on the CPU."""

    def load(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, on the CPU."""


def open_tensors(file: Path) -> TensorFile:
    """The tensors in a file. Raises BadFile where it is damaged or something else."""
    try:
        return Safetensors(file) if file.suffix == ".safetensors" else Pickled(file)
    except Exception as error:  # safetensors, zip and pickle errors have no common base
        raise BadFile(file, f"is damaged or not a weights file ({_first_line(error)}).") from error


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class Safetensors:
    """The library checks the header; the bytes are read, not mapped, so that pages of a shard do not
    stay in memory. Format: https://huggingface.co/docs/safetensors."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with safe_open(str(file), framework="pt", device="cpu") as checked:
            self.names = sorted(checked.keys(), key=checked.offset_keys().index)
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        self.header = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in self.header.items():
            if entry["dtype"] not in CODES:
                raise SafetensorError(f"{name} has the unsupported type {entry['dtype']}")
        self.start = 8 + length
        self._stream = open(file, "rb", buffering=0)

    def keys(self) -> list[str]:
        return self.names

    def meta(self, name: str) -> Meta:
        entry = self.header[name]
        return tuple(entry["shape"]), CODES[entry["dtype"]]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape, dtype = self.meta(name)
        part = (max(0, min(stop, shape[0]) - start), *shape[1:])
        return self._read(name, part, dtype, start * nbytes(shape[1:], dtype))

    def load(self, name: str) -> torch.Tensor:
        return self._read(name, *self.meta(name), 0)

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, skip: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if not tensor.numel():
            return tensor
        left, place = raw(tensor), self.start + self.header[name]["data_offsets"][0] + skip
        while left:
            count = os.preadv(self._stream.fileno(), [left], place)
            if not count:
                raise BadFile(self.file, "ends too early; was it changed while it was read?")
            left, place = left[count:], place + count
        return tensor


class Pickled:
    """A file of `torch.save`: mapped, and mapped anew after `MAPPED` bytes, which lets its pages go. Files
    from before torch 1.6 are no zip archives and cannot be mapped: they are read as a whole."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._mapped, self._read = self._map(), 0
        self.specs = {name: (tuple(t.shape), t.dtype) for name, t in self._mapped.items()}
        for name, (_, dtype) in self.specs.items():
            if dtype not in DTYPES:
                raise ValueError(f"{name} has the unsupported type {dtype}")

    def _map(self) -> dict[str, torch.Tensor]:
        with open(self.file, "rb") as stream:
            archive = stream.read(2) == b"PK"
        found = torch.load(self.file, map_location="cpu", weights_only=True, mmap=archive)
        if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
            raise ValueError("it does not hold tensors by name")
        self._anew = archive
        return found

    def keys(self) -> list[str]:
        return list(self.specs)

    def meta(self, name: str) -> Meta:
        return self.specs[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._copied(self._tensor(name)[start:stop])

    def load(self, name: str) -> torch.Tensor:
        return self._copied(self._tensor(name))

    def _tensor(self, name: str) -> torch.Tensor:
        with self._lock:
            if self._anew and self._read > MAPPED:
                self._mapped, self._read = self._map(), 0
            return self._mapped[name]

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        self._read += tensor.numel() * tensor.element_size()
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


class SafetensorsWriter:
    """Writes one .safetensors file block by block, in the order of `specs`; `digest` is its hash."""

    def __init__(self, path: Path, specs: dict[str, Meta], digest: Any) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in specs.items():
            end = offset + nbytes(shape, dtype)
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        self.path, self.digest = path, digest
        self._head = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> SafetensorsWriter:
        self._stream, self._unsent = open(self.path, "wb", buffering=0), 0
        self.write(self._head)
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append the next bytes, and count them into `digest`."""
        self.digest.update(data)
        left = memoryview(data)
        while left:
            left = left[self._stream.write(left) :]
        self._unsent += len(data)
        if self._unsent >= SENT:
            _send(self._stream.fileno(), self._stream.tell() - self._unsent, self._unsent)
            self._unsent = 0


def _send(handle: int, start: int, count: int) -> None:
    """Have the system begin to write to the disk what it holds of a file, so that a later fsync finds little."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, count, os.POSIX_FADV_DONTNEED)


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own words say how to execute it
        return "it holds more than tensors, and is not opened"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
