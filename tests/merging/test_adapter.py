"""Which adapter an item means, what its directory says, and whether it can be merged at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from chinese_llama.artifacts import identity
from chinese_llama.errors import BadFile, UserError
from chinese_llama.merging import registry as published
from chinese_llama.merging.adapter import KEEPS_BASE, NOT_A_SUM, check_mergeable, load, recognise, resolve
from chinese_llama.workspace import Workspace
from tests.merging.making import loaded, make


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    file = tmp_path / "space" / "chinese-llama.yaml"
    file.parent.mkdir()
    return Workspace(file, {"base": "base", "adapters": {"mine": "./elsewhere/mine"}})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has one adapter under every name; the list is what it was asked for."""
    place, asked = make(tmp_path / "snapshot"), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or str(place))
    return asked


def test_name_and_directory(tmp_path: Path, workspace: Workspace) -> None:
    place = make(tmp_path / "dir")
    for found in (None, workspace):
        adapter = resolve(f"plus={place}", found)
        assert (adapter.name, adapter.path) == ("plus", place)
    with pytest.raises(BadFile, match=r"nowhere: no such directory \(adapter 'x'\)"):
        resolve("x=/no/such/nowhere", workspace)


@pytest.mark.parametrize("item", ["=", "=dir", "x=", " = "])
def test_half_a_name_and_directory(item: str) -> None:
    with pytest.raises(UserError, match="write name=directory"):
        resolve(item, None)


def test_names_of_the_workspace(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = workspace.file.parent
    places = {"plus": "work/plus", "alpaca": "work/alpaca", "mine": "elsewhere/mine"}
    for name, place in places.items():
        make(folder / place)
        adapter = resolve(name, workspace)
        assert (adapter.name, adapter.path) == (name, folder / place)
    monkeypatch.chdir(make(folder / "here" / "plus").parent)  # the workspace's name wins over a directory
    assert resolve("plus", workspace).path == folder / "work/plus"
    assert resolve("plus", None).path == Path("plus")


@pytest.mark.parametrize(("name", "recipe"), [("plus", "pt_lora"), ("alpaca", "sft_lora")])
def test_an_untrained_adapter_says_which_recipe_makes_it(
    workspace: Workspace, name: str, recipe: str
) -> None:
    with pytest.raises(
        UserError, match=f"{name}' is not trained yet .*accelerate launch recipes/{recipe}.py"
    ):
        resolve(name, workspace)
    with pytest.raises(BadFile, match=r"elsewhere/mine: no such directory \(adapter 'mine'\)"):
        resolve("mine", workspace)


def test_a_directory(tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make(tmp_path / "some" / "where")
    assert resolve(str(place), workspace).name == "where"
    monkeypatch.chdir(place)
    assert resolve(".", workspace).name == "where"


def test_directories_are_relative_to_the_root(tmp_path: Path) -> None:
    place = make(tmp_path / "plans" / "mine")
    assert resolve("mine", None, tmp_path / "plans").path == place
    assert resolve("x=mine", None, tmp_path / "plans").path == place
    assert resolve("x=plans/mine", None, tmp_path).path == place  # no hub id, though it looks like one
    with pytest.raises(UserError, match="No adapter 'mine'"):
        resolve("mine", None, tmp_path)


def test_names_of_the_registry_and_hub_ids_are_asked_of_the_hub(tmp_path: Path, hub: list[str]) -> None:
    pro = "chinese-alpaca-pro-7b"
    for item, name in ((pro, pro), ("hfl/chinese-alpaca-pro-lora-7b", pro), ("someone/adapter", "adapter")):
        adapter = resolve(item, None)
        assert (adapter.name, adapter.path) == (name, tmp_path / "snapshot")
        assert adapter.published is (published.registry().adapters[pro] if name == pro else None)
    assert resolve("mine=someone/other", None).name == "mine"
    assert hub == ["hfl/chinese-alpaca-pro-lora-7b"] * 2 + ["someone/adapter", "someone/other"]


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"hfl/chinese-llama-plus-lora-7b is no directory here, and the hub"):
        resolve("chinese-llama-plus-7b", None)


def test_an_unknown_name_lists_all_names_and_where_they_come_from(workspace: Workspace) -> None:
    with pytest.raises(UserError) as caught:
        resolve("alpacca", workspace)
    told = str(caught.value)
    assert "No adapter 'alpacca' (did you mean 'alpaca'?)" in told
    assert f"{workspace.file} names plus, alpaca, mine" in told
    assert "registry of published adapters has chinese-llama-7b, chinese-llama-13b" in told
    assert "name=directory" in told
    with pytest.raises(UserError, match=r"No adapter 'zzz': .*there is no chinese-llama\.yaml here"):
        resolve("zzz", None)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("adapter_config.json", None, r"is not an adapter \(no adapter_config.json\)"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors or adapter_model.bin"),
        ("adapter_config.json", "{", "adapter_config.json: is not valid JSON"),
        ("adapter_config.json", "[1]", "adapter_config.json: must hold a JSON object"),
        ("adapter_config.json", '{"peft_type": "IA3"}', "of type IA3; only LORA adapters can be merged"),
        ("adapter_config.json", "{}", "of type None; only LORA"),
        ("chinese_llama.json", "{", "chinese_llama.json: is not a manifest of this tool"),
    ],
)
def test_a_directory_that_is_no_adapter_is_refused(
    tmp_path: Path, file: str, content: str | None, told: str
) -> None:
    place = make(tmp_path / "a")
    (place / file).unlink() if content is None else (place / file).write_text(content)
    with pytest.raises(BadFile, match=told):
        load("a", place)


