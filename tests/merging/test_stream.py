"""merge: our weights against PEFT's own merge and against float64; whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chinese_llama.artifacts import Manifest, identity, input_record, read_manifest, write_manifest
from chinese_llama.directories import MANIFEST
from chinese_llama.errors import BadFile, DoesNotFit, OutputExists, UserError
from chinese_llama.merging import stream
from chinese_llama.merging.plan import Step, load
from chinese_llama.model.shards import EMBED, HEAD, Weights
from chinese_llama.vocab.proto import read_model
from tests import tiny
from tests.model.test_adapters import FILE, peft_adapter

EPS = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
IDS = torch.tensor([[1, 5, 300, 419, 410, 7, 88]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2, "^model.layers.0.self_attn.v_proj": 3},
        "alpha_pattern": {"self_attn.o_proj": 32, "up_proj": 5, r"layers\.\d+\.mlp\.down_proj": 1},
    },
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "dora": {"target_modules": ALL, "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head-and-rows": {
        "target_modules": ["q_proj", "lm_head"],
        "trainable_token_indices": {"embed_tokens": [419, 5]},
    },
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [419, 5], "lm_head": [419, 7]}},
    "same-rows": {"trainable_token_indices": [5, 410, 419]},
    "full": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def bases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    found = {"float32": base, "tied": tiny.write_base(folder / "tied", tiny.base_tokenizer(), tied=True)}
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model.save_pretrained(str(folder / name), max_shard_size="20KB")
        shutil.copy(base / "tokenizer.model", folder / name)
        found[name] = folder / name
    return found


def merge(base: Path, places: list[Path], output: Path, **options: Any) -> Manifest:
    """Merge in sequence; options are those of `stream.Options`, and `keep`."""
    keep = {"keep": options.pop("keep")} if "keep" in options else {}
    steps = [Step([load(place.name, place)]) for place in places]
    return stream.merge(base, steps, output, stream.Options(**options), **keep)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def by_peft(base: Path, places: list[Path], rows: int | None = None) -> torch.Tensor:
    """Logits of PEFT's own merge, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows)
    for place in places:
        model = PeftModel.from_pretrained(model, place).merge_and_unload()
    return logits(model)


