"""Checkpoints in Meta's form, read as models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.convert import meta
from chinese_llama.convert.layout import to_halves
from chinese_llama.convert.meta import MetaWeights, open_model
from chinese_llama.errors import BadFile, DoesNotFit
from chinese_llama.model.shards import EMBED, HEAD, Weights
from tests.convert.checkpoints import (
    PARAMS,
    assert_same,
    checkpoint,
    divided,
    same_bits,
    whole,
    write_checkpoint,
)

WQ, WK, W1 = (f"layers.0.{name}.weight" for name in ("attention.wq", "attention.wk", "feed_forward.w1"))
Q = "model.layers.0.self_attn.q_proj.weight"


def expected(
    params: dict[str, Any], vocab: int = 421, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """The model by Hugging Face's names, from the undivided tensors."""
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    top = {"tok_embeddings.weight": EMBED, "norm.weight": "model.norm.weight", "output.weight": HEAD}
    found = {}
    for name, tensor in whole(params, vocab, dtype=dtype).items():
        if name in top:
            found[top[name]] = tensor
            continue
        _, layer, part = name.removesuffix(".weight").split(".", 2)
        if part.endswith((".wq", ".wk")):
            tensor = to_halves(tensor, params["dim"] // params["n_heads"])
        found[f"model.layers.{layer}.{names[part]}.weight"] = tensor
    return found


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_tensors_are_whole_and_in_order(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    model = MetaWeights(checkpoint(tmp_path / "meta", shards, dtype=dtype))
    assert_same([{name: model.load(name) for name in model}], [expected(PARAMS, dtype=dtype)])
    assert all(model.meta(name) == (tuple(model.load(name).shape), dtype) for name in model)
    assert EMBED in model
    assert "rope.freqs" not in model


def test_key_value_heads_of_their_own(tmp_path: Path) -> None:
    model = MetaWeights(checkpoint(tmp_path / "meta", 2, n_kv_heads=2))
    assert_same([{name: model.load(name) for name in model}], [expected({**PARAMS, "n_kv_heads": 2})])
    assert model.config()["num_key_value_heads"] == 2


def test_embeddings_divided_by_rows(tmp_path: Path) -> None:
    model = MetaWeights(checkpoint(tmp_path / "meta", 2, embedding=0))
    assert same_bits(model.load(EMBED), whole(PARAMS)["tok_embeddings.weight"])
    assert model.layout()["divided"] == {"tok_embeddings.weight": {"dim": 0, "parts": [210, 211]}}


@pytest.fixture(scope="module")
def divided_model(tmp_path_factory: pytest.TempPathFactory) -> MetaWeights:
    return MetaWeights(checkpoint(tmp_path_factory.mktemp("meta") / "meta", 4, embedding=0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rows_are_those_of_the_whole(divided_model: MetaWeights, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(divided_model)))
    start = data.draw(st.integers(0, divided_model.meta(name)[0][0]))
    stop = data.draw(st.integers(0, divided_model.meta(name)[0][0] + 3))
    assert same_bits(
        divided_model.rows(name, start, stop), divided_model.load(name)[start : max(start, stop)]
    )


def test_shared_storages_and_views(tmp_path: Path) -> None:
    """What torch.save may have made of tensors that were views."""
    tensors = whole(PARAMS)
    both = torch.cat([tensors["tok_embeddings.weight"], tensors["output.weight"]])
    views = {
        **tensors,
        "tok_embeddings.weight": both[:421],
        "output.weight": both[421:],
        WQ: tensors[WQ].T.contiguous().T,
        W1: torch.cat([tensors[W1], tensors[W1]], dim=1)[:, :32],
    }
    assert not views[WQ].is_contiguous()
    model = MetaWeights(write_checkpoint(tmp_path / "meta", [views]))
    assert_same([{name: model.load(name) for name in model}], [expected(PARAMS)])


def test_the_oldest_files_of_torch(tmp_path: Path) -> None:
    """Those that are no zip archives."""
    place = checkpoint(tmp_path / "meta")
    file = place / "consolidated.00.pth"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    model = MetaWeights(place)
    assert_same([{name: model.load(name) for name in model}], [expected(PARAMS)])


def test_config(tmp_path: Path) -> None:
    one = MetaWeights(checkpoint(tmp_path / "one")).config()
    assert one["max_position_embeddings"] == 2048
    assert (one["vocab_size"], one["intermediate_size"], one["torch_dtype"]) == (421, 96, "float16")
    place = checkpoint(tmp_path / "two", dtype=torch.bfloat16, rope_theta=50000, vocab_size=421)
    assert MetaWeights(place).config()["rope_theta"] == 50000.0
    assert MetaWeights(place, context=512).config()["max_position_embeddings"] == 512
    assert (
        MetaWeights(checkpoint(tmp_path / "c", dtype=torch.bfloat16)).config()["max_position_embeddings"]
        == 4096
    )


def test_parts_are_not_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MetaWeights(checkpoint(tmp_path / "meta"))
    assert model.parts() == [list(model)]
    monkeypatch.setattr(meta, "MAX_SHARD", 30000)
    parts = model.parts()
    assert [name for part in parts for name in part] == list(model)
    sizes = [sum(model.load(name).nbytes for name in part) for part in parts]
    assert len(parts) > 2
    assert max(sizes) <= 30000
    monkeypatch.setattr(meta, "MAX_SHARD", 10)
    assert model.parts() == [[name] for name in model]


def test_layout_keeps_the_rotary_buffers(tmp_path: Path) -> None:
    names = [f"layers.{layer}.attention.inner_attention.rope.freqs" for layer in range(2)]
    layout = MetaWeights(checkpoint(tmp_path / "a", 2, ropes=["rope.freqs", *names])).layout()
    values = bytes(torch.linspace(1, 0.001, 4).half().view(torch.uint8).numpy()).hex()
    assert layout == {
        "params": PARAMS,
        "shards": 2,
        "divided": {},
        "rope": [{"names": ["rope.freqs", *names], "dtype": "F16", "values": values}],
    }
    assert json.loads(json.dumps(layout)) == layout
    assert MetaWeights(checkpoint(tmp_path / "b", ropes=[])).layout()["rope"] == []


def test_open_model_finds_the_form(tmp_path: Path, base: Path) -> None:
    place = checkpoint(tmp_path / "meta")
    assert isinstance(open_model(place), MetaWeights)
    assert isinstance(open_model(base), Weights)
    (place / "params.json").unlink()
    with pytest.raises(BadFile, match=r"params.json: no such file"):
        open_model(place)
    shutil.copyfile(base / "config.json", place / "config.json")
    with pytest.raises(BadFile, match="has no weights"):
        open_model(place)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    place = checkpoint(tmp_path / "meta", 4)
    (place / "consolidated.03.pth").unlink()
    with pytest.raises(BadFile, match=r"3 shards makes .*is a shard missing"):
        MetaWeights(place)
    (place / "consolidated.01.pth").unlink()
    with pytest.raises(
        BadFile, match=r"consolidated.01.pth: this shard is missing \(consolidated.02.pth is there\)"
    ):
        MetaWeights(place)
    for file in place.glob("*.pth"):
        file.unlink()
    with pytest.raises(BadFile, match=r"has no consolidated\.00\.pth"):
        MetaWeights(place)


def test_a_damaged_shard(tmp_path: Path) -> None:
    place = checkpoint(tmp_path / "meta", 2)
    file = place / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(BadFile, match=r"consolidated.01.pth: is damaged"):
        MetaWeights(place)


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    def opened(name: str, change: Any) -> None:
        tensors = divided(whole(PARAMS), 2)
        change(tensors[1])
        MetaWeights(write_checkpoint(tmp_path / name, tensors))

    with pytest.raises(BadFile, match=r"01.pth: lacks the tensor norm.weight, which consolidated.00.pth has"):
        opened("a", lambda shard: shard.pop("norm.weight"))
    with pytest.raises(BadFile, match=r"00.pth: lacks the tensor rope.freqs, which consolidated.01.pth has"):
        opened("b", lambda shard: shard.update({"rope.freqs": torch.ones(4)}))
    with pytest.raises(
        BadFile, match=r"01.pth: layers.0.feed_forward.w1.weight is \[3, 32\] of torch.float16, and \[48"
    ):
        opened("c", lambda shard: shard.update({W1: torch.ones(3, 32).half()}))
    with pytest.raises(BadFile, match=r"01.pth: .*w1.weight is \[48, 32\] of torch.bfloat16"):
        opened("d", lambda shard: shard.update({W1: shard[W1].bfloat16()}))
    with pytest.raises(BadFile, match=r"01.pth: norm.weight differs from the one in consolidated.00.pth"):
        opened("e", lambda shard: shard["norm.weight"].mul_(2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.0.feed_forward.experts.0.w1.weight": torch.ones(2)}, "experts.0.w1.weight, which LLaMA 1 and 2"),
        ({"layers.2.attention.wq.weight": torch.ones(32, 32)}, "has the tensor layers.2.attention.wq.weight"),
        ({W1: None}, f"lacks the tensor {W1}"),
        ({"norm.weight": None}, "lacks the tensor norm.weight"),
        ({"output.weight": None}, "lacks the tensor output.weight"),
        ({WK: torch.ones(16, 32)}, rf"{WK} of 1 shards makes \[16, 32\] together, and params.json says \[32, 32\]"),
        ({"norm.weight": torch.ones(32, 1)}, "norm.weight of 1 shards"),
        ({WQ: torch.ones(32)}, f"{WQ} of 1 shards"),
        ({"norm.weight": torch.ones(32, dtype=torch.int8)}, "norm.weight has the shape .* and the type torch.int8"),
        ({"norm.weight": torch.tensor(1.0)}, r"norm.weight has the shape \[\]"),
        ({"tok_embeddings.weight": torch.ones(400, 32)}, "tok_embeddings.weight of 1 shards"),
    ],
)  # fmt: skip
def test_tensors_that_no_llama_has(tmp_path: Path, change: dict[str, torch.Tensor | None], said: str) -> None:
    tensors = {**whole(PARAMS), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(BadFile, match=said) as caught:
        MetaWeights(write_checkpoint(tmp_path / "meta", [kept]))
    assert "consolidated.00.pth" in str(caught.value)


def test_more_layers_than_tensors(tmp_path: Path) -> None:
    """Told before a list of all their names is made."""
    place = write_checkpoint(tmp_path / "meta", [whole(PARAMS)])
    (place / "params.json").write_text(json.dumps({**PARAMS, "n_layers": 10**9}))
    with pytest.raises(BadFile, match=r"params.json: says 1,000,000,000 layers, more than there are tensors"):
        MetaWeights(place)


def test_a_vocabulary_that_the_tensors_contradict(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"params.json: says vocab_size 32,000, and output.weight has 421 rows"):
        MetaWeights(checkpoint(tmp_path / "meta", vocab_size=32000))


def test_the_tokenizer_beside_or_above(tmp_path: Path, base: Path) -> None:
    place = checkpoint(tmp_path / "LLaMA" / "7B", 2)
    assert MetaWeights(place).tokenizer is None
    shutil.copyfile(base / "tokenizer.model", tmp_path / "LLaMA" / "tokenizer.model")
    assert MetaWeights(place).tokenizer == tmp_path / "LLaMA" / "tokenizer.model"
    shutil.copyfile(base / "tokenizer.model", place / "tokenizer.model")
    assert MetaWeights(place).tokenizer == place / "tokenizer.model"


def test_tokenizers_of_other_models(tmp_path: Path, base: Path) -> None:
    place = checkpoint(tmp_path / "meta", vocab=300)
    shutil.copyfile(base / "tokenizer.model", place / "tokenizer.model")
    with pytest.raises(DoesNotFit, match=r"has 420 pieces, and output.weight in .* 300 rows"):
        MetaWeights(place)
    (place / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(BadFile, match="is LLaMA 3's"):
        MetaWeights(place)
    (place / "tokenizer.model").write_text("{}")
    with pytest.raises(BadFile, match="is not a SentencePiece model"):
        MetaWeights(place)
