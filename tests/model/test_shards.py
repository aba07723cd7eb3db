"""Weights read and written tensor by tensor: every bit survives, every damaged file is told."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chinese_llama.errors import BadFile
from chinese_llama.model.shards import EMBED, HEAD, Change, Changed, Weights, copy_unchanged, save_shards
from tests import tiny

LAYER = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("shards") / "tied", tiny.base_tokenizer(), tied=True)


def saved(base: Path, output: Path, dtype: torch.dtype, shard_size: str) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.save_pretrained(str(output), max_shard_size=shard_size)
    return output


def old_format(base: Path, output: Path, parts: int) -> Path:
    """`base` as pytorch_model.bin, or as that many shards with an index."""
    tensors = load_file(base / "model.safetensors")
    output.mkdir()
    (output / "config.json").write_text((base / "config.json").read_text())
    if parts == 1:
        torch.save(tensors, output / "pytorch_model.bin")
        return output
    weight_map = {}
    for part in range(parts):
        file = f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin"
        names = sorted(tensors)[part::parts]
        torch.save({name: tensors[name] for name in names}, output / file)
        weight_map |= dict.fromkeys(names, file)
    (output / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return output


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """What safetensors itself reads from the output."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


def assert_round_trip(source: Path, output: Path) -> None:
    """Everything equal but one tensor, which is the new one; the result loads as a model."""
    output.mkdir()
    weights = Weights(source)
    shape, dtype = weights.meta(LAYER)
    new = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    model = Changed(weights, {LAYER: Change(shape, dtype, lambda start, stop: new[start:stop])})
    save_shards(model, output, "testing")
    found = all_tensors(output)
    assert set(found) == set(weights)
    for name in weights:
        assert same_bits(found[name], new if name == LAYER else weights.load(name)), name
    (output / "config.json").write_text((source / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(output, dtype=dtype)
    assert same_bits(model.state_dict()[LAYER], new)
    assert same_bits(model.state_dict()[EMBED], weights.load(EMBED))


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rewrite_keeps_every_bit(base: Path, tmp_path: Path, dtype: torch.dtype, shard_size: str) -> None:
    source = saved(base, tmp_path / "source", dtype, shard_size)
    assert (len(Weights(source).shards) > 1) == (shard_size == "20KB")
    assert_round_trip(source, tmp_path / "output")


@pytest.mark.parametrize("parts", [1, 3])
def test_rewrite_reads_the_old_bin_format(base: Path, tmp_path: Path, parts: int) -> None:
    assert_round_trip(old_format(base, tmp_path / "source", parts), tmp_path / "output")


@pytest.mark.parametrize("system", ["copy_file_range", "none", "not here"])
def test_files_without_a_change_are_copied_as_they_would_be_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    def not_here(*_: object) -> int:
        raise OSError(errno.EXDEV, "other file systems")

    if system == "none":
        monkeypatch.delattr(os, "copy_file_range")
    elif system == "not here":
        monkeypatch.setattr(os, "copy_file_range", not_here)
    weights = Weights(saved(base, tmp_path / "source", torch.float32, "20KB"))
    shape, dtype = weights.meta(LAYER)
    new = torch.ones(shape, dtype=dtype)
    model = Changed(weights, {LAYER: Change(shape, dtype, lambda start, stop: new[start:stop])})
    for name in ("copied", "written"):
        (tmp_path / name).mkdir()
    copied = copy_unchanged(model, weights, tmp_path / "copied")
    hashes = save_shards(model, tmp_path / "written", "testing")
    assert len(copied) == len(hashes) - 1 > 1
    for name, original in copied.items():
        content = (tmp_path / "written" / name).read_bytes()
        assert content == original.read_bytes() == (tmp_path / "copied" / name).read_bytes()
    save_shards(model, tmp_path / "copied", "testing", done={name: {} for name in copied})
    for name in hashes:
        assert (tmp_path / "copied" / name).read_bytes() == (tmp_path / "written" / name).read_bytes()


def test_files_that_would_get_another_header_are_not_copied(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((base / "config.json").read_text())
    save_file(
        load_file(base / "model.safetensors"), source / "model.safetensors", {"format": "pt", "by": "me"}
    )
    for weights in (Weights(source), Weights(old_format(base, tmp_path / "old", 2))):
        assert copy_unchanged(Changed(weights, {}), weights, tmp_path) == {}


def test_a_file_that_shrinks_while_it_is_copied(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(saved(base, tmp_path / "source", torch.float32, "5GB"))
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    with pytest.raises(BadFile, match="ends too early"):
        copy_unchanged(Changed(weights, {}), weights, tmp_path)


def test_a_tied_model_has_no_head_before_and_after(tied: Path, tmp_path: Path) -> None:
    assert HEAD not in Weights(tied)
    assert_round_trip(tied, tmp_path / "output")


def test_an_unchanged_shard_is_copied_and_the_index_tells_the_truth(base: Path, tmp_path: Path) -> None:
    source, output = saved(base, tmp_path / "source", torch.float32, "20KB"), tmp_path / "output"
    output.mkdir()
    extra = torch.ones(3, dtype=torch.float16)
    change = Change((3,), torch.float16, lambda start, stop: extra[start:stop])
    save_shards(Changed(Weights(source), {"new.weight": change}), output, "testing")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    found = all_tensors(output)
    assert torch.equal(found["new.weight"], extra)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    for name, file in index["weight_map"].items():
        with safe_open(str(output / file), framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert set(index["weight_map"]) == set(found)


def test_a_missing_shard_is_named(base: Path, tmp_path: Path) -> None:
    source = saved(base, tmp_path / "source", torch.float32, "20KB")
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(BadFile, match=f"{lost.name}: this shard is missing; the copy is not complete"):
        Weights(source)


def bad_index(base: Path, folder: Path, index: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    (folder / "part.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {EMBED: "../base/model.safetensors"}}, "names a shard outside its directory"),
        ({"weight_map": {EMBED: "/etc/model.safetensors"}}, "names a shard outside its directory"),
        ({"weight_map": {EMBED: ".."}}, "names a shard outside its directory"),
        ({"weight_map": {EMBED: 5}}, "index.json"),
        ({"metadata": {}}, "has no weight_map"),
        ([1], "must hold a JSON object"),
        ({"weight_map": {"odd.weight": "part.safetensors"}}, "lacks the tensor odd.weight that the index"),
    ],
)
def test_a_bad_index_is_refused(base: Path, tmp_path: Path, index: object, told: str) -> None:
    with pytest.raises(BadFile, match=told):
        Weights(bad_index(base, tmp_path / "source", index))


@pytest.mark.parametrize("keep", ["half", "header", "nothing", "noise"])
def test_a_damaged_safetensors_file_is_refused(base: Path, tmp_path: Path, keep: str) -> None:
    whole = (base / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    cut = {"half": whole[: len(whole) // 2], "header": whole[:header], "nothing": b"", "noise": b"\xff" * 64}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(cut[keep])
    with pytest.raises(BadFile, match=r"model\.safetensors: is damaged or not a weights file"):
        Weights(tmp_path)


def test_a_type_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({EMBED: torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(BadFile, match="F8_E4M3"):
        Weights(tmp_path).meta(EMBED)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("content", [{EMBED: Evil()}, [1, 2, 3], {EMBED: "text"}])
def test_a_bin_file_that_holds_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadFile, match=r"pytorch_model\.bin: is damaged or not a weights file"):
        Weights(tmp_path).meta(EMBED)
    assert not (tmp_path / "executed").exists()


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"is not a model directory \(no config.json\)"):
        Weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadFile, match=r"has no weights \(model\*.safetensors or pytorch_model\*.bin\)"):
        Weights(tmp_path)
    save_file({EMBED: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(BadFile, match=r"config.json: is not readable JSON"):
        Weights(tmp_path).config()


def test_the_files_are_those_that_transformers_reads(base: Path, tmp_path: Path) -> None:
    """One file before an index, safetensors before old files."""
    source = bad_index(base, tmp_path / "source", {"weight_map": {"odd.weight": "part.safetensors"}})
    save_file({EMBED: torch.ones(2, 2)}, source / "model.safetensors")
    torch.save({EMBED: torch.zeros(2, 2)}, source / "pytorch_model.bin")
    assert Weights(source).load(EMBED).eq(1).all()
    (source / "model.safetensors").unlink()
    with pytest.raises(BadFile, match=r"lacks the tensor odd.weight"):
        Weights(source)
    (source / "model.safetensors.index.json").unlink()
    assert Weights(source).load(EMBED).eq(0).all()


def test_only_what_the_index_names_is_a_tensor(tmp_path: Path) -> None:
    """A tensor that lies in two shards is the one of the shard that the index says."""
    for number in (1, 2):
        save_file(
            {"x": torch.full((2,), float(number)), f"only{number}": torch.ones(1)},
            tmp_path / f"{number}.safetensors",
        )
    (tmp_path / "config.json").write_text("{}")
    index = {"x": "1.safetensors", "only2": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = Weights(tmp_path)
    assert weights.parts() == [["x"], ["only2"]]
    assert weights.load("x").tolist() == [1.0, 1.0]


def test_the_output_of_a_tied_model_is_its_input(tmp_path: Path) -> None:
    """Old files often hold both; then a change of one must not leave the other."""
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    matrix = torch.randn(4, 3)
    torch.save({EMBED: matrix, HEAD: matrix, "x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    weights = Weights(tmp_path)
    assert HEAD not in weights
    assert weights.parts() == [[EMBED, "x"]]
    torch.save({EMBED: matrix, HEAD: matrix + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        BadFile, match=r"ties the output to the embeddings, but lm_head.weight is another matrix"
    ):
        Weights(tmp_path)
