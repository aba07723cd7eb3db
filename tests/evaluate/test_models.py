"""Base + adapters, unmerged, against what `merge` writes of them; and what is refused before a model is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from chinese_llama.artifacts import Manifest, identity, input_record, write_manifest
from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.evaluate.models import Subject, check_subject, open_subject
from chinese_llama.merging.plan import Step, load
from chinese_llama.merging.stream import Options, merge
from chinese_llama.vocab.proto import read_model
from tests import tiny
from tests.evaluate.scoring import evaluate_text
from tests.model.test_adapters import peft_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
FULL = ["embed_tokens", "lm_head"]
TEXTS = [*tiny.CHINESE[:4], *tiny.ENGLISH[:4]]


def unmerged(base: Path, *places: Path) -> Subject:
    return Subject("unmerged", str(base), [load(place.name, place) for place in places])


def bits(subject: Subject) -> float:
    model, tokenizer = open_subject(subject)
    return float(evaluate_text(model, tokenizer, TEXTS)["bits_per_character"])


def assert_as_merged(base: Path, output: Path, *places: Path) -> Any:
    """Unmerged and merged need the same bits, and other ones than the base."""
    subject = unmerged(base, *places)
    merge(base, [Step([adapter]) for adapter in subject.adapters], output, Options(verify=False))
    found = bits(subject)
    assert found == pytest.approx(bits(Subject("merged", str(output))), abs=1e-4)
    return found


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ALL},
        {"target_modules": ALL, "use_dora": True},
        {"target_modules": ALL, "use_rslora": True, "r": 8},
        {"trainable_token_indices": {"embed_tokens": [419, 430], "lm_head": [419, 7]}},
        {"modules_to_save": FULL},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_an_adapter_counts_unmerged_as_merged(extended: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    place = peft_adapter(extended, tmp_path / "a", **config)
    found = assert_as_merged(extended, tmp_path / "out", place)
    assert abs(found - bits(Subject("base", str(extended)))) > 1e-2


def test_the_last_adapter_is_live_on_the_others(extended: Path, tmp_path: Path) -> None:
    plus = peft_adapter(extended, tmp_path / "plus", target_modules=ALL, use_dora=True)
    alpaca = peft_adapter(extended, tmp_path / "alpaca", seed=2, target_modules=ALL, use_rslora=True)
    both = assert_as_merged(extended, tmp_path / "out", plus, alpaca)
    assert len({round(found, 3) for found in (both, bits(unmerged(extended, plus)))}) == 2
    model, _ = open_subject(unmerged(extended, plus, alpaca))
    assert list(model.peft_config) == ["default"] and not model.training
    before = torch.cat([p.flatten() for n, p in model.named_parameters() if "q_proj.base_layer" in n])
    plain, _ = open_subject(Subject("base", str(extended)))
    after = torch.cat([p.flatten() for n, p in plain.named_parameters() if "q_proj" in n])
    assert not torch.equal(before, after)  # plus is baked in


def test_the_layout_of_the_reference(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    """LoRA and whole matrices of more rows than the base, each adapter with its own tokenizer.model; then a row
    more."""
    model = read_model(tokenizer / "tokenizer.model")
    rows = len(model.pieces)
    plus = peft_adapter(base, tmp_path / "plus", rows, target_modules=ALL, modules_to_save=FULL)
    tiny.write_model(plus / "tokenizer.model", model)
    alpaca = peft_adapter(base, tmp_path / "alpaca", rows + 1, 2, target_modules=ALL, modules_to_save=FULL)
    model.pieces.add(piece="[PAD]", score=0.0)
    tiny.write_model(alpaca / "tokenizer.model", model)
    assert_as_merged(base, tmp_path / "one", plus)
    assert_as_merged(base, tmp_path / "both", plus, alpaca)
    _, found = open_subject(unmerged(base, plus, alpaca))
    assert len(found) == rows + 1
    with pytest.raises(DoesNotFit, match="never shrinks"):
        open_subject(unmerged(base, alpaca, plus))


def test_the_tokenizer_is_the_last_adapters_that_has_one(
    base: Path, extended: Path, tokenizer: Path, tmp_path: Path
) -> None:
    first, second = (peft_adapter(extended, tmp_path / name) for name in "ab")
    assert unmerged(extended, first, second).tokenizer == extended
    shutil.copy(tokenizer / "tokenizer.model", first)
    assert unmerged(extended, first, second).tokenizer == first
    assert Subject("x", str(base)).tokenizer == base


def test_another_base_or_order_is_refused_before_anything_is_loaded(
    extended: Path, base: Path, tmp_path: Path
) -> None:
    place = peft_adapter(extended, tmp_path / "plus")
    write_manifest(place, Manifest("adapter", "pt_lora", {"base": input_record(extended)}))
    check_subject(unmerged(extended, place))
    with pytest.raises(DoesNotFit, match=r"trained on another base .*, not on .*base\.$") as told:
        open_subject(unmerged(base, place))
    assert "--force" not in str(told.value), "which is merge's"
    with pytest.raises(DoesNotFit, match="are the same one"):
        check_subject(unmerged(extended, place, place))


def test_an_adapter_of_another_width_is_refused(extended: Path, tmp_path: Path) -> None:
    wide = tiny.write_base(tmp_path / "wide", tiny.base_tokenizer(), hidden_size=64)
    with pytest.raises(DoesNotFit, match=r"q_proj"):
        open_subject(unmerged(extended, peft_adapter(wide, tmp_path / "a")))


def test_what_is_no_model_or_has_no_tokenizer_is_one_sentence(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="none: no such directory; a model is wanted"):
        check_subject(Subject("x", str(tmp_path / "none")))
    with pytest.raises(BadFile, match=r"holds no model \(no config.json\)"):
        check_subject(Subject("x", str(tmp_path)))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, tmp_path)
    with pytest.raises(BadFile, match=r"has no tokenizer \(tokenizer.json or tokenizer.model\); put the one"):
        check_subject(Subject("x", str(tmp_path)))


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(
    base: Path, extended: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, tmp_path)
    for file in extended.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(DoesNotFit, match="only 420 rows"):
        open_subject(Subject("x", str(tmp_path)))


def test_the_context_is_what_the_configuration_says(base: Path, tmp_path: Path) -> None:
    assert Subject("x", str(base)).context == 128
    for content, context in (('{"model_type": "llama"}', 2048), ('{"model_type": "x"}', None)):
        (tmp_path / "config.json").write_text(content)  # 2048 is what transformers makes of a LLaMA without
        assert Subject("x", str(tmp_path)).context == context
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        _ = Subject("x", str(tmp_path)).context


def test_the_identity_is_of_the_weights_and_the_adapters_in_order(extended: Path, tmp_path: Path) -> None:
    places = [peft_adapter(extended, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    assert Subject("x", str(extended)).identity() == identity(extended)
    found = [unmerged(extended, *order).identity() for order in ([], places[:1], places, places[::-1])]
    assert len({*found}) == 4
    assert unmerged(extended, *places).identity() == found[2]
