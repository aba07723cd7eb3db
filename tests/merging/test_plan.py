"""Which adapters a list means, and whether they belong together, before a tensor is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from chinese_llama.artifacts import Manifest, identity, input_record, write_manifest
from chinese_llama.config import load_yaml
from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.merging.plan import Adapter, check_lineage, load, parse_list, resolve
from chinese_llama.resources import shipped
from chinese_llama.workspace import Workspace


def make(place: Path, base: Path | None = None, below: list[Path] | None = None, tag: float = 0.0) -> Path:
    """An adapter directory; with `base`, as the recipes write its manifest."""
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "name": place.name}))
    save_file({"x": torch.full((1,), tag)}, place / "adapter_model.safetensors")
    if base is not None:
        inputs = {"base": input_record(base), "tokenizer": {"path": "t", "sha256": ""}}
        inputs |= {f"parent:{i}": input_record(path) for i, path in enumerate(below or [])}
        write_manifest(place, Manifest("adapter", "pt_lora", inputs))
    return place


def loaded(*places: Path) -> list[Adapter]:
    return [load(place.name, place) for place in places]


@pytest.fixture
def chain(base: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three adapters, each trained on top of those before it."""
    plus = make(tmp_path / "plus", base)
    alpaca = make(tmp_path / "alpaca", base, [plus])
    return plus, alpaca, make(tmp_path / "pro", base, [plus, alpaca])


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    file = tmp_path / "space" / "chinese-llama.yaml"
    file.parent.mkdir()
    return Workspace(file, {"base": "base", "adapters": {"mine": "./elsewhere/mine"}})


def test_a_list_is_split_at_commas() -> None:
    assert parse_list("plus, alpaca,x=/a/b") == ["plus", "alpaca", "x=/a/b"]


@pytest.mark.parametrize("text", ["", " ", "plus,", ",plus", "plus,,alpaca"])
def test_an_empty_item_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--loras .*: an item is empty; write names or directories"):
        parse_list(text)


def test_a_repeated_item_is_refused() -> None:
    with pytest.raises(UserError, match="--loras 'plus, plus': an adapter is given twice"):
        parse_list("plus, plus")


def test_name_and_directory(tmp_path: Path, workspace: Workspace) -> None:
    place = make(tmp_path / "dir")
    for found in (None, workspace):
        adapter = resolve(f"plus={place}", found)
        assert (adapter.name, adapter.path) == ("plus", place)
    with pytest.raises(BadFile, match=r"nowhere: no such directory \(adapter 'x'\)"):
        resolve("x=/no/such/nowhere", workspace)


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


def test_a_directory(tmp_path: Path, workspace: Workspace) -> None:
    place = make(tmp_path / "some" / "where")
    assert resolve(str(place), workspace).name == "where"


def test_a_name_of_the_registry_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, asked = make(tmp_path / "snapshot"), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or str(place))
    for item, name in (("chinese-alpaca-pro-7b", "chinese-alpaca-pro-7b"), ("someone/adapter", "adapter")):
        adapter = resolve(item, None)
        assert (adapter.name, adapter.path) == (name, place)
    assert asked == ["hfl/chinese-alpaca-pro-lora-7b", "someone/adapter"]


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"hfl/chinese-llama-plus-lora-7b is no directory here, and the hub"):
        resolve("chinese-llama-plus-7b", None)


def test_the_registry_is_whole() -> None:
    """Published adapters by family and size; what must lie below is itself in the registry."""
    registry = load_yaml(shipped("merge") / "adapters.yaml")
    for size in ("7b", "13b", "33b"):
        plus = f"chinese-llama-plus-{size}"
        assert registry[plus]["hub"] == f"hfl/chinese-llama-plus-lora-{size}"
        assert (registry[plus]["after"], registry[plus]["vocab"]) == ([], 49953)
        for family in ("plus", "pro"):
            entry = registry[f"chinese-alpaca-{family}-{size}"]
            assert entry["hub"] == f"hfl/chinese-alpaca-{family}-lora-{size}"
            assert (entry["after"], entry["vocab"], entry["base"]) == ([plus], 49954, registry[plus]["base"])


