"""Whether things belong together: bases, adapters, their order, tokenizers, what was merged."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from chinese_llama.artifacts import Manifest, input_record, write_manifest
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.things import Thing, recognise
from chinese_llama.doctor.together import check_together
from chinese_llama.merging.adapter import Step, load
from chinese_llama.merging.registry import registry
from chinese_llama.merging.stream import Options, merge
from chinese_llama.model.shards import HEAD
from chinese_llama.vocab.proto import read_model
from tests import tiny
from tests.convert.checkpoints import checkpoint
from tests.doctor.broken import Q, change, checks, copied, grave, put, set_json, set_tensors
from tests.merging import making
from tests.model.test_adapters import peft_adapter

FILE = "model.safetensors"


def told(*places: Path) -> tuple[list[str], list[Finding]]:
    return check_together([recognise(place) for place in places])


def found(*places: Path) -> dict[str, str]:
    return checks(told(*places)[1])


def bad(*places: Path) -> dict[str, str]:
    return {check: severity for check, severity in found(*places).items() if severity != "note"}


def trained(place: Path, base: Path, below: list[Path], **config: Any) -> Path:
    """An adapter of `base`, with a manifest as the recipes write it."""
    peft_adapter(base, place, seed=len(place.name), **config)
    inputs = {"base": input_record(base)} | {
        f"parent:{i}": input_record(path) for i, path in enumerate(below)
    }
    write_manifest(place, Manifest("adapter", "pt_lora", inputs, vocab_size=None))
    return place


@pytest.fixture(scope="module")
def made(base: Path, extended: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """plus and alpaca on it, of the extended model; both merged; pro, on plus too."""
    folder = tmp_path_factory.mktemp("made")
    plus = trained(folder / "plus", extended, [])
    alpaca = trained(folder / "alpaca", extended, [plus])
    pro = trained(folder / "pro", extended, [plus], target_modules=["o_proj"])
    steps = [Step([load(place.name, place)]) for place in (plus, alpaca)]
    merge(extended, steps, folder / "merged")
    return {"plus": plus, "alpaca": alpaca, "pro": pro, "merged": folder / "merged"}


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT's that nothing is known of."""
    return peft_adapter(base, tmp_path_factory.mktemp("peft") / "lora")


# --- what fits


def test_a_whole_workspace(
    base: Path, extended: Path, tokenizer: Path, made: dict[str, Path], work: Path
) -> None:
    order, findings = told(
        made["alpaca"], base, extended, tokenizer, made["merged"], made["plus"], work / "zh.jsonl"
    )
    assert [finding.check for finding in grave(findings)] == ["order-as-given"]
    assert order == [
        f"chinese-llama merge --base {extended} --loras {made['plus']},{made['alpaca']} --output merged"
    ]
    assert checks(findings) == {"base-found": "note", "order-as-given": "warning", "is-the-merge": "note"}


def test_two_that_lie_on_one(extended: Path, made: dict[str, Path]) -> None:
    order, findings = told(extended, made["plus"], made["alpaca"], made["pro"])
    assert [line.split("--loras ")[1] for line in order] == [
        f"{made['plus']},{made['alpaca']} --output merged",
        f"{made['plus']},{made['pro']} --output merged",
    ]
    assert findings == []


def test_an_adapter_without_a_base(made: dict[str, Path], extended: Path, lora: Path) -> None:
    order, findings = told(made["plus"])
    assert order == [f"chinese-llama merge --base {extended} --loras {made['plus']} --output merged"]
    assert checks(findings) == {"base-not-given": "note"}
    assert str(extended) in findings[0].remedy
    assert told(lora)[0][0].startswith("chinese-llama merge --base BASE")


def test_a_checkpoint_of_metas_as_the_base(tmp_path: Path) -> None:
    from chinese_llama.convert.convert import to_hf

    checkpoint(tmp_path / "meta")
    to_hf(tmp_path / "meta", tmp_path / "hf")
    place = peft_adapter(tmp_path / "hf", tmp_path / "lora")
    assert bad(tmp_path / "meta", place) == {}
    merge(tmp_path / "meta", [Step([load("lora", place)])], tmp_path / "out", Options(format="hf"))
    assert found(tmp_path / "meta", place, tmp_path / "out") == {"is-the-merge": "note"}
    assert bad(tmp_path / "meta", tmp_path / "hf") == {}


# --- what does not


