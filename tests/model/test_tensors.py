"""Files of tensors read by rows, and written: every bit survives."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from chinese_llama.errors import BadFile
from chinese_llama.model import tensors as module
from chinese_llama.model.tensors import DTYPES, Pickled, SafetensorsWriter, open_tensors, raw


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


def save(path: Path, content: dict[str, torch.Tensor]) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_safetensors_reads_what_the_writer_wrote(specs: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {
        name: (torch.randint(0, 2, shape) if shape else torch.ones(())).to(dtype)
        for name, (dtype, shape) in specs.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        metas = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        with SafetensorsWriter(file, metas, hashlib.sha256()) as writer:
            for tensor in tensors.values():
                writer.write(raw(tensor))
        assert writer.digest.hexdigest() == hashlib.sha256(file.read_bytes()).hexdigest()
        found = load_file(file)
        again = open_tensors(file)
        assert {name: again.meta(name) for name in again.keys()} == metas  # noqa: SIM118
        assert all(same_bits(again.load(name), tensor) for name, tensor in tensors.items())
    assert set(found) == set(tensors)
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["x.safetensors", "x.bin"]), st.data())
def test_rows_are_those_of_the_whole(count: int, columns: int, name: str, data: st.DataObject) -> None:
    tensor = torch.arange(count * columns).reshape(count, columns).to(torch.float16)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count + 2))
    with tempfile.TemporaryDirectory() as folder:
        opened = open_tensors(save(Path(folder) / name, {"before": torch.ones(3), "t": tensor}))
        assert same_bits(opened.rows("t", start, stop), tensor[start:stop])


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_what_is_read_is_memory_of_its_own(tmp_path: Path, name: str) -> None:
    opened = open_tensors(save(tmp_path / name, {"t": torch.ones(4, 3)}))
    opened.rows("t", 0, 2).zero_()
    opened.load("t").zero_()
    assert opened.load("t").eq(1).all()


def test_views_and_shared_storages_of_old_files_are_read_as_what_they_are(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    content = {"a": whole, "same": whole, "turned": whole.T, "part": whole[1:3, 2:4]}
    opened = open_tensors(save(tmp_path / "x.bin", content))
    for name, tensor in content.items():
        assert torch.equal(opened.load(name), tensor)
        assert torch.equal(opened.rows(name, 1, 2), tensor[1:2])
        assert opened.rows(name, 0, 2).is_contiguous()


def test_files_from_before_the_zip_format_are_read(tmp_path: Path) -> None:
    torch.save({"t": torch.arange(6.0)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(open_tensors(tmp_path / "x.bin").rows("t", 2, 4), torch.tensor([2.0, 3.0]))


def test_a_mapping_is_made_anew_and_threads_do_not_mind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAPPED", 100)
    tensor = torch.randn(64, 16)
    opened = open_tensors(save(tmp_path / "x.bin", {"t": tensor}))
    assert isinstance(opened, Pickled)
    first, wrong = opened._mapped, []

    def read() -> None:
        for i in range(60):
            if not torch.equal(opened.rows("t", i, i + 4), tensor[i : i + 4]):
                wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert opened._mapped is not first


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    opened = open_tensors(save(tmp_path / "x.safetensors", {"t": torch.ones(100)}))
    with open(tmp_path / "x.safetensors", "r+b") as stream:
        stream.truncate(150)
    with pytest.raises(BadFile, match=r"x\.safetensors: ends too early"):
        opened.load("t")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"noise" * 9])
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pth"])
def test_what_is_no_file_of_tensors_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadFile, match=rf"{name}: is damaged or not a weights file"):
        open_tensors(tmp_path / name)
