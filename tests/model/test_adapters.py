"""Adapters as PEFT saves them: which tensors are merged, which are refused, and that none is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.merging.fit import check_fit
from chinese_llama.merging.merged import Merged, bake
from chinese_llama.merging.plan import Adapter, Step, load
from chinese_llama.merging.stream import load_steps
from chinese_llama.model.adapters import read_tensors
from chinese_llama.model.shards import EMBED, HEAD, Changed, Weights
from tests import tiny

FILE = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def peft_adapter(
    base: Path,
    output: Path,
    rows: int | None = None,
    seed: int = 1,
    embeddings: bool | str = False,
    **config: Any,
) -> Path:
    """An adapter that peft itself made of `base` (first grown to `rows`), as if trained: all of its
    tensors are noise around where they start. `embeddings`: PEFT's save_embedding_layers ("auto" by default there)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # LoRA's A is drawn from torch's own numbers
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    wrapped.save_pretrained(str(output), save_embedding_layers=embeddings)
    return output


def edited(source: Path, output: Path, config: dict[str, Any] | None = None, **tensors: Any) -> Adapter:
    """A copy of an adapter with `tensors` set by name; those that are None are removed."""
    shutil.copytree(source, output)
    held = load_file(source / FILE)
    for key, tensor in tensors.items():
        held.pop(key, None) if tensor is None else held.update({key: tensor})
    save_file(held, output / FILE)
    text = json.loads((source / "adapter_config.json").read_text())
    (output / "adapter_config.json").write_text(json.dumps({**text, **(config or {})}))
    return load("edited", output)


def changes(base: Path, *adapters: Path | Adapter) -> dict[str, torch.Tensor]:
    """The weights that merging the adapters changes."""
    found = [a if isinstance(a, Adapter) else load(a.name, a) for a in adapters]
    loaded, source = load_steps([Step([adapter]) for adapter in found]), Weights(base)
    made = Merged(source, loaded).changes(check_fit(source, base, loaded))
    return {name: Changed(source, made).load(name) for name in made}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def lora(base: Path, folder: Path) -> Path:
    return peft_adapter(base, folder / "lora")


@pytest.fixture(scope="module")
def tied(folder: Path) -> Path:
    return tiny.write_base(folder / "tied", tiny.base_tokenizer(), tied=True)


def test_every_tensor_finds_its_weight(base: Path, folder: Path) -> None:
    ids = [410, 3]
    place = peft_adapter(base, folder / "rows", trainable_token_indices={"embed_tokens": ids, "lm_head": ids})
    found = read_tensors(load("rows", place))
    layers = [f"model.layers.{i}.self_attn.{m}_proj.weight" for i in (0, 1) for m in "qv"]
    assert sorted(found.pairs) == layers
    assert set(found.rows) == {EMBED, HEAD}
    assert (
        found.rows[EMBED][0]
        == json.loads((place / "adapter_config.json").read_text())["trainable_token_indices"]["embed_tokens"]
    )
    assert found.vocabulary() == 411
    assert sorted(changes(base, place)) == sorted([*layers, EMBED, HEAD])
    assert read_tensors(load("lora", peft_adapter(base, folder / "plain"))).vocabulary() is None


def test_the_old_bin_file_holds_the_same(lora: Path, tmp_path: Path) -> None:
    shutil.copy(lora / "adapter_config.json", tmp_path)
    torch.save(load_file(lora / FILE), tmp_path / "adapter_model.bin")
    old, new = (read_tensors(load("a", place)) for place in (tmp_path, lora))
    assert set(old.pairs) == set(new.pairs)
    for name in new.pairs:
        one, other = old.factors(name), new.factors(name)
        assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)