def test_the_adapter_below_is_not_there(extended: Path, made: dict[str, Path]) -> None:
    assert found(extended, made["alpaca"]) == {"adapters-out-of-order": "error"}


def test_an_adapter_that_is_in_the_base(made: dict[str, Path]) -> None:
    assert found(made["merged"], made["alpaca"]) == {"adapter-merged-already": "error"}


def test_an_adapter_of_another_base(base: Path, made: dict[str, Path], lora: Path, tmp_path: Path) -> None:
    assert found(base, made["plus"]) == {"adapter-of-another-base": "error"}
    wide = tiny.write_llama(tmp_path / "wide", 420, hidden_size=64)
    assert found(wide, lora) == {"adapter-of-another-base": "error"}
    short = tiny.write_llama(tmp_path / "short", 420, num_hidden_layers=1)
    assert found(short, lora) == {"adapter-of-another-base": "error"}
    order, findings = told(wide, base, lora)
    assert f"--base {base} " in order[0]
    assert checks(findings) == {"base-found": "note", "models-unrelated": "note"}


def test_one_adapter_twice(extended: Path, made: dict[str, Path], tmp_path: Path) -> None:
    again = Path(shutil.copytree(made["plus"], tmp_path / "again"))
    order, findings = told(extended, made["plus"], again, made["alpaca"])
    assert checks(findings) == {"adapter-twice": "warning"}
    assert len(order) == 1


def test_rows_that_come_from_nowhere(base: Path, tmp_path: Path) -> None:
    place = peft_adapter(
        base, tmp_path / "x", rows=430, trainable_token_indices={"embed_tokens": [425], "lm_head": [425]}
    )
    assert found(base, place) == {"rows-missing": "error"}


def test_a_vocabulary_never_shrinks(base: Path, tmp_path: Path) -> None:
    place = peft_adapter(base, tmp_path / "x", rows=430, modules_to_save=["embed_tokens", "lm_head"])
    assert found(tiny.write_llama(tmp_path / "grown", 431), place) == {"vocabulary-shrinks": "error"}


def test_a_tied_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = tiny.write_base(tmp_path / "of 'x' \"$HOME\"", tiny.base_tokenizer(), tied=True)
    untied = tiny.write_base(tmp_path / "untied", tiny.base_tokenizer())
    place = peft_adapter(untied, tmp_path / "x", modules_to_save=["embed_tokens", "lm_head"])
    assert found(tied, place) == {"adapter-on-tied-base": "error"}
    typed = told(tied, place)[1][0].remedy.split(" ; ")[0].partition("python ")[2]
    monkeypatch.chdir(tmp_path / "x")
    exec(shlex.split(typed)[1], {})
    assert "adapter-on-tied-base" not in found(tmp_path / "x" / "untied", place)


def test_a_quantised_base(base: Path, lora: Path, tmp_path: Path) -> None:
    place = copied(base, tmp_path / "base")
    set_json(place / "config.json", quantization_config={"quant_method": "gptq"})
    assert found(place, lora) == {"quantised": "error"}


def test_too_large_for_float16_once_merged(base: Path, lora: Path, tmp_path: Path) -> None:
    place, adapter = copied(base, tmp_path / "base"), Path(shutil.copytree(lora, tmp_path / "lora"))
    half = {name: tensor.half() for name, tensor in load_file(place / FILE).items()}
    set_tensors(place / FILE, dict(half))
    set_json(place / "config.json", dtype="float16")
    assert found(place, adapter) == {}
    stem = "base_model.model." + Q.removesuffix("weight")
    for side in "AB":
        change(adapter / "adapter_model.safetensors", f"{stem}lora_{side}.weight", put(300.0, 0, 0))
        change(adapter / "adapter_model.safetensors", f"{stem}lora_{side}.weight", lambda tensor: tensor)
    assert found(place, adapter) == {"fp16-overflow": "error"}


