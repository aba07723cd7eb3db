"""The file format of `torch.save`, written tensor by tensor in one pass.

A zip archive of stored records: archive/data.pkl, a pickled dictionary of tensors that name their
storages; archive/data/N, the bytes of storage N; archive/byteorder and archive/version. As torch does
it, data starts at multiples of 64 bytes, padded by an extra field, and sizes and checksums follow the
data (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from chinese_llama.model.tensors import Meta, nbytes

STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
ALIGNMENT = 64
LOCAL_HEADER, LOCAL_ZIP64 = 30, 20  # bytes before the name and extra field of a record, and of large ones
PADDING = b"FB"  # the id of torch's own padding field


class TorchWriter:
    """Writes one file of tensors block by block, in the order of `specs` (floating types).

    `digest`, an object of hashlib's kind, is the file's hash once it is closed.
    """

    def __init__(self, path: Path, specs: Mapping[str, Meta], digest: Any) -> None:
        self.path, self.specs, self.digest = path, dict(specs), digest
        self._keys = {name: str(number) for number, name in enumerate(self.specs)}
        self._todo = list(self.specs)[::-1]
        self._name, self._left = "", 0  # the tensor that is being written, and its bytes to come

    def __enter__(self) -> TorchWriter:
        self._stream = _Stream(self.path, self.digest)
        self._archive = zipfile.ZipFile(self._stream, "w")  # type: ignore[call-overload]
        self._record: IO[bytes] | None = None
        self._small("data.pkl", _pickled(self.specs, self._keys))
        self._small("byteorder", b"little")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._stream.abandon()
        if self._record:
            self._record.close()
        self._small("version", b"3\n")
        self._archive.close()
        self._stream.close()
        if kind is None and (self._left or self._todo):
            raise ValueError(f"{self.path}: {self._name or 'the first tensor'} was not the last")

    def write(self, name: str, data: memoryview) -> None:
        """Append bytes of the tensor `name`; raises ValueError if they are not the next ones."""
        if not self._left and self._todo:
            self._next()
        if name != self._name or len(data) > self._left or self._record is None:
            raise ValueError(f"{name}: {len(data)} bytes, expected {self._left} of {self._name}")
        self._record.write(data)
        self._left -= len(data)

    def _next(self) -> None:
        if self._record:
            self._record.close()
        self._name = self._todo.pop()
        self._left = nbytes(*self.specs[self._name])
        self._record = self._open(f"data/{self._keys[self._name]}", self._left)

    def _small(self, name: str, data: bytes) -> None:
        with self._open(name, len(data)) as record:
            record.write(data)

    def _open(self, name: str, size: int) -> IO[bytes]:
        record = zipfile.ZipInfo(f"archive/{name}")
        record.file_size = size
        large = LOCAL_ZIP64 if size * 1.05 > zipfile.ZIP64_LIMIT else 0  # as zipfile decides
        start = self._stream.offset + LOCAL_HEADER + len(record.filename) + large + 4
        padding = -start % ALIGNMENT
        record.extra = PADDING + padding.to_bytes(2, "little") + b"Z" * padding
        return self._archive.open(record, "w", force_zip64=bool(large))


class _Stream(io.RawIOBase):
    """Goes forward only, so that zipfile does not come back to what is hashed already."""

    def __init__(self, path: Path, digest: Any) -> None:
        self._file: IO[bytes] | None = open(path, "wb", buffering=0)
        self.digest, self.offset = digest, 0

    def tell(self) -> int:
        return self.offset

    def write(self, data: Any) -> int:
        left = memoryview(data)
        self.digest.update(left)
        self.offset += len(left)
        try:
            while self._file and left:
                left = left[self._file.write(left) :]
        except OSError:
            self.abandon()
            raise
        return len(data)

    def abandon(self) -> None:
        """Write nothing more: the archive can be closed without touching a disk that is full."""
        if self._file:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self.abandon()
        super().close()


class _Storage(NamedTuple):
    kind: type
    key: str
    numbers: int


class _Entry(NamedTuple):
    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Writes entries as the calls that rebuild tensors, storages as references."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", value.kind, value.key, "cpu", value.numbers)
        return None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Entry):
            return NotImplemented
        strides = tuple(torch.Size(value.shape[axis + 1 :]).numel() for axis in range(len(value.shape)))
        rebuilt: tuple[Any, ...] = (value.storage, 0, value.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, rebuilt


def _pickled(specs: Mapping[str, Meta], keys: Mapping[str, str]) -> bytes:
    content = {
        name: _Entry(_Storage(STORAGES[dtype], keys[name], torch.Size(shape).numel()), shape)
        for name, (shape, dtype) in specs.items()
    }
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()
