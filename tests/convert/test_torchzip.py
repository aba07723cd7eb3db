"""Files that torch reads as its own, mapped or not."""

from __future__ import annotations

import hashlib
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.convert.torchzip import STORAGES, TorchWriter
from chinese_llama.model.tensors import raw
from tests.convert.checkpoints import assert_same

Tensors = dict[str, torch.Tensor]


def written(path: Path, tensors: Tensors, step: int = 1 << 20) -> str:
    """The tensors in a file, `step` bytes at a time."""
    specs = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with TorchWriter(path, specs, hashlib.sha256()) as writer:
        for name, tensor in tensors.items():
            data = raw(tensor)
            for start in range(0, len(data), step):
                writer.write(name, data[start : start + step])
    return writer.digest.hexdigest()


def check(path: Path, tensors: Tensors) -> None:
    for mmap in (False, True):
        assert_same([torch.load(path, weights_only=True, mmap=mmap)], [tensors])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {"archive/data.pkl", "archive/byteorder", "archive/version"} <= set(archive.namelist())
        for record in archive.infolist():
            with open(path, "rb") as stream:
                stream.seek(record.header_offset + 26)
                start = record.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))
            assert start % 64 == 0, record.filename


def some(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Tensors:
    return {f"tensor.{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6),
    dtype=st.sampled_from(list(STORAGES)),
    step=st.integers(1, 100),
)
def test_torch_reads_what_is_written(shapes: list[tuple[int, ...]], dtype: torch.dtype, step: int) -> None:
    tensors = some(*shapes, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        digest = written(path, tensors, step)
        check(path, tensors)
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_large_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sizes and offsets of 64 bits everywhere."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    tensors = some((3, 50), (5,), (70,), dtype=torch.float32)
    written(tmp_path / "x.pth", tensors)
    check(tmp_path / "x.pth", tensors)
    assert b"PK\x06\x06" in (tmp_path / "x.pth").read_bytes()


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    tensors = some((4, 4))
    assert written(tmp_path / "a.pth", tensors) == written(tmp_path / "b.pth", tensors)


def test_nothing_but_the_announced_tensors_in_their_order(tmp_path: Path) -> None:
    tensors = some((4, 4), (2,))
    first, second = tensors.values()
    specs = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for wrong in (
        lambda writer: writer.write("tensor.1", raw(second)),
        lambda writer: writer.write("tensor.0", raw(torch.zeros(100))),
        lambda writer: writer.write("tensor.0", raw(first)),  # the other is missing
        lambda writer: writer.write("tensor.0", raw(first)[:-2]),
        lambda writer: None,
    ):
        with pytest.raises(ValueError), TorchWriter(tmp_path / "x.pth", specs, hashlib.sha256()) as writer:
            wrong(writer)
    with (
        pytest.raises(ValueError, match="expected 0"),
        TorchWriter(tmp_path / "x.pth", specs, hashlib.sha256()) as writer,
    ):
        writer.write("tensor.0", raw(first))
        writer.write("tensor.1", raw(second))
        writer.write("tensor.1", raw(second))


def test_what_stops_the_writing_is_told_as_it_is() -> None:
    """A full disk: no second error from closing the archive."""
    with pytest.raises(OSError, match="No space left"):
        written(Path("/dev/full"), some((4, 4)))