def test_bake_gives_what_merge_writes(base: Path, lora: Path, folder: Path) -> None:
    ids = {"embed_tokens": [5, 419], "lm_head": [5, 419]}
    rows = peft_adapter(base, folder / "rows2", seed=2, trainable_token_indices=ids)
    adapters = [load(place.name, place) for place in (lora, rows)]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    bake(model, load_steps([Step([adapter]) for adapter in adapters]))
    state, merged = model.state_dict(), changes(base, *adapters)
    before = load_file(base / "model.safetensors")
    for name in before:
        assert torch.equal(state[name], merged[name] if name in merged else before[name]), name


@pytest.mark.parametrize(
    "config",
    [
        {"lora_bias": True},
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_kinds_that_cannot_be_merged_are_refused(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    place = peft_adapter(base, tmp_path / "odd", **config)
    with pytest.raises(BadFile, match=r"adapter_model.safetensors: .* cannot be merged"):
        read_tensors(load("odd", place))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_moved_their_base_are_refused(base: Path, tmp_path: Path, init: str) -> None:
    """PiSSA and OLoRA subtract their start from the base, so W + BA is not what was trained."""
    place = peft_adapter(base, tmp_path / "odd", init_lora_weights=init)
    with pytest.raises(BadFile, match=init):
        changes(base, place)


@pytest.mark.parametrize(
    ("key", "tensor", "told"),
    [
        (f"{Q}.lora_A.weight", None, "self_attn.q_proj has only one half of its LoRA pair"),
        (f"{Q}.lora_B.weight", None, "self_attn.q_proj has only one half of its LoRA pair"),
        (f"{Q}.lora_B.weight", torch.empty(0), "q_proj.lora_B.weight is empty; was it saved under ZeRO-3"),
        (f"{Q}.lora_A.weight", torch.ones(3, 32), r"q_proj: LoRA shapes \(3, 32\) and .* not of rank 4"),
        (f"{Q}.lora_B.bias", torch.ones(32), "lora_B.bias is of a kind that cannot be merged"),
        ("stray", torch.ones(2), "the tensor stray is of a kind that cannot be merged"),
        (f"{Q}.trainable_tokens_delta", torch.ones(2, 32), "does not say which token ids"),
    ],
)
def test_a_bad_tensor_is_named(lora: Path, tmp_path: Path, key: str, tensor: Any, told: str) -> None:
    with pytest.raises(BadFile, match=told):
        read_tensors(edited(lora, tmp_path / "bad", **{key: tensor}))


def test_a_damaged_or_empty_file_is_refused(lora: Path, tmp_path: Path) -> None:
    adapter = edited(lora, tmp_path / "bad")
    (tmp_path / "bad" / FILE).write_bytes((lora / FILE).read_bytes()[:-100])
    with pytest.raises(BadFile, match=f"{FILE}: is damaged or not a weights file"):
        read_tensors(adapter)
    save_file({}, tmp_path / "bad" / FILE)
    with pytest.raises(BadFile, match="holds no tensors"):
        read_tensors(adapter)


@pytest.mark.parametrize(
    ("key", "tensor", "told"),
    [
        (Q.replace("layers.0", "layers.7"), (4, 32, 32), "changes model.layers.7.* which .* does not have"),
        (Q, (4, 32, 48), r"has \(48, 32\) for model.layers.0.self_attn.q_proj.weight, the base \(32, 32\)"),
        (Q, (4, 24, 32), r"has \(32, 24\) for model.layers.0"),
    ],
)
def test_lora_that_does_not_fit_the_base_is_refused(
    base: Path, lora: Path, tmp_path: Path, key: str, tensor: tuple[int, int, int], told: str
) -> None:
    rank, into, out = tensor
    pair = {f"{key}.lora_A.weight": torch.ones(rank, into), f"{key}.lora_B.weight": torch.ones(out, rank)}
    with pytest.raises(DoesNotFit, match=told):
        changes(base, edited(lora, tmp_path / "bad", **pair))


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (
            {EMBED: (400, 32), HEAD: (400, 32)},
            "has 400 embedding rows, what lies below it 420: .*never shrinks",
        ),
        ({EMBED: (430, 16), HEAD: (430, 32)}, "has 16 columns in model.embed_tokens.weight, the base 32"),
        ({EMBED: (430, 32)}, "lm_head.weight must grow to 430 rows, but no adapter has 10 of them"),
        ({EMBED: (430, 32), HEAD: (425, 32)}, "lm_head.weight must grow to 430 rows, .* has 5 of them"),
        ({"model.norm.weight": (31,)}, "has another shape for model.norm.weight"),
        ({"model.extra.weight": (31,)}, "changes model.extra.weight, which .* does not have"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(
    base: Path, lora: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], told: str
) -> None:
    whole = {f"base_model.model.{name}": torch.ones(shape) for name, shape in tensors.items()}
    with pytest.raises(DoesNotFit, match=told):
        changes(base, edited(lora, tmp_path / "bad", **whole))


def test_single_rows_beyond_the_base_need_an_owner(base: Path, extended: Path, tmp_path: Path) -> None:
    ids = {"embed_tokens": [425, 430], "lm_head": [425, 430]}
    place = peft_adapter(extended, tmp_path / "rows", trainable_token_indices=ids)
    assert set(changes(extended, place)) >= {EMBED, HEAD}
    with pytest.raises(
        DoesNotFit, match=r"must grow to 431 rows, but no adapter has 9 of them; .*extend-model"
    ):
        changes(base, place)


def test_on_a_tied_base_nothing_of_the_head_is_lost_silently(tied: Path, tmp_path: Path) -> None:
    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    place = peft_adapter(tied, tmp_path / "two", **both)
    with pytest.raises(DoesNotFit, match=r"has an lm_head of its own, but .* ties it to the embeddings"):
        changes(tied, place)
    head_only = peft_adapter(tied, tmp_path / "rows", trainable_token_indices={"lm_head": [1, 2]})
    with pytest.raises(DoesNotFit, match="has an lm_head of its own"):
        changes(tied, head_only)


def test_lora_on_a_tied_head_is_refused(tied: Path, tmp_path: Path) -> None:
    place = peft_adapter(tied, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    with pytest.raises(DoesNotFit, match="lm_head"):
        changes(tied, place)


def test_an_fp16_matrix_below_a_lora_is_not_rounded_twice(base: Path, lora: Path, tmp_path: Path) -> None:
    """Published adapters are float16: their matrices must not drag later deltas down to float16."""
    whole = torch.randn(420, 32, generator=torch.Generator().manual_seed(3)).half()
    first = edited(lora, tmp_path / "first", **{f"base_model.model.{HEAD}": whole})
    second = load("second", peft_adapter(base, tmp_path / "second", target_modules=["lm_head"]))
    pair = read_tensors(second).factors(HEAD)
    exact = whole.double() + pair.left.double() @ pair.right.double()
    merged = changes(base, first, second)[HEAD]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=1e-6)


def test_rows_of_a_later_adapter_replace_what_an_earlier_one_added(base: Path, tmp_path: Path) -> None:
    """Trained rows hold final values; a LoRA below them must not be added on top."""
    first = peft_adapter(base, tmp_path / "first", target_modules=["lm_head"])
    second = peft_adapter(base, tmp_path / "second", seed=2, trainable_token_indices={"lm_head": [7, 9]})
    tensors = read_tensors(load("second", second))
    ids, key = tensors.rows[HEAD]
    torch.testing.assert_close(changes(base, first, second)[HEAD][ids], tensors.file.load(key))


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        (f"{Q}.lora_B.weight", torch.full((32, 4), torch.nan)),
        (f"{Q}.lora_A.weight", torch.full((4, 32), torch.inf)),
    ],
)
def test_a_tensor_that_is_not_finite_is_named(
    base: Path, lora: Path, tmp_path: Path, key: str, tensor: torch.Tensor
) -> None:
    with pytest.raises(BadFile, match=f"{FILE}: the tensor {key} has values that are not finite"):
        changes(base, edited(lora, tmp_path / "bad", **{key: tensor}))


def test_a_base_that_is_not_finite_is_named(base: Path, lora: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(base, tmp_path / "base")
    held = load_file(base / "model.safetensors")
    name = f"{Q.removeprefix('base_model.model.')}.weight"
    held[name][3, 3] = torch.inf
    save_file(held, bad / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} of the base has values that are not finite"):
        changes(bad, lora)


def test_what_the_configuration_lists_must_be_in_the_file(base: Path, lora: Path, tmp_path: Path) -> None:
    """An adapter of which a module is lost merges without a word, and babbles."""
    targets = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
    with pytest.raises(
        BadFile, match=r"has no tensors for up_proj, which adapter_config.json lists in target_modules"
    ):
        changes(base, edited(lora, tmp_path / "a", targets))
    with pytest.raises(BadFile, match=r"has no tensors for lm_head, which .* lists in modules_to_save"):
        changes(base, edited(lora, tmp_path / "b", {"modules_to_save": ["lm_head"]}))
    changes(base, edited(lora, tmp_path / "c", {"target_modules": ["q_proj", "v_proj", "no_such_module"]}))
    told: list[str] = []
    lost = edited(lora, tmp_path / "d", targets)
    check_fit(Weights(base), base, load_steps([Step([lost])]), told)
    assert len(told) == 1 and "has no tensors for up_proj" in told[0]


def test_fan_in_fan_out_turns_what_only_fits_turned(base: Path, tmp_path: Path) -> None:
    """PEFT ignores the flag for linear layers, which LLaMA's are; a file whose factors are those of the
    transposed weights is turned, its square ones too."""
    place = peft_adapter(base, tmp_path / "a", target_modules=["q_proj", "up_proj"])
    plain = changes(base, place)
    flag = {"fan_in_fan_out": True}
    held = load_file(place / FILE)
    same = changes(base, edited(place, tmp_path / "same", flag))
    halves = {key: held[key] for key in held if "lora_" in key}
    turned = {
        key: halves[
            key.replace("lora_A", "lora_C").replace("lora_B", "lora_A").replace("lora_C", "lora_B")
        ].T.contiguous()
        for key in halves
    }
    other = changes(base, edited(place, tmp_path / "turned", flag, **turned))
    for name, wanted in plain.items():
        assert torch.equal(same[name], wanted)
        torch.testing.assert_close(other[name], wanted)


def test_dora_needs_its_magnitudes_and_all_of_them(base: Path, tmp_path: Path) -> None:
    """Without them the file would merge as plain LoRA, or in part."""
    place = peft_adapter(base, tmp_path / "dora", use_dora=True)
    key = f"{Q}.lora_magnitude_vector"
    with pytest.raises(BadFile, match=r"q_proj has no magnitude, and adapter_config.json says use_dora"):
        read_tensors(edited(place, tmp_path / "a", **{key: None}))
    with pytest.raises(
        BadFile, match=r"q_proj has a magnitude, and adapter_config.json does not say use_dora"
    ):
        read_tensors(edited(place, tmp_path / "b", {"use_dora": False}))
    with pytest.raises(BadFile, match="q_proj has 5 magnitudes for 32 rows"):
        read_tensors(edited(place, tmp_path / "c", **{key: torch.ones(5)}))


def test_what_peft_saves_beside_grown_matrices_is_not_the_adapters(base: Path, tmp_path: Path) -> None:
    """With rows grown, PEFT's own default saves what modules_to_save were before training, too."""
    saved = ["embed_tokens", "lm_head"]
    place = peft_adapter(base, tmp_path / "whole", rows=440, embeddings="auto", modules_to_save=saved)
    held = load_file(place / FILE)
    assert any(".original_module." in key for key in held), "PEFT has changed; is this still needed?"
    made = changes(base, place)
    for name in ("model.embed_tokens", "lm_head"):
        trained = held[f"base_model.model.{name}.modules_to_save.weight"]
        assert torch.equal(made[f"{name}.weight"].float(), trained)
