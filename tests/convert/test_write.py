"""Models written in Meta's form."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from hashlib import md5, sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from chinese_llama.convert.layout import Sizes, slots
from chinese_llama.convert.meta import MetaWeights
from chinese_llama.convert.params import hf_config
from chinese_llama.convert.write import ByMeta, rope, save_meta, shard_count
from chinese_llama.errors import DoesNotFit
from chinese_llama.model.shards import BLOCK, EMBED, HEAD, Weights
from tests import tiny
from tests.convert.checkpoints import (
    PARAMS,
    assert_same,
    assert_same_checkpoint,
    checkpoint,
    divided,
    read_checkpoint,
    same_bits,
    whole,
    write_checkpoint,
)


class InMemory:
    """A model of tensors in memory, which notes how many numbers are asked for at once."""

    def __init__(self, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        self.tensors, self._config = tensors, config
        self.most, self.read = 0, 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.tensors[name].shape), self.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self.tensors[name][start:stop].clone()
        self.most, self.read = max(self.most, rows.numel()), self.read + rows.numel()
        return rows

    def load(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, len(self.tensors[name]))

    def config(self) -> dict[str, Any]:
        return self._config

    def parts(self) -> list[list[str]]:
        return [list(self.tensors)]


def in_memory(place: Path, **changes: Any) -> InMemory:
    """The model of a checkpoint."""
    model = MetaWeights(place)
    return InMemory({name: model.load(name) for name in model}, {**model.config(), **changes})


def saved(model: Any, output: Path, **options: Any) -> dict[str, dict[str, str]]:
    output.mkdir()
    return save_meta(model, output, **options)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_same_checkpoint_comes_back(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    place = checkpoint(tmp_path / "meta", shards, dtype=dtype)
    model = MetaWeights(place)
    digests = saved(model, tmp_path / "out", like=model.layout())
    assert_same_checkpoint(tmp_path / "out", place)
    files = sorted((tmp_path / "out").glob("*.pth"))
    assert digests == {file.name: {"sha256": sha256(file.read_bytes()).hexdigest()} for file in files}
    for file in files:
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None


def test_another_hash(tmp_path: Path) -> None:
    model = MetaWeights(checkpoint(tmp_path / "meta"))
    digests = saved(model, tmp_path / "out", hashed=md5)
    expected = md5((tmp_path / "out" / "consolidated.00.pth").read_bytes()).hexdigest()
    assert digests == {"consolidated.00.pth": {"md5": expected}}


@pytest.mark.parametrize(
    "options",
    [
        {"n_kv_heads": 2, "ffn_dim_multiplier": 1.1},
        {"embedding": 0},
        {"ropes": []},
        {"ropes": [f"layers.{layer}.attention.inner_attention.rope.freqs" for layer in range(2)]},
        {"rope_theta": 1000000.0, "vocab_size": 421},
    ],
    ids=str,
)
def test_every_kind_of_checkpoint_comes_back(tmp_path: Path, options: dict[str, Any]) -> None:
    place = checkpoint(tmp_path / "meta", 2, **options)
    model = MetaWeights(place)
    saved(model, tmp_path / "out", like=model.layout())
    assert_same_checkpoint(tmp_path / "out", place)


def test_another_division_of_the_vocabulary_comes_back(tmp_path: Path) -> None:
    shards = divided(whole(PARAMS), 2)
    rows = torch.cat([shard["output.weight"] for shard in shards])
    shards[0]["output.weight"], shards[1]["output.weight"] = rows[:300].clone(), rows[300:].clone()
    place = write_checkpoint(tmp_path / "meta", shards)
    model = MetaWeights(place)
    saved(model, tmp_path / "out", like=model.layout())
    assert_same_checkpoint(tmp_path / "out", place)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_checkpoint_divided_anew(tmp_path: Path, shards: int) -> None:
    """The division is that of the tests' own code, whatever it was before."""
    place = checkpoint(tmp_path / "meta", 2, ropes=[])
    model = MetaWeights(place)
    saved(model, tmp_path / "out", shards=shards, like=model.layout())
    assert_same(read_checkpoint(tmp_path / "out")[0], divided(whole(PARAMS), shards))


