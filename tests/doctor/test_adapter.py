"""What the doctor finds in broken adapters, and that it finds nothing in good ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chinese_llama.artifacts import Manifest, input_record, sha256_file, write_manifest
from chinese_llama.doctor.adapter import check_adapter
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.things import recognise
from chinese_llama.vocab.fast import FILES as TOKENIZER_FILES
from tests.doctor.broken import change, checks, put, set_json, set_tensors
from tests.model.test_adapters import peft_adapter

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STEM = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
A, B = STEM.format(0, "q", "A"), STEM.format(0, "q", "B")
EMBED_KEY = "base_model.model.model.embed_tokens.weight"
HEAD_KEY = "base_model.model.lm_head.weight"
MATRICES = ["embed_tokens", "lm_head"]


def found(place: Path) -> dict[str, str]:
    return checks(check_adapter(recognise(place)))


def one(place: Path, check: str) -> Finding:
    return next(finding for finding in check_adapter(recognise(place)) if finding.check == check)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good adapters of all kinds, as PEFT saves them."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "lora": {},
        "dora": {"use_dora": True},
        "rank pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "use_rslora": True},
        "full": {"rows": 430, "modules_to_save": MATRICES},
        "rows": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
        "regex": {"target_modules": r".*layers\.1\..*(q|v)_proj"},
        "all": {"target_modules": "all-linear"},
        "one layer": {"layers_to_transform": [1]},
    }
    return {name: peft_adapter(base, folder / name, **settings) for name, settings in kinds.items()}


@pytest.fixture
def lora(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["lora"], tmp_path / "lora"))


@pytest.fixture
def full(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["full"], tmp_path / "full"))


def with_tokenizer(place: Path, tokenizer: Path) -> Path:
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, place / name)
    return place


def edit(place: Path, **fields: Any) -> dict[str, str]:
    set_json(place / CONFIG, **fields)
    return found(place)


def test_good_adapters(made: dict[str, Path]) -> None:
    for name, place in made.items():
        assert found(place) == {}, name


# --- files


FILES: dict[str, Callable[[Path], Any]] = {
    "no-weights": lambda place: (place / FILE).unlink(),
    "no-tensors": lambda place: save_file({}, place / FILE),
    "file-empty": lambda place: (place / FILE).write_bytes(b""),
    "file-truncated": lambda place: (place / FILE).write_bytes((place / FILE).read_bytes()[:-9]),
    "file-is-text": lambda place: (place / FILE).write_text("<html>404</html>"),
    "adapter-config-missing": lambda place: (place / CONFIG).unlink(),
    "invalid-json": lambda place: (place / CONFIG).write_text("{"),
}


@pytest.mark.parametrize("check", FILES)
def test_broken_files(lora: Path, check: str) -> None:
    FILES[check](lora)
    assert found(lora) == {check: "error"}


def test_443_bytes(lora: Path) -> None:
    """What PEFT saves where the state dict was picked twice."""
    (lora / FILE).unlink()
    torch.save({}, lora / "adapter_model.bin")
    assert found(lora) == {"no-tensors": "error"}
    assert "bytes" in one(lora, "no-tensors").what


def test_two_files_of_tensors(lora: Path) -> None:
    torch.save(load_file(lora / FILE), lora / "adapter_model.bin")
    assert found(lora) == {"weights-twice": "note"}


def test_another_file_under_a_published_name(lora: Path, tmp_path: Path) -> None:
    place = lora.rename(tmp_path / "chinese-alpaca-plus-lora-7b")
    torch.save(load_file(place / FILE), place / "adapter_model.bin")
    (place / FILE).unlink()
    assert found(place) == {"not-as-published": "warning"}


# --- adapter_config.json


FIELDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "another type": ({"peft_type": "IA3"}, {"not-lora": "error"}),
    "no type": ({"peft_type": None}, {"not-lora": "error"}),
    "no base": ({"base_model_name_or_path": None}, {"base-not-named": "warning"}),
    "a base elsewhere": ({"base_model_name_or_path": "/not/here"}, {"base-not-here": "note"}),
    "a base on the hub": ({"base_model_name_or_path": "some/where"}, {}),
    "rank 0": ({"r": 0}, {"adapter-config-wrong": "error"}),
    "a word": ({"lora_alpha": "x"}, {"adapter-config-wrong": "error"}),
    "no alpha": ({"lora_alpha": None}, {"rank-or-alpha-missing": "warning"}),
    "alpha 0": ({"lora_alpha": 0}, {"alpha-zero": "error"}),
    "another rank": ({"r": 8}, {"rank-differs": "error"}),
    "PiSSA": ({"init_lora_weights": "pissa"}, {"not-mergeable": "warning"}),
    "aLoRA": ({"alora_invocation_tokens": [1]}, {"not-mergeable": "warning"}),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, {"target-without-tensors": "error"}),
    "none of the targets": ({"target_modules": ["c_attn"]}, {"target-without-tensors": "error", "tensors-without-target": "error"}),
    "fewer targets": ({"target_modules": ["q_proj"]}, {"tensors-without-target": "error"}),
    "a pattern": ({"target_modules": "q_proj"}, {"target-without-tensors": "error"}),
    "a saved module": ({"modules_to_save": MATRICES}, {"saved-module-missing": "error"}),
    "token ids": ({"trainable_token_indices": [1]}, {"saved-module-missing": "error"}),
    "a rank of nothing": ({"rank_pattern": {"c_attn": 4}}, {"pattern-without-module": "warning"}),
    "DoRA": ({"use_dora": True}, {"dora-differs": "error"}),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_a_field(lora: Path, case: str) -> None:
    fields, wanted = FIELDS[case]
    assert edit(lora, **fields) == wanted


def test_the_rank_that_the_tensors_have_is_told(lora: Path) -> None:
    edit(lora, r=8)
    finding = one(lora, "rank-differs")
    assert '"r": 4' in finding.remedy and "not of rank 8" in finding.evidence[0]
    set_tensors(lora / FILE, {A: torch.ones(2, 32), B: torch.ones(32, 2)})
    edit(lora, r=4)
    assert "rank_pattern" in one(lora, "rank-differs").remedy
    assert edit(lora, rank_pattern={"layers.0.self_attn.q_proj": 2}) == {}


def test_fields_of_any_type_do_no_harm(lora: Path) -> None:
    text = (lora / CONFIG).read_text()
    values: list[Any] = ["x(", -1, 1.5, [[1]], {"a": []}, True]
    for value in values:
        for name in (
            "r",
            "lora_alpha",
            "target_modules",
            "modules_to_save",
            "rank_pattern",
            "trainable_token_indices",
            "base_model_name_or_path",
            "peft_type",
            "layers_to_transform",
        ):
            edit(lora, **{name: value})
            (lora / CONFIG).write_text(text)


# --- tensors


def test_half_a_pair(lora: Path) -> None:
    set_tensors(lora / FILE, {B: None})
    assert found(lora) == {"half-a-pair": "error"}


def test_a_module_of_one_layer_is_missing(lora: Path) -> None:
    set_tensors(lora / FILE, {A: None, B: None})
    assert found(lora) == {"target-without-tensors": "error"}
    assert one(lora, "target-without-tensors").evidence == ["q_proj of layer 0"]


def test_empty_tensors(lora: Path, full: Path) -> None:
    """What ZeRO-3 leaves."""
    set_tensors(lora / FILE, {A: torch.zeros(4, 0), B: torch.zeros(0, 4)})
    assert found(lora) == {"empty-tensors": "error"}
    set_tensors(full / FILE, {EMBED_KEY: torch.zeros(0)})
    assert found(full) == {"empty-tensors": "error"}


def test_a_tensor_of_no_known_kind(lora: Path) -> None:
    set_tensors(lora / FILE, {"base_model.model.hada_w1_a": torch.ones(2)})
    assert found(lora) == {"tensor-not-mergeable": "error"}


def test_rows_of_no_known_ids(made: dict[str, Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(made["rows"], tmp_path / "rows"))
    assert edit(place, trainable_token_indices=None) == {"token-ids-missing": "error"}


def test_weights_that_nobody_named(lora: Path) -> None:
    """A whole checkpoint under the name of an adapter."""
    set_tensors(lora / FILE, {"base_model.model.model.layers.0.self_attn.o_proj.weight": torch.ones(32, 32)})
    assert found(lora) == {"whole-weights-inside": "warning"}


def test_numbers_that_are_none(lora: Path) -> None:
    change(lora / FILE, A, put(torch.nan, 0, 0))
    assert found(lora) == {"not-finite": "error"}


def all_zero(place: Path, side: str) -> None:
    keys = [key for key in load_file(place / FILE) if f"lora_{side}" in key]
    set_tensors(place / FILE, {key: torch.zeros_like(load_file(place / FILE)[key]) for key in keys})


def test_untrained(lora: Path, full: Path) -> None:
    change(lora / FILE, B, torch.zeros_like)
    assert found(lora) == {"zero-pairs": "warning"}
    all_zero(lora, "B")
    assert found(lora) == {"untrained": "warning"}
    all_zero(full, "B")
    assert found(full) == {"only-vocabulary-trained": "warning"}
    assert "is_trainable" in one(full, "only-vocabulary-trained").remedy


def test_zero_tensors(lora: Path, full: Path) -> None:
    change(lora / FILE, A, torch.zeros_like)
    assert found(lora) == {"zero-tensors": "error"}
    change(full / FILE, EMBED_KEY, torch.zeros_like)
    assert found(full) == {"zero-tensors": "error"}


# --- vocabulary


def test_matrices_of_two_sizes(full: Path) -> None:
    change(full / FILE, HEAD_KEY, lambda tensor: tensor[:-1])
    assert found(full) == {"vocab-size-differs": "error"}


def test_new_rows_that_mean_nothing(full: Path) -> None:
    change(full / FILE, EMBED_KEY, put(0.0, slice(300, None)))
    assert found(full) == {"zero-rows": "warning"}


def test_the_tokenizer_of_another_size(full: Path, base: Path, tokenizer: Path, tmp_path: Path) -> None:
    assert found(with_tokenizer(full, base)) == {"rows-do-not-fit": "error"}
    told = one(full, "rows-do-not-fit").what
    assert "420" in told and "430" in told


def test_token_ids_beyond_the_tokenizer(made: dict[str, Path], base: Path, tmp_path: Path) -> None:
    place = with_tokenizer(Path(shutil.copytree(made["rows"], tmp_path / "rows")), base)
    assert found(place) == {}
    assert edit(place, trainable_token_indices={"embed_tokens": [3, 420], "lm_head": [3, 5]}) == {
        "token-ids-beyond": "error"
    }


# --- manifest


def recorded(place: Path, base: Path, tokenizer: Path, **settings: Any) -> Path:
    """With a manifest as the recipes write it."""
    sha = sha256_file(tokenizer / "tokenizer.model")
    inputs = {"base": input_record(base), "tokenizer": {"path": str(tokenizer), "sha256": sha}}
    write_manifest(place, Manifest("adapter", "pt_lora", inputs, settings, vocab_size=420))
    return place


def test_what_it_was_trained_with(lora: Path, base: Path, tokenizer: Path, tmp_path: Path) -> None:
    recorded(with_tokenizer(lora, base), base, base, lora_r=4, lora_alpha=8)
    assert found(lora) == {}
    recorded(lora, base, base, lora_r=4, lora_alpha=32)
    assert found(lora) == {"rank-or-alpha-changed": "error"}
    recorded(lora, base, base)
    with_tokenizer(lora, tokenizer)
    assert found(lora) == {"tokenizer-not-its-own": "error"}
    with_tokenizer(lora, base)
    (lora / "tokenizer.model").unlink()  # tokenizer.json alone says the same
    assert found(lora) == {}
    set_json(lora / CONFIG, lora_dropout=0.5)
    assert found(lora) == {"changed-since-made": "warning"}
    (lora / "chinese_llama.json").write_text(json.dumps({"kind": 1}))
    assert found(lora) == {"manifest-damaged": "error"}