def ours(output: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return logits(model)


def in_float64(base: Path, places: list[Path]) -> dict[str, torch.Tensor]:
    """W + scale * B @ A of plain LoRA adapters (one rank, one alpha), written without our code."""
    source = Weights(base)
    exact = {name: source.load(name).double() for name in source}
    for place in places:
        config, held = json.loads((place / "adapter_config.json").read_text()), load_file(place / FILE)
        for key in held:
            name = key.removeprefix("base_model.model.")
            if name.endswith(".lora_A.weight"):
                pair = (held[key.replace("lora_A", "lora_B")].double(), held[key].double())
                scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
                exact[name.replace(".lora_A", "")] += scale * pair[0] @ pair[1]
            elif ".lora_" not in name:
                exact[name] = held[key].double()
    return exact


def assert_rounded_once(output: Path, exact: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    merged = Weights(output)
    assert set(merged) == set(exact)
    for name, wanted in exact.items():
        found = merged.load(name)
        assert found.dtype == dtype
        assert ((found.double() - wanted).abs() <= EPS[dtype] * wanted.abs() + 1e-6).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_pefts_own_merge(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    place = peft_adapter(bases["float32"], tmp_path / "a", **KINDS[kind])
    merge(bases["float32"], [place], tmp_path / "out")
    theirs = by_peft(bases["float32"], [place])
    torch.testing.assert_close(ours(tmp_path / "out"), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, by_peft(bases["float32"], []), atol=1e-2)


@pytest.mark.parametrize(
    "config",
    [
        {"trainable_token_indices": {"embed_tokens": [5, 419]}, "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 419]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ALL},
    ],
    ids=str,
)
def test_a_tied_base_gives_pefts_logits_and_stays_tied(
    bases: dict[str, Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    place = peft_adapter(bases["tied"], tmp_path / "a", **config)
    merge(bases["tied"], [place], tmp_path / "out")
    assert HEAD not in Weights(tmp_path / "out")
    wanted = by_peft(bases["tied"], [place])
    torch.testing.assert_close(ours(tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_two_adapters_are_added_in_float32_and_rounded_once(
    bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype, rslora: bool
) -> None:
    base = bases[str(dtype).removeprefix("torch.")]
    first = peft_adapter(base, tmp_path / "first", use_rslora=rslora, target_modules=ALL)
    second = peft_adapter(base, tmp_path / "second", seed=2, r=2, lora_alpha=3)
    merge(base, [first, second], tmp_path / "out")
    assert_rounded_once(tmp_path / "out", in_float64(base, [first, second]), dtype)
    assert len(Weights(tmp_path / "out").shards) == len(Weights(base).shards)
    theirs = by_peft(base, [first, second])
    loose = 1e-4 if dtype == torch.float32 else 300 * EPS[dtype]
    torch.testing.assert_close(ours(tmp_path / "out"), theirs, rtol=loose, atol=loose)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_layout_of_the_reference(
    bases: dict[str, Path], tokenizer: Path, tmp_path: Path, dtype: str
) -> None:
    """LoRA plus whole matrices at a larger vocabulary, on the small base; then one row more."""
    model = read_model(tokenizer / "tokenizer.model")
    base, rows = bases[dtype], len(model.pieces)
    first = peft_adapter(base, tmp_path / "p", rows, target_modules=ALL, **KINDS["full"])
    second = peft_adapter(base, tmp_path / "s", rows + 1, seed=2, target_modules=ALL, **KINDS["full"])
    tiny.write_model(first / "tokenizer.model", model)
    model.pieces.add(piece="[PAD]", score=0.0)
    tiny.write_model(second / "tokenizer.model", model)
    manifest = merge(base, [first, second], tmp_path / "out")
    assert manifest.metrics["rows"] == rows + 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows + 1
    exact = in_float64(base, [first, second])
    assert_rounded_once(tmp_path / "out", exact, getattr(torch, dtype))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for place, size in ((first, rows), (second, rows + 1)):
        model.resize_token_embeddings(size)
        model = PeftModel.from_pretrained(model, place).merge_and_unload()
    loose = 1e-4 if dtype == "float32" else 300 * EPS[torch.float16]
    torch.testing.assert_close(ours(tmp_path / "out"), logits(model), rtol=loose, atol=loose)
    with pytest.raises(
        DoesNotFit, match=rf"'p' has {rows} embedding rows, what lies below it {rows + 1}: .*never shrinks"
    ):
        merge(base, [second, first], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_tokenizer_that_an_adapter_brings_works_in_the_merged_model(
    base: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """The published adapters carry only tokenizer.model; all readers must give its ids."""
    size = len(read_model(tokenizer / "tokenizer.model").pieces)
    place = peft_adapter(base, tmp_path / "a", size, **KINDS["full"])
    shutil.copy(tokenizer / "tokenizer.model", place)
    assert merge(base, [place], tmp_path / "out").vocab_size == size
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("The river 2023", "  two", "中国的首都是北京", "a\n"):
        assert found(text, add_special_tokens=False).input_ids == reference.encode(text), text


def test_a_tokenizer_with_more_pieces_than_rows_is_refused(
    base: Path, tokenizer: Path, tmp_path: Path
) -> None:
    place = peft_adapter(base, tmp_path / "a")
    shutil.copy(tokenizer / "tokenizer.model", place)
    with pytest.raises(DoesNotFit, match=r"tokenizer in .* has \d+ pieces, the merged model 420 rows"):
        merge(base, [place], tmp_path / "out")


def recorded(place: Path, base: Path, below: list[Path]) -> Path:
    """Give an adapter the manifest that the recipes write."""
    inputs = {"base": input_record(base)}
    inputs |= {f"parent:{i}": input_record(path) for i, path in enumerate(below)}
    write_manifest(place, Manifest("adapter", "pt_lora", inputs))
    return place


def test_the_manifest_says_what_was_merged_and_lineage_is_held(extended: Path, tmp_path: Path) -> None:
    plus = recorded(peft_adapter(extended, tmp_path / "plus"), extended, [])
    alpaca = recorded(peft_adapter(extended, tmp_path / "alpaca", seed=2), extended, [plus])
    merge(extended, [plus, alpaca], tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.settings["loras"] == ["plus", "alpaca"]
    wanted = {"base": extended, "adapter:0": plus, "adapter:1": alpaca}
    assert {role: record["sha256"] for role, record in manifest.inputs.items()} == {
        role: identity(path) for role, path in wanted.items()
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("`plus`") < card.index("`alpaca`")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
        == AutoTokenizer.from_pretrained(extended).get_vocab()
    )
    for wrong, told in (
        ([alpaca, plus], "must be merged right after"),
        ([plus, plus], "are the same one"),
    ):
        with pytest.raises(DoesNotFit, match=told):
            merge(extended, wrong, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_merge_that_fails_half_way_leaves_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    """The overflow shows only when the last shards are written."""
    place = peft_adapter(bases["float16"], tmp_path / "a", target_modules=["down_proj"])
    held = {
        key: tensor * 1e5 if "layers.1" in key else tensor for key, tensor in load_file(place / FILE).items()
    }
    save_file(held, place / FILE)
    for output in (tmp_path / "out", tmp_path / "new" / "deep" / "out"):
        with pytest.raises(
            UserError, match=r"layers.1.mlp.down_proj.weight overflows torch.float16 when merged"
        ):
            merge(bases["float16"], [place], output)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_force_that_fails_keeps_what_was_there(base: Path, tmp_path: Path) -> None:
    good = peft_adapter(base, tmp_path / "good")
    merge(base, [good], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    bad = shutil.copytree(good, tmp_path / "bad")
    (bad / FILE).write_bytes((good / FILE).read_bytes()[:-50])
    with pytest.raises(BadFile, match="is damaged"):
        merge(base, [bad], tmp_path / "out", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "out"]


def test_an_existing_output_is_replaced_only_by_force(base: Path, tmp_path: Path) -> None:
    place = peft_adapter(base, tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "out" / MANIFEST).write_text('{"kind": "x", "command": "x"}')
    with pytest.raises(OutputExists, match="out exists; --force replaces it"):
        merge(base, [place], tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    merge(base, [place], tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert EMBED in Weights(tmp_path / "out")
    assert merge(base, [place], tmp_path / "out", keep=True) == read_manifest(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]