def test_an_unknown_name_lists_all_names_and_where_they_come_from(workspace: Workspace) -> None:
    with pytest.raises(UserError) as caught:
        resolve("alpacca", workspace)
    told = str(caught.value)
    assert "No adapter 'alpacca' (did you mean 'alpaca'?)" in told
    assert f"{workspace.file} names plus, alpaca, mine" in told
    assert "registry of published adapters has chinese-llama-plus-7b" in told
    assert "name=directory" in told
    with pytest.raises(UserError, match=r"No adapter 'zzz': .*there is no chinese-llama\.yaml here"):
        resolve("zzz", None)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("adapter_config.json", None, r"is not an adapter \(no adapter_config.json\)"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors or adapter_model.bin"),
        ("adapter_config.json", "{", "adapter_config.json: is not valid JSON"),
        ("adapter_config.json", "[1]", "adapter_config.json"),
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


def test_the_order_of_training_is_accepted(base: Path, chain: tuple[Path, Path, Path]) -> None:
    for count in (1, 2, 3):
        check_lineage(base, loaded(*chain[:count]))
    assert loaded(chain[2])[0].parents == [identity(chain[0]), identity(chain[1])]


def test_ten_parents_keep_their_order(base: Path, tmp_path: Path) -> None:
    places: list[Path] = []
    for number in range(12):
        places.append(make(tmp_path / f"a{number}", base, list(places)))
    check_lineage(base, loaded(*places))


def test_another_order_names_the_right_one(base: Path, chain: tuple[Path, Path, Path]) -> None:
    plus, alpaca, pro = chain
    with pytest.raises(DoesNotFit, match=r"'alpaca' was trained on top of .*plus, .*--loras .*plus,alpaca"):
        check_lineage(base, loaded(alpaca, plus))
    with pytest.raises(DoesNotFit, match=r"'alpaca' was trained on top of .*plus"):
        check_lineage(base, loaded(alpaca))
    with pytest.raises(DoesNotFit, match=r"'pro' was trained on top of plus, .*alpaca, .*--loras plus,"):
        check_lineage(base, loaded(plus, pro))
    with pytest.raises(DoesNotFit, match="'other' was trained on the bare base; it must come first"):
        check_lineage(base, loaded(plus, make(plus.parent / "other", base, tag=1.0)))


def test_an_adapter_given_twice_is_refused(
    base: Path, chain: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(chain[0], tmp_path / "copy")
    with pytest.raises(DoesNotFit, match="The adapters 'plus' and 'copy' are the same one"):
        check_lineage(base, loaded(chain[0], copy))


def test_another_base_is_refused(base: Path, extended: Path, chain: tuple[Path, Path, Path]) -> None:
    with pytest.raises(
        DoesNotFit, match=f"'plus' was trained on another base \\({base}\\), not on {extended}"
    ):
        check_lineage(extended, loaded(chain[0]))


def test_what_lies_below_must_be_the_very_adapter(base: Path, chain: tuple[Path, Path, Path]) -> None:
    plus, alpaca, _ = chain
    save_file({"x": torch.ones(1)}, plus / "adapter_model.safetensors")
    with pytest.raises(DoesNotFit, match="'alpaca' was trained on top of"):
        check_lineage(base, loaded(plus, alpaca))


def test_without_manifests_any_order_is_taken(base: Path, tmp_path: Path) -> None:
    check_lineage(base, loaded(make(tmp_path / "b", tag=1.0), make(tmp_path / "a")))


def test_a_base_that_was_given_as_a_hub_id_is_not_held_against_the_adapter(
    base: Path, tmp_path: Path
) -> None:
    """The recipes record such a base without a hash; then its hash is unknown, not different."""
    place = make(tmp_path / "plus")
    inputs = {"base": {"path": "someone/base", "sha256": ""}, "tokenizer": {"path": "t", "sha256": ""}}
    write_manifest(place, Manifest("adapter", "pt_lora", inputs))
    check_lineage(base, loaded(place))


def test_published_adapters_are_merged_in_their_order(tmp_path: Path) -> None:
    entry = {"hub": "x/y", "base": "LLaMA-7B", "after": ["chinese-llama-plus-7b"], "vocab": 49954}
    alpaca = load("chinese-alpaca-plus-7b", make(tmp_path / "alpaca"))
    alpaca.published = entry
    with pytest.raises(DoesNotFit, match="--loras chinese-llama-plus-7b,chinese-alpaca-plus-7b"):
        check_lineage(tmp_path, [alpaca])