def test_large_matrices_go_through_in_blocks(tmp_path: Path) -> None:
    """Blocks, heads and shards end at different rows; each tensor is read once."""
    params = {"dim": 768, "n_layers": 1, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 256, "norm_eps": 1e-5}
    tensors = whole(params, vocab=1501, ffn=1536)
    place = write_checkpoint(tmp_path / "meta", divided(tensors, 1), params)
    model = in_memory(place)
    saved(model, tmp_path / "out", shards=2)
    found, made = read_checkpoint(tmp_path / "out")
    for shard in found:
        assert same_bits(shard.pop("rope.freqs"), rope(10000.0, 128, torch.float16))
    assert_same(found, divided(tensors, 2))
    assert made["vocab_size"] == 1501
    assert 2 * BLOCK < 1501 * 768
    assert model.most <= BLOCK + 2 * 128 * 768  # a block, and the rest of the heads at its ends
    numbers = sum(tensor.numel() for tensor in model.tensors.values())
    assert numbers <= model.read < 1.1 * numbers


def test_a_model_without_a_layout(tmp_path: Path, base: Path) -> None:
    saved(Weights(base), tmp_path / "out")
    (shard,), params = read_checkpoint(tmp_path / "out")
    assert params == {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "multiple_of": 64,
        "ffn_dim_multiplier": 0.7,
        "norm_eps": 1e-06,
        "vocab_size": 420,
    }
    speed = [10000.0 ** (-i / 8) for i in range(0, 8, 2)]
    assert shard["rope.freqs"].dtype == torch.float32
    assert torch.allclose(shard["rope.freqs"], torch.tensor(speed))
    back, source = MetaWeights(tmp_path / "out"), Weights(base)
    assert_same([{name: back.load(name) for name in back}], [{name: source.load(name) for name in source}])


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    """As a merged model has it: everything else stays as it was."""
    place = checkpoint(tmp_path / "meta", 2, vocab=420, vocab_size=420)
    layout, model = MetaWeights(place).layout(), in_memory(place, vocab_size=425)
    for name in (EMBED, HEAD):
        model.tensors[name] = torch.cat([model.tensors[name], torch.randn(5, 32).half()])
    saved(model, tmp_path / "out", like=layout)
    found, params = read_checkpoint(tmp_path / "out")
    old, before = read_checkpoint(place)
    assert params == {**before, "vocab_size": 425}
    assert [len(shard["output.weight"]) for shard in found] == [212, 213]
    assert same_bits(torch.cat([shard["output.weight"] for shard in found]), model.tensors[HEAD])
    assert same_bits(torch.cat([shard["tok_embeddings.weight"] for shard in found], 1), model.tensors[EMBED])
    for new, shard in zip(found, old, strict=True):
        for name in set(shard) - {"output.weight", "tok_embeddings.weight"}:
            assert same_bits(new[name], shard[name]), name


def test_a_model_that_has_become_another(tmp_path: Path) -> None:
    """With another rotary base, the old params.json and buffers would be wrong."""
    place = checkpoint(tmp_path / "meta", 2)
    model = in_memory(place, rope_theta=500000.0)
    saved(model, tmp_path / "out", like=MetaWeights(place).layout())
    found, params = read_checkpoint(tmp_path / "out")
    assert len(found) == 2
    assert params["rope_theta"] == 500000.0
    assert same_bits(found[0]["rope.freqs"], rope(500000.0, 8, torch.float16))