# --- published adapters


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes small adapters that count as published ones."""
    from chinese_llama.doctor import together

    def make(place: Path, name: str) -> Thing:
        making.make(place, tag=len(name))
        known[place] = registry().adapters[name]
        return Thing(place, "adapter", "", {"rows": known[place].tokenizer.pieces}, name)

    def recognised(adapter: Any) -> None:
        adapter.published = known.get(adapter.path)

    known: dict[Path, Any] = {}
    monkeypatch.setattr(together, "recognise", recognised)
    monkeypatch.setattr("chinese_llama.merging.lineage.recognise", recognised)
    return make


def test_published_adapters_in_their_order(published: Any, tmp_path: Path) -> None:
    alpaca = published(tmp_path / "a", "chinese-alpaca-plus-7b")
    plus = published(tmp_path / "p", "chinese-llama-plus-7b")
    order, findings = check_together([alpaca, plus])
    assert order == [f"chinese-llama merge --base BASE --loras {plus.path},{alpaca.path} --output merged"]
    assert checks(findings) == {"order-as-given": "warning", "base-not-given": "note"}
    order, _ = check_together([alpaca])
    assert f"--loras chinese-llama-plus-7b,{alpaca.path} " in order[0]
    assert "LLaMA-7B" in next(f for f in findings if f.check == "base-not-given").evidence[0]


def test_a_published_adapter_on_another_size(published: Any, base: Path, tmp_path: Path) -> None:
    _, findings = check_together([recognise(base), published(tmp_path / "p", "chinese-llama-plus-7b")])
    assert checks(findings) == {"adapter-of-another-base": "error"}


def test_49953_before_49954(base: Path, tmp_path: Path) -> None:
    """Without manifests the rows tell the order."""
    names = ["embed_tokens", "lm_head"]
    more = peft_adapter(base, tmp_path / "a", rows=431, modules_to_save=names, seed=2)
    less = peft_adapter(base, tmp_path / "b", rows=430, modules_to_save=names)
    bare = tiny.write_llama(tmp_path / "bare", 420)
    order, findings = told(bare, more, less)
    assert f"--loras {less},{more} " in order[0]
    assert checks(findings) == {"order-as-given": "warning", "order-unknown": "note"}


# --- tokenizers


def test_a_tokenizer_of_another_size(base: Path, extended: Path, tokenizer: Path, tmp_path: Path) -> None:
    """49,953 pieces and 49,954 rows, each healthy by itself."""
    assert found(base, tokenizer) == {"rows-do-not-fit": "error"}
    assert found(base, extended, tokenizer) == {}
    other = tmp_path / "other"
    other.mkdir()
    proto = read_model(tokenizer / "tokenizer.model")
    proto.pieces.add(piece="[PAD]", score=0)
    tiny.write_model(other / "tokenizer.model", proto)
    _, findings = told(extended, other)
    assert checks(findings) == {"rows-do-not-fit": "error"}
    assert (
        f"{len(proto.pieces):,}" in findings[0].what
        and f"{len(proto.pieces) - 1:,}" in findings[0].evidence[0]
    )


def test_tokenizers_that_differ(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    proto = read_model(base / "tokenizer.model")
    proto.pieces[400].piece = "另"
    tiny.write_model(other / "tokenizer.model", proto)
    _, findings = told(base, other)
    assert checks(findings) == {"tokenizers-differ": "warning"}
    assert "id 400" in findings[0].evidence[0] and "另" in findings[0].evidence[0]


def test_an_adapter_with_the_tokenizer_of_something_else(base: Path, lora: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(lora, tmp_path / "lora"))
    proto = read_model(base / "tokenizer.model")
    proto.pieces[400].piece = "另"
    tiny.write_model(place / "tokenizer.model", proto)
    assert found(base, place) == {"tokenizers-differ": "error"}


def test_the_merged_model_would_get_a_tokenizer_of_fewer_pieces(base: Path, tmp_path: Path) -> None:
    place = peft_adapter(base, tmp_path / "full", rows=431, modules_to_save=["embed_tokens", "lm_head"])
    assert found(base, place) == {"rows-do-not-fit": "error"}


# --- what was merged


def merged_by_peft(base: Path, adapter: Path, output: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(str(output))
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_merge_of_peft_is_known(base: Path, lora: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """In whatever order they are given."""
    place = merged_by_peft(base, lora, tmp_path / "merged", dtype)
    for order in ((base, lora, place), (place, lora, base)):
        commands, findings = told(*order)
        assert f"--base {base} " in commands[0]
        assert [(f.check, f.where) for f in findings] == [("is-the-merge", str(place))]


def test_nothing_was_merged(base: Path, lora: Path, tmp_path: Path) -> None:
    assert found(base, lora, copied(base, tmp_path / "merged")) == {"nothing-merged": "error"}


def test_merged_with_another_scale(base: Path, lora: Path, tmp_path: Path) -> None:
    wrong = Path(shutil.copytree(lora, tmp_path / "wrong"))
    set_json(wrong / "adapter_config.json", lora_alpha=4)
    place = merged_by_peft(base, wrong, tmp_path / "merged")
    _, findings = told(base, lora, place)
    assert checks(findings) == {"merge-scaled": "error"}
    assert "0.5 times" in findings[0].what


def test_one_of_two_was_merged(extended: Path, made: dict[str, Path], tmp_path: Path) -> None:
    merge(extended, [Step([load("plus", made["plus"])])], tmp_path / "half")
    both = (extended, made["plus"], made["alpaca"])
    assert found(*both, tmp_path / "half")["merge-of-other-adapters"] == "note"
    assert bad(*both, copied(tmp_path / "half", tmp_path / "bare")) == {"merge-lacks-adapters": "warning"}
    forced = Options(force=True)
    merge(
        extended, [Step([load("x", made[name])]) for name in ("alpaca", "plus")], tmp_path / "wrong", forced
    )
    assert bad(*both, tmp_path / "wrong") == {"merge-of-other-adapters": "warning"}


def test_merged_and_then_changed(base: Path, lora: Path, tmp_path: Path) -> None:
    place = merged_by_peft(base, lora, tmp_path / "merged")
    change(place / FILE, Q, lambda tensor: tensor + 0.3 * torch.randn_like(tensor))
    assert found(base, lora, place) == {"merge-differs": "warning"}


def test_another_model(base: Path, lora: Path, tmp_path: Path) -> None:
    place = copied(base, tmp_path / "other")
    for name, tensor in load_file(place / FILE).items():
        set_tensors(place / FILE, {name: torch.randn_like(tensor)})
    assert found(base, lora, place) == {"models-unrelated": "note", "base-found": "note"}


def test_merged_into_another_base(extended: Path, made: dict[str, Path], tmp_path: Path) -> None:
    other = copied(extended, tmp_path / "other")
    change(other / FILE, HEAD, put(1.0, 0, 0))
    plus = trained(tmp_path / "plus", other, [])
    merge(other, [Step([load("plus", plus)])], tmp_path / "merged")
    lora = Path(shutil.copytree(plus, tmp_path / "lora"))
    assert found(extended, lora, tmp_path / "merged")["merge-of-another-base"] == "warning"


FIELDS: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    {"rms_norm_eps": 1e-5},
    {"max_position_embeddings": 4096},
    {"hidden_act": "gelu"},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_fields_that_a_conversion_lost(
    base: Path, lora: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    place, other = copied(base, tmp_path / "base"), merged_by_peft(base, lora, tmp_path / "merged")
    set_json(place / "config.json", **fields)
    severity = "warning" if "max_position_embeddings" in fields else "error"
    assert found(place, lora, other) == {"is-the-merge": "note", "config-fields-lost": severity}
    assert found(place, other) == {"config-fields-lost": severity}
    if "rope_parameters" in fields:
        set_json(other / "config.json", rope_parameters=None)
        finding = next(f for f in told(place, other)[1] if f.check == "config-fields-lost")
        assert "not said; the default" in finding.evidence[0]
        assert told(other, place)[1] == [finding]  # whichever is given first


def test_config_in_the_words_of_transformers_4_and_5(base: Path, tmp_path: Path) -> None:
    place = copied(base, tmp_path / "old")
    set_json(
        place / "config.json", rope_parameters=None, rope_theta=10_000.0, dtype=None, torch_dtype="float32"
    )
    assert found(base, place) == {}


# --- what is nothing


def test_paths_that_are_nothing(base: Path, tmp_path: Path) -> None:
    copied(base, tmp_path / "model")
    (tmp_path / "file.bin").write_bytes(b"x")
    for place in (tmp_path / "gone", tmp_path / "file.bin", tmp_path):
        assert found(place) == {"not-recognised": "error"}
    assert str(tmp_path / "model") in told(tmp_path)[1][0].remedy
    assert told() == ([], [])


def test_what_cannot_be_read_is_left_to_its_own_checks(base: Path, lora: Path, tmp_path: Path) -> None:
    model, adapter = copied(base, tmp_path / "model"), Path(shutil.copytree(lora, tmp_path / "lora"))
    (model / FILE).write_bytes(b"")
    assert found(model, lora) == {}
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert found(base, adapter) == {}
    assert found(base, lora, model) == {"base-found": "note"} or found(base, lora, model) == {}