def test_the_files_of_an_adapter(tmp_path: Path) -> None:
    place = make(tmp_path / "a")
    assert load("a", place).file == place / "adapter_model.safetensors"
    assert load("a", place).tokenizer is None
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    (place / "tokenizer.model").touch()
    assert load("a", place).file == place / "adapter_model.bin"
    assert load("a", place).tokenizer == place


def test_the_vocabulary_is_the_published_or_the_recorded_one(tmp_path: Path, base: Path) -> None:
    bare, own = loaded(make(tmp_path / "bare"), make(tmp_path / "own", base, vocab_size=500))
    assert (bare.vocabulary, own.vocabulary) == (None, 500)
    own.published = published.registry().adapters["chinese-alpaca-7b"]
    assert own.vocabulary == 49954


def test_a_published_file_is_recognised_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make(tmp_path / "mine")
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    entry = published.registry().adapters["chinese-llama-7b"]
    assert resolve(str(place), None).published is None
    known = dataclasses.replace(entry, sha256=identity(place / "adapter_model.bin"))
    small = published.Registry(adapters={entry.name: known})
    monkeypatch.setattr("chinese_llama.merging.adapter.registry", lambda: small)
    assert resolve(f"x={place}", None).published is known
    (place / "adapter_model.bin").rename(place / "adapter_model.safetensors")  # no such file is published
    adapter = load("mine", place)
    recognise(adapter)
    assert adapter.published is None


@pytest.mark.parametrize("key", NOT_A_SUM)
def test_what_is_no_sum_is_refused(tmp_path: Path, key: str) -> None:
    place = make(tmp_path / "a", **{key: {"x": [1]}})
    with pytest.raises(BadFile, match=rf"adapter_config\.json: .*cannot be merged \({key}\)\.$"):
        resolve(str(place), None)
    assert load("a", place).config[key], "training may go on with it"
    for nothing in (None, False, [], {}):
        resolve(str(make(tmp_path / f"{nothing}", **{key: nothing})), None)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"]
)
def test_an_initialisation_that_changes_the_base_is_refused(tmp_path: Path, init: str) -> None:
    (adapter,) = loaded(make(tmp_path / "a", init_lora_weights=init))
    with pytest.raises(BadFile, match=f"initialised with '{init}', which changes the base .*plain LoRA"):
        check_mergeable(adapter)


@pytest.mark.parametrize("init", [True, False, None, "Gaussian", *KEEPS_BASE])
def test_other_initialisations_are_taken(tmp_path: Path, init: Any) -> None:
    check_mergeable(loaded(make(tmp_path / "a", init_lora_weights=init))[0])


def test_every_variant_of_peft_has_been_thought_of() -> None:
    """A new kind of LoRA in PEFT has to be put where it belongs: refused, or merged right."""
    from peft import LoraConfig

    merged = {"use_dora", "velora_config", "monteclora_config"}  # the last two change the training only
    kinds = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert kinds, "PEFT marks them in another way now"
    assert kinds <= merged | set(NOT_A_SUM)
    assert set(NOT_A_SUM) <= {f.name for f in dataclasses.fields(LoraConfig)}


def test_initialisations_that_keep_the_base_are_those_of_peft(tmp_path: Path) -> None:
    """With them, a new adapter changes nothing, and the base's weights are the same."""
    import torch
    from peft import LoraConfig, get_peft_model

    for init in ("gaussian", "orthogonal", "mica"):  # eva needs data; its B is zero
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
        before, x = model[0].weight.clone(), torch.ones(1, 8)
        expected = model(x)
        lora = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
        weights = dict(lora.named_parameters())
        assert torch.equal(weights["base_model.model.0.base_layer.weight"], before)
        assert torch.allclose(lora(x), expected, atol=1e-6)


def test_parents_are_in_order(base: Path, tmp_path: Path) -> None:
    places: list[Path] = []
    for number in range(12):
        places.append(make(tmp_path / f"a{number}", base, list(places)))
    assert loaded(places[-1])[0].parents == [identity(place) for place in places[:-1]]
    assert loaded(make(tmp_path / "bare"))[0].parents == []


def test_config_is_read_as_it_is(tmp_path: Path) -> None:
    place = make(tmp_path / "a", r=16)
    assert load("a", place).config == json.loads((place / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"lora_alpha": None}, "lora_alpha must be a number, not None"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number, not '16'"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"r": 0}, "r must be a whole number, not 0"),
        ({"r": 4.5}, "r must be a whole number"),
        ({"rank_pattern": [1]}, "rank_pattern must be a mapping"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: q_proj must be a number"),
        ({"alpha_pattern": {"[": 1}}, r"alpha_pattern: '\[' is no pattern"),
        ({"use_rslora": "false"}, "use_rslora must be true or false"),
        ({"trainable_token_indices": "abc"}, "must be lists of token ids"),
        ({"trainable_token_indices": {"embed_tokens": 5}}, "must be lists of token ids"),
        ({"trainable_token_indices": [3, -1]}, "must be lists of token ids"),
        ({"trainable_token_indices": [3, 4, 3]}, "names a token id twice"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(
    tmp_path: Path, config: dict[str, object], told: str
) -> None:
    with pytest.raises(BadFile, match=f"adapter_config.json: .*{told}"):
        load("a", make(tmp_path / "a", **config))


def test_what_is_left_out_is_pefts_default(tmp_path: Path) -> None:
    place = make(tmp_path / "a")
    (place / "adapter_config.json").write_text('\ufeff{"peft_type": "LORA"}', encoding="utf-8")
    assert (load("a", place).config["r"], load("a", place).config["lora_alpha"]) == (8, 8)


def test_a_directory_may_have_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "lr=1e-4")
    assert resolve("lr=1e-4", None).path == Path("lr=1e-4")
    assert resolve("name=lr=1e-4", None).path == Path("lr=1e-4")