def test_tied_embeddings_are_written_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Weights(tiny.write_llama(tmp_path / "tied", 64, tied=True))
    assert HEAD not in source
    saved(source, tmp_path / "out")
    (shard,), _ = read_checkpoint(tmp_path / "out")
    assert same_bits(shard["output.weight"], source.load(EMBED))
    assert same_bits(shard["tok_embeddings.weight"], source.load(EMBED))
    assert "output.weight is written as a copy" in capsys.readouterr().err


def test_old_rotary_buffers_are_left_out(tmp_path: Path) -> None:
    model = in_memory(checkpoint(tmp_path / "meta"))
    model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    saved(model, tmp_path / "out")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in read_checkpoint(tmp_path / "out")[0][0]


@pytest.mark.parametrize(
    ("dim", "heads", "shards"), [(4096, 32, 1), (5120, 40, 2), (6656, 52, 4), (8192, 64, 8)]
)
def test_published_sizes_have_their_number_of_shards(dim: int, heads: int, shards: int) -> None:
    sizes = Sizes(dim, 1, heads, heads, 3 * dim, 32000)
    tensors = {slot.hf: torch.empty(slot.shape, dtype=torch.float16, device="meta") for slot in slots(sizes)}
    params = {"dim": dim, "n_layers": 1, "n_heads": heads, "norm_eps": 1e-05}
    named = ByMeta(InMemory(tensors, hf_config(params, sizes, torch.float16, 2048)))
    assert shard_count(named, None, None) == shards
    assert shard_count(named, 1, {"shards": 2}) == 1
    assert shard_count(named, None, {"shards": 2}) == 2


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        (0, None),
        (-1, "-1 shards"),
        (101, "101 shards: Meta's format has from 1 to 100"),
        (3, "4 heads do not divide over 3 shards"),
        (4, "2 key/value heads do not divide over 4 shards; give another number"),
    ],
)
def test_shards_that_do_not_come_out_even(tmp_path: Path, shards: int, said: str | None) -> None:
    model = MetaWeights(checkpoint(tmp_path / "meta", 2, n_kv_heads=2))
    if said is None:
        assert len(saved(model, tmp_path / "out", shards=shards)) == 1  # 0 is "not asked for"
        return
    with pytest.raises(DoesNotFit, match=said):
        saved(model, tmp_path / "out", shards=shards)
    assert not list((tmp_path / "out").iterdir())


def test_rows_that_do_not_come_out_even(tmp_path: Path) -> None:
    params = {**PARAMS, "multiple_of": 1}
    place = write_checkpoint(tmp_path / "meta", [whole(params, ffn=85)], params)
    with pytest.raises(DoesNotFit, match="85 rows of the feed-forward do not divide over 2 shards"):
        saved(MetaWeights(place), tmp_path / "out", shards=2)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({EMBED: None}, f"no tensor {EMBED}"),
        ({HEAD: None}, f"no tensor {HEAD}"),
        ({Q: None}, f"no tensor {Q}"),
        ({Q: torch.ones(32, 16)}, rf"{Q} is \[32, 16\], and config.json makes it \[32, 32\]"),
        ({Q: torch.ones(32, 32, dtype=torch.int8)}, f"{Q} is of the type torch.int8"),
        ({Q.replace("weight", "bias"): torch.ones(32)}, "q_proj.bias, which Meta's format has no place for"),
    ],
)
def test_tensors_that_metas_format_has_no_place_for(
    tmp_path: Path, change: dict[str, torch.Tensor | None], said: str
) -> None:
    model = in_memory(checkpoint(tmp_path / "meta"))
    kept = {**model.tensors, **change}
    model.tensors = {name: tensor for name, tensor in kept.items() if tensor is not None}
    with pytest.raises(DoesNotFit, match=said):
        saved(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_models_of_another_kind(tmp_path: Path) -> None:
    model = in_memory(checkpoint(tmp_path / "meta"), model_type="mistral")
    with pytest.raises(DoesNotFit, match="of type llama, not mistral"):
        saved(model, tmp_path / "out")
