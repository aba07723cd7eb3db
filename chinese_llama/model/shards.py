"""A model directory read tensor by tensor, and written again with some tensors replaced.

Memory is a few tensors, whatever the model's size. Safetensors is the one format that is written;
old `pytorch_model*.bin` files are read with `weights_only=True`, so no pickle is executed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from chinese_llama.directories import write_text
from chinese_llama.errors import BadFile
from chinese_llama.progress import track

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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


@dataclass
class Change:
    """A tensor to write instead of (or beside) the one in the source."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


class Weights:
    """The tensors of a model directory, loaded one at a time.

    Raises BadFile for a missing shard, an index that points elsewhere, a damaged file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise BadFile(self.directory, "is not a model directory (no config.json).")
        self.shards: dict[Path, list[str]] = {}
        self._open: tuple[Path, Any] | None = None
        for file in self._files():
            self.shards[file] = list(self._reader(file).keys())
        self._file_of = {name: file for file, names in self.shards.items() for name in names}
        self._check_index()

    def _index(self) -> Path | None:
        for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if (self.directory / name).is_file():
                return self.directory / name
        return None

    def _files(self) -> list[Path]:
        index = self._index()
        if index:
            names = sorted(set(_weight_map(index).values()))
            if any("/" in name or "\\" in name or name.startswith(".") for name in names):
                raise BadFile(index, "names a shard outside its directory.")
        else:
            single = ("model.safetensors", "pytorch_model.bin")
            names = [name for name in single if (self.directory / name).is_file()][:1]
        for name in names:
            if not (self.directory / name).is_file():
                raise BadFile(self.directory / name, "this shard is missing; the copy is not complete.")
        if not names:
            raise BadFile(self.directory, "has no weights (model*.safetensors or pytorch_model*.bin).")
        return [self.directory / name for name in names]

    def _check_index(self) -> None:
        index = self._index()
        for name, shard in (_weight_map(index) if index else {}).items():
            if self._file_of.get(name) != self.directory / shard:
                raise BadFile(self.directory / shard, f"lacks the tensor {name} that the index promises.")

    def _reader(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            try:
                self._open = (file, _Safetensors(file) if file.suffix == ".safetensors" else _Bin(file))
            except Exception as error:  # safetensors, zip and pickle errors have no common base
                raise BadFile(file, f"is damaged or not a weights file ({error}).") from error
        return self._open[1]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Any:
        return iter(self._file_of)

    def meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of a tensor."""
        file = self._file_of[name]
        try:
            return self._reader(file).meta(name)
        except SafetensorError as error:
            raise BadFile(file, f"cannot be used ({error}).") from error

    def load(self, name: str) -> torch.Tensor:
        """The tensor, as it is stored, on the CPU."""
        return self._reader(self._file_of[name]).load(name)

    def config(self) -> dict[str, Any]:
        return read_json(self.directory / "config.json")


class _Safetensors:
    """Tensors read one by one. The library checks the header; the bytes are read, not mapped, so that
    pages of a shard do not stay in memory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with safe_open(str(file), framework="pt", device="cpu") as checked:
            self.names = sorted(checked.keys(), key=checked.offset_keys().index)
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            self.header = json.loads(stream.read(length))
        self.start = 8 + length

    def keys(self) -> list[str]:
        return self.names

    def meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        entry = self.header[name]
        dtypes = {code: dtype for dtype, code in DTYPES.items()}
        if entry["dtype"] not in dtypes:
            raise SafetensorError(f"{name} has the unsupported type {entry['dtype']}")
        return tuple(entry["shape"]), dtypes[entry["dtype"]]

    def load(self, name: str) -> torch.Tensor:
        shape, dtype = self.meta(name)
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            with open(self.file, "rb") as stream:
                stream.seek(self.start + self.header[name]["data_offsets"][0])
                stream.readinto(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        return tensor


class _Bin:
    def __init__(self, file: Path) -> None:
        self.tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(self.tensors, dict) or not all(map(torch.is_tensor, self.tensors.values())):
            raise ValueError("it does not hold tensors by name")

    def keys(self) -> list[str]:
        return list(self.tensors)

    def meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.tensors[name].shape), self.tensors[name].dtype

    def load(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadFile."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadFile(path, "no such file.") from error
    except (OSError, ValueError) as error:
        raise BadFile(path, f"is not readable JSON ({error}).") from error
    if not isinstance(loaded, dict):
        raise BadFile(path, "must hold a JSON object.")
    return loaded


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise BadFile(index, "has no weight_map of names to files.")
    return found


def rewrite(source: Weights, output: Path, changes: Mapping[str, Change], what: str) -> None:
    """Write the weights of `source` into `output`, the tensors named in `changes` replaced.

    Shards stay as they are divided; those without a changed tensor are copied as files. A change
    whose name the source lacks goes into the last shard.
    """
    extra = [name for name in changes if name not in source]
    last = list(source.shards)[-1]
    names = {file: found + (extra if file == last else []) for file, found in source.shards.items()}
    targets = _target_names(list(source.shards))
    bar = iter(track(range(sum(map(len, names.values()))), what, sum(map(len, names.values())), "tensors"))
    total, weight_map = 0, {}
    for file, tensors in names.items():
        target = output / targets[file]
        weight_map.update(dict.fromkeys(tensors, target.name))
        specs = {n: _spec(changes[n]) if n in changes else source.meta(n) for n in tensors}
        total += sum(_nbytes(*spec) for spec in specs.values())
        if file.suffix == ".safetensors" and not any(name in changes for name in tensors):
            shutil.copyfile(file, target)
            for _ in tensors:
                next(bar)
            continue
        with SafetensorsWriter(target, specs) as writer:
            for name in tensors:
                next(bar)
                writer.write(name, changes[name].make() if name in changes else source.load(name))
    next(bar, None)
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(output / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def _spec(change: Change) -> tuple[tuple[int, ...], torch.dtype]:
    return change.shape, change.dtype


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _target_names(files: list[Path]) -> dict[Path, str]:
    if len(files) == 1:
        return {files[0]: "model.safetensors"}
    return {file: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, 1)}


class SafetensorsWriter:
    """Writes one .safetensors file tensor by tensor, in the order of `specs`.

    Format: 8 bytes little-endian header length, JSON header, raw little-endian data
    (https://huggingface.co/docs/safetensors).
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.specs, self.path = specs, path
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in specs.items():
            end = offset + _nbytes(shape, dtype)
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        self._head = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> SafetensorsWriter:
        self._stream = open(self.path, "wb")
        self._stream.write(self._head)
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the bytes of the next tensor. Raises ValueError if it is not as announced."""
        shape, dtype = self.specs[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, announced {shape} {dtype}")
        self._stream.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
