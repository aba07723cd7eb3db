"""Which base an adapter belongs on, and in which order adapters merge, where only PEFT's own files tell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chinese_llama.doctor.examine import examine
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.things import recognise
from chinese_llama.doctor.together import check_together
from chinese_llama.merging.adapter import Step, load
from chinese_llama.merging.stream import merge
from tests import tiny
from tests.doctor.broken import checks, copied, set_json
from tests.model.test_adapters import peft_adapter

MATRICES = ["embed_tokens", "lm_head"]


def told(*places: Path) -> tuple[list[str], list[Finding]]:
    return check_together([recognise(place) for place in places])


def random(place: Path, seed: int) -> Path:
    """A model of the base's shape and of none of its weights."""
    held = load_file(tiny.write_llama(place, 420) / "model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(one.shape, generator=draw) for name, one in held.items()}
    save_file(noise, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random(tmp_path_factory.mktemp("other") / "other", 2)


@pytest.fixture(scope="module")
def lora(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_adapter(other, tmp_path_factory.mktemp("lora") / "lora")


def test_another_base_of_the_same_shape(other: Path, lora: Path, tmp_path: Path) -> None:
    """Told by the base that adapter_config.json names, where it is here."""
    wrong = random(tmp_path / "wrong", 1)
    _, findings = told(wrong, lora)
    assert checks(findings) == {"adapter-of-another-base": "error"}
    assert str(other) in findings[0].what and str(other) in findings[0].remedy
    order, findings = told(wrong, other, lora)
    assert f"--base {other} " in order[0]
    assert checks(findings) == {"base-found": "note", "models-unrelated": "note"}
    assert checks(told(copied(other, tmp_path / "moved"), lora)[1]) == {}  # the same weights elsewhere


def test_an_adapter_that_peft_merged_already(other: Path, lora: Path, tmp_path: Path) -> None:
    """Told by the base that adapter_config.json names, too."""
    merge(other, [Step([load("lora", lora)])], tmp_path / "merged")
    (tmp_path / "merged" / "chinese_llama.json").unlink()
    assert checks(told(tmp_path / "merged", lora)[1]) == {"adapter-merged-already": "error"}
    assert "is-the-merge" in checks(told(tmp_path / "merged", lora, other)[1])


def test_a_copy_of_the_base_that_lies_about(other: Path, lora: Path, tmp_path: Path) -> None:
    """It is no merge that failed, where only the directory of all was given."""
    shutil.copytree(lora, tmp_path / "lora")
    copied(other, tmp_path / "copy")
    copied(other, tmp_path / "base")
    found = examine([tmp_path]).findings
    assert checks([one for one in found if one.check == "nothing-merged"]) == {"nothing-merged": "note"}


def test_the_base_to_give_is_named_for_all_adapters(lora: Path, tmp_path: Path) -> None:
    second = shutil.copytree(lora, tmp_path / "second")
    file = second / "adapter_model.safetensors"
    save_file({name: 2 * one for name, one in load_file(file).items()}, file)
    remedies = [one.remedy for one in told(lora, second)[1] if one.check == "base-not-given"]
    assert len(remedies) == 1 and remedies[0].endswith(f"{lora} {second}")


def test_a_base_with_more_layers(other: Path, lora: Path, tmp_path: Path) -> None:
    """Every tensor fits, and whole layers get nothing; which may be meant."""
    deep = tiny.write_llama(tmp_path / "deep", 420, num_hidden_layers=3)
    place = copied(lora, tmp_path / "lora")
    set_json(place / "adapter_config.json", base_model_name_or_path="some/where")
    _, findings = told(deep, place)
    assert checks(findings) == {"adapter-of-another-base": "error"}
    assert findings[0].evidence == ["nothing for layer 2"]
    for meant in ({"layers_to_transform": [0, 1]}, {"target_modules": "model.layers.[01].*(q|v)_proj"}):
        set_json(place / "adapter_config.json", **meant)
        assert checks(told(deep, place)[1]) == {}


def test_each_adapter_on_the_base_that_it_names(other: Path, lora: Path, tmp_path: Path) -> None:
    """Two bases and three adapters at once."""
    plain = tiny.write_llama(tmp_path / "plain", 420)
    less = peft_adapter(plain, tmp_path / "less", rows=430, modules_to_save=MATRICES)
    more = peft_adapter(other, tmp_path / "more", rows=431, modules_to_save=MATRICES, seed=2)
    set_json(more / "adapter_config.json", base_model_name_or_path="of/yore")
    order, findings = told(other, plain, less, lora, more)
    assert [line.split(" --output")[0] for line in order] == [
        f"chinese-llama merge --base {other} --loras {lora}",
        f"chinese-llama merge --base {plain} --loras {less},{more}",
    ]
    assert {*checks(findings).values()} == {"note"}
    set_json(more / "adapter_config.json", base_model_name_or_path=str(other))
    assert f"--base {other} --loras {lora},{more} " in told(other, plain, less, lora, more)[0][1]


def test_the_wrong_order_is_a_warning_where_rows_tell(base: Path, tmp_path: Path) -> None:
    """What rows do not tell is put as it was given; what was found in a directory was given in no order."""
    plain = tiny.write_llama(tmp_path / "plain", 420)
    more = peft_adapter(base, tmp_path / "a" / "more", rows=431, modules_to_save=MATRICES)
    less = peft_adapter(base, tmp_path / "b" / "less", rows=430, modules_to_save=MATRICES, seed=3)
    bare = peft_adapter(base, tmp_path / "c", seed=2)
    _, findings = told(plain, more, less)
    assert checks(findings) == {"order-as-given": "warning", "order-unknown": "note"}
    assert f"{less}: 430 rows of vocabulary" in findings[0].evidence
    assert checks(told(plain, more, bare)[1]) == {"order-unknown": "note"}
    things = [recognise(place) for place in (plain, more, less)]
    for thing in things:
        thing.facts["found_in"] = str(tmp_path)
    assert checks(check_together(things)[1]) == {"order-unknown": "note"}


def test_a_merge_of_one_of_two_that_nothing_joins(base: Path, tmp_path: Path) -> None:
    one, two = (peft_adapter(base, tmp_path / name, seed=len(name)) for name in ("one", "three"))
    merge(base, [Step([load("three", two)])], tmp_path / "merged")
    (tmp_path / "merged" / "chinese_llama.json").unlink()
    _, findings = told(base, one, two, tmp_path / "merged")
    found = {finding.check: finding for finding in findings}
    assert found["merge-lacks-adapters"].severity == "note"
    assert found["merge-lacks-adapters"].what == f"It holds {two} and not {one}."
