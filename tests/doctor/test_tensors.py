"""One pass over the numbers: what it counts is what there is, however they are divided into blocks."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from chinese_llama.doctor import tensors
from chinese_llama.doctor.tensors import Measured, Readable, check_rows, measure
from chinese_llama.errors import BadFile
from chinese_llama.merging.merged import InMemory


def measured(tensor: torch.Tensor, rows: bool = False) -> Measured:
    found, lost = measure(InMemory({"x": tensor}), ["x"], ["x"] if rows else [], "reading")
    assert not lost
    return found["x"]


numbers = st.one_of(st.floats(width=16), st.sampled_from([0.0, float("nan"), float("inf"), float("-inf")]))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=9),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(1, 7),
)
def test_counts_are_those_of_the_whole(rows: list[list[float]], dtype: torch.dtype, block: int) -> None:
    tensor = torch.tensor(rows, dtype=dtype)
    kept, tensors.BLOCK = tensors.BLOCK, block
    try:
        found = measured(tensor)
    finally:
        tensors.BLOCK = kept
    values = tensor.double().numpy()
    finite = values[numpy.isfinite(values)]
    assert (found.count, found.nans, found.infinities) == (values.size, numpy.isnan(values).sum(), numpy.isinf(values).sum())  # fmt: skip
    if finite.size:
        assert (found.low, found.high) == (finite.min(), finite.max())
    assert found.zero == bool((values == 0).all())
    assert found.largest == (abs(finite).max() if finite.size else 0.0)


@pytest.mark.parametrize("block", [3, 8, 1000])
def test_rows_that_are_like_the_one_above(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK", block)
    rows = torch.eye(4)[[0, 0, 1, 2, 2, 2, 3]]
    rows[5] += 1e-4
    rows[2] = 0
    found = measured(rows, rows=True)
    assert found.alike.tolist() == [False, True, False, False, True, True, False]
    assert found.norms.tolist() == pytest.approx([1, 1, 0, 1, 1, 1, 1], abs=1e-3)


def test_whole_numbers_and_empty_tensors_are_passed_over() -> None:
    source = InMemory({"ids": torch.arange(3), "none": torch.zeros(0, 4), "one": torch.tensor(2.0)})
    found, _ = measure(source, list(source), [], "reading")
    assert set(found) == {"none", "one"}
    assert (found["none"].count, found["none"].zero) == (0, False)
    assert (found["one"].count, found["one"].high) == (1, 2.0)


def test_rows_beyond_the_pieces_only_fill_up() -> None:
    rows = torch.randn(100, 4)
    rows[60:] = 0
    found = {"x": measured(rows, rows=True)}
    assert [f.check for f in check_rows(found, "here")] == ["zero-rows"]
    assert list(check_rows(found, "here", pieces=60)) == []


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(1000)}, file)
    source = Readable([file])
    file.write_bytes(file.read_bytes()[:600])
    found, lost = measure(source, list(source), [], "reading")
    assert [(finding.check, finding.where) for finding in lost] == [("file-not-readable", "b")]
    assert list(found) == ["a"]


def test_what_can_be_read_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    source = Readable([tmp_path / "b.safetensors", tmp_path / "a.safetensors", tmp_path / "c.safetensors"])
    assert list(source) == ["a"] and not source.whole
    assert [problem.check for problem in source.problems] == ["file-empty", "file-not-readable"]
    assert tensors.unreadable(tmp_path / "c.safetensors", BadFile("c", "x")).check == "file-not-readable"


def test_new_rows_of_another_size_in_a_published_vocabulary() -> None:
    rows = torch.randn(49_953, 2)
    assert list(check_rows({"x": measured(rows, rows=True)}, "here")) == []
    rows[32_000:] *= 1e-3
    (finding,) = check_rows({"x": measured(rows, rows=True)}, "here")
    assert (finding.check, finding.severity) == ("row-norms", "warning")
