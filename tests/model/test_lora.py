"""LoRA and vocabulary rows: what trains, what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chinese_llama.errors import DoesNotFit, UserError
from chinese_llama.model.load import load_model
from chinese_llama.model.lora import add_lora, lora_config
from tests import tiny

NEW = [400, 405, 419]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("lora") / "tied", tiny.base_tokenizer(), tied=True)


def wrapped(place: Path, embeddings: str, dtype: str = "float32", targets: list[str] | None = None) -> Any:
    model = load_model(place, dtype)
    return add_lora(model, lora_config(model, 4, 8, 0.0, targets or ["q_proj"], embeddings, NEW))


def trained_names(model: Any) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def one_step(model: Any) -> None:
    ids = torch.tensor([[1, 5, *NEW, 7]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def test_frozen_trains_lora_only(base: Path) -> None:
    names = trained_names(wrapped(base, "frozen"))
    assert len(names) == 4  # two layers, A and B
    assert all(".q_proj.lora_" in name for name in names)


@pytest.mark.parametrize("which", ["base", "tied"])
def test_new_rows_moves_those_rows_and_no_other(which: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(which)
    before = load_model(place, "float32").state_dict()
    model = wrapped(place, "new-rows")
    one_step(model)
    after = model.merge_and_unload().state_dict()
    old = [i for i in range(420) if i not in NEW]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name][old], after[name][old]), name
        assert (before[name][NEW] != after[name][NEW]).any(1).all(), name
    if which == "tied":
        assert torch.equal(after["model.embed_tokens.weight"], after["lm_head.weight"])


@pytest.mark.parametrize("which", ["base", "tied"])
def test_full_trains_whole_matrices(which: str, request: pytest.FixtureRequest) -> None:
    model = wrapped(request.getfixturevalue(which), "full")
    before = model.get_input_embeddings().weight.clone()
    one_step(model)
    assert not torch.equal(before, model.get_input_embeddings().weight)
    merged = model.merge_and_unload()
    same = torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert same == (which == "tied")


@pytest.mark.parametrize("embeddings", ["new-rows", "full", "frozen"])
def test_what_trains_is_float32_on_a_bfloat16_base(base: Path, embeddings: str) -> None:
    model = wrapped(base, embeddings, "bfloat16")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
    assert model.get_base_model().model.norm.weight.dtype == torch.bfloat16


def test_a_fresh_lora_changes_nothing(base: Path) -> None:
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(load_model(base)(ids).logits, wrapped(base, "new-rows")(ids).logits)


def test_new_rows_without_a_manifest_is_refused(base: Path) -> None:
    with pytest.raises(
        UserError, match=r"no manifest says which rows are new; .*extend-model.*full or frozen"
    ):
        lora_config(load_model(base), 4, 8, 0.0, ["q_proj"], "new-rows", [])


@pytest.mark.parametrize("targets", [["nope"], ["q_proj", "v_porj"]])
def test_targets_that_the_model_lacks_are_refused(base: Path, targets: list[str]) -> None:
    with pytest.raises(DoesNotFit, match=f"lora_target_modules: .*{targets[-1]}"):
        wrapped(base, "frozen", targets=targets)
