"""What is to be merged, from --loras and --weights or from a plan file, before a tensor is read."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from chinese_llama.errors import BadFile, UserError
from chinese_llama.merging.plan import (
    METHODS,
    Plan,
    find_plan,
    parse_list,
    parse_weights,
    plan_of,
    read_plan,
    shipped_plans,
)
from chinese_llama.workspace import Workspace
from tests.merging.making import make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the adapters a, b, c."""
    for tag, name in enumerate("abc"):
        make(tmp_path / "plans" / name, tag=tag)
    return tmp_path / "plans"


def plan(folder: Path, text: str, workspace: Workspace | None = None) -> Plan:
    (folder / "plan.yaml").write_text(text)
    return read_plan(folder / "plan.yaml", workspace)


def shape(plan: Plan) -> list[tuple[str, float, int, list[tuple[str, float]]]]:
    return [(s.method, s.density, s.seed, [(a.name, a.weight) for a in s.adapters]) for s in plan.steps]


def test_a_list_is_split_at_commas() -> None:
    assert parse_list("plus, alpaca,x=/a/b") == ["plus", "alpaca", "x=/a/b"]


@pytest.mark.parametrize("text", ["", " ", "plus,", ",plus", "plus,,alpaca"])
def test_an_empty_item_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--loras .*: an item is empty; write names or directories"):
        parse_list(text)


def test_a_repeated_item_is_refused() -> None:
    with pytest.raises(UserError, match="--loras 'plus, plus': an adapter is given twice"):
        parse_list("plus, plus")


def test_weights_are_numbers() -> None:
    assert parse_weights("1.0, 0.7,-1,2e-1") == [1.0, 0.7, -1.0, 0.2]


@pytest.mark.parametrize(
    ("text", "wrong"), [("1,x", "x"), ("", ""), ("1,", ""), ("0,1", "0"), ("nan", "nan")]
)
def test_what_is_no_weight_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(UserError, match=f"^--weights '{text}': '{wrong}' is no weight; give a number other"):
        parse_weights(text)


def test_loras_and_weights_are_a_plan(folder: Path) -> None:
    items = [f"x={folder}/a", str(folder / "b")]
    assert shape(plan_of(items, [1.0, 0.7], None)) == [
        ("sequence", 1.0, 0, [("x", 1.0)]),
        ("sequence", 1.0, 0, [("b", 0.7)]),
    ]
    plain = plan_of(items, None, None)
    assert [adapter.weight for adapter in plain.adapters] == [1.0, 1.0]
    assert (plain.base, plain.output, plain.dtype, plain.format, plain.file) == (None,) * 5


def test_each_adapter_needs_its_weight(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"--weights has 1 numbers for 2 adapters \(a, b\); give one for each"
    ):
        plan_of(["a", "b"], [0.5], None)
    with pytest.raises(UserError, match=r"--weights: inf is no weight"):
        plan_of([str(folder / "a")], [float("inf")], None)


def test_a_whole_plan(folder: Path) -> None:
    made = plan(
        folder,
        """
        base: ../base
        adapters:
          - a
          - {adapter: x=b, weight: 0.7}
          - combine: dare_ties
            density: 0.5
            seed: 3
            adapters: [{adapter: y=a, weight: -0.6}, c]
        dtype: float16
        output: out
        format: meta
        """,
    )
    assert shape(made) == [
        ("sequence", 1.0, 0, [("a", 1.0)]),
        ("sequence", 1.0, 0, [("x", 0.7)]),
        ("dare_ties", 0.5, 3, [("y", -0.6), ("c", 1.0)]),
    ]
    assert [adapter.name for adapter in made.adapters] == ["a", "x", "y", "c"]
    assert (made.base, made.output) == (str(folder / "../base"), str(folder / "out"))
    assert (made.dtype, made.format, made.file) == ("float16", "meta", folder / "plan.yaml")


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_are_read(folder: Path, method: str) -> None:
    density = "" if method == "linear" else "density: 1, "
    made = plan(folder, f"adapters: [{{combine: {method}, {density}adapters: [a, b]}}]")
    assert shape(made) == [(method, 1.0, 0, [("a", 1.0), ("b", 1.0)])]


def test_one_adapter_needs_no_list(folder: Path) -> None:
    assert shape(plan(folder, "adapters: a")) == [("sequence", 1.0, 0, [("a", 1.0)])]
    assert shape(plan(folder, "adapters: {adapter: a, weight: 2}")) == [("sequence", 1.0, 0, [("a", 2.0)])]


def test_a_base_may_be_a_hub_id_and_paths_may_be_whole(folder: Path) -> None:
    made = plan(folder, "{base: someone/llama, adapters: [a], output: /elsewhere/out}")
    assert (made.base, made.output) == ("someone/llama", "/elsewhere/out")
    (folder / "someone").mkdir()
    assert plan(folder, "{base: someone/llama, adapters: [a]}").base == str(folder / "someone" / "llama")


def test_names_of_the_workspace_are_known(folder: Path) -> None:
    workspace = Workspace(folder / "space.yaml", {"base": "base", "adapters": {"mine": "b"}})
    assert plan(folder, "adapters: [mine]", workspace).adapters[0].path == folder / "b"
    with pytest.raises(UserError, match="No adapter 'mine'"):
        plan(folder, "adapters: [mine]")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"plan\.yaml: names no adapters; add `adapters: \[NAME, \.\.\.\]`"),
        ("adapters: []", "names no adapters"),
        ("- a", r"plan\.yaml: must hold `name: value` lines"),
        ("adapter: [a]", r"plan\.yaml: unknown setting 'adapter' \(did you mean 'adapters'\?\)"),
        ("{adapters: [a], base: [x]}", r"plan\.yaml: base: "),
        ("{adapters: [a], dtype: fp16}", r"dtype 'fp16'.*; one of float32, float16, bfloat16"),
        ("{adapters: [a], dtype: float61}", r"dtype 'float61' \(did you mean 'float16'\?\)"),
        ("{adapters: [a], format: gguf}", "format 'gguf'; one of hf, meta"),
        ("adapters: [a, 3]", r"adapters, item 2: 3 is no adapter; write a name, a directory, or name=dir"),
        ("adapters: [[a, b]]", r"item 1: \['a', 'b'\] is no adapter"),
        ("adapters: [{weight: 1}]", r"item 1: names no adapter \(adapter: NAME\)"),
        ("adapters: ['']", "item 1: names no adapter"),
        (
            "adapters: [{adapter: a, wieght: 1}]",
            r"item 1: unknown setting 'wieght' \(did you mean 'weight'\?\)",
        ),
        ("adapters: [{adapter: a, weight: 0}]", "item 1, weight: 0 is no weight"),
        ("adapters: [{adapter: a, weight: true}]", "item 1, weight: True is no weight"),
        ("adapters: [{adapter: a, weight: much}]", "item 1, weight: 'much' is no weight"),
        ("adapters: [{adapter: a, weight: [1]}]", r"item 1, weight: \[1\] is no weight"),
        ("adapters: [{adapter: a, weight: .inf}]", "item 1, weight: inf is no weight"),
        ("adapters: [{adapter: a, weight: }]", "item 1, weight: None is no weight"),
        (
            "adapters: [{combine: tie, adapters: [a, b]}]",
            r"item 1: combine 'tie' \(did you mean 'ties'\?\); one of",
        ),
        ("adapters: [{adapters: [a, b]}]", "item 1: combine ''; one of linear, ties, dare_linear, dare_ties"),
        ("adapters: [{combine: linear, adapters: [a]}]", "item 1: linear combines two adapters or more"),
        ("adapters: [{combine: linear}]", "item 1: linear combines two adapters or more"),
        ("adapters: [{combine: linear, densty: 1, adapters: [a, b]}]", r"\(did you mean 'density'\?\)"),
        (
            "adapters: [{combine: linear, density: 1, adapters: [a, b]}]",
            "density is for ties, dare_linear, dare_t",
        ),
        (
            "adapters: [{combine: ties, adapters: [a, b]}]",
            "item 1: density: ties needs the share of each delta",
        ),
        ("adapters: [{combine: ties, density: 0, adapters: [a, b]}]", "density 0: ties needs the share"),
        ("adapters: [{combine: ties, density: 1.1, adapters: [a, b]}]", "density 1.1: ties needs the share"),
        ("adapters: [{combine: ties, density: .nan, adapters: [a, b]}]", "density nan: ties needs"),
        ("adapters: [{combine: ties, density: true, adapters: [a, b]}]", "density True: ties needs"),
        ("adapters: [{combine: ties, density: half, adapters: [a, b]}]", "density 'half': ties needs"),
        (
            "adapters: [{combine: ties, density: 1, seed: 1, adapters: [a, b]}]",
            "seed is for dare_linear and dare_",
        ),
        (
            "adapters: [{combine: dare_ties, density: 1, seed: -1, adapters: [a, b]}]",
            "seed -1: a whole number",
        ),
        (
            "adapters: [{combine: dare_ties, density: 1, seed: 1.5, adapters: [a, b]}]",
            "seed 1.5: a whole number",
        ),
        ("adapters: [{combine: linear, adapters: [a, zzz]}]", "No adapter 'zzz'"),
        (
            "adapters: [{combine: linear, adapters: [a, {combine: linear, adapters: [b, c]}]}]",
            "item 1, adapter 2: a step that combines adapters holds adapters, not steps",
        ),
        (
            "adapters: [{combine: linear, adapters: [a, {adapter: b, weight: 0}]}]",
            "adapter 2, weight: 0 is no",
        ),
    ],
)
def test_a_plan_that_is_none_is_refused(folder: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        plan(folder, text)
    assert str(caught.value).count("\n") == 0


def test_a_missing_plan_file(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"plan\.yaml: no such file"):
        read_plan(tmp_path / "plan.yaml", None)


def test_plans_are_found_by_file_or_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_plan("pro") == shipped_plans()["pro"]
    (folder / "pro").write_text("adapters: [a]")
    assert find_plan("pro") == Path("pro")
    with pytest.raises(
        UserError,
        match=r"--plan plus-alpca: no such file \(did you mean 'plus-alpaca'\?\); plans that come along: combined, ",
    ):
        find_plan("plus-alpca")
    with pytest.raises(UserError, match=r"--plan a: no such file; plans that come along"):
        find_plan("a")  # a directory


def test_the_shipped_plans_name_published_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each can be followed by someone who has nothing but a base; the order is the published one."""
    place = make(tmp_path / "snapshot")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(place))
    assert set(shipped_plans()) == {"combined", "plus-alpaca", "pro", "weighted"}
    for file in shipped_plans().values():
        made = read_plan(file, None)
        assert (made.base, made.output) == (None, None), file
        below: list[str] = []
        for step in made.steps:
            for adapter in step.adapters:
                assert adapter.published is not None
                assert list(adapter.published.after) == below
            below += [adapter.name for adapter in step.adapters]
        assert f"--plan {file.stem} " in file.read_text()
    weights = [adapter.weight for adapter in read_plan(shipped_plans()["weighted"], None).adapters]
    assert weights == [1.0, 0.7]
    assert shape(read_plan(shipped_plans()["combined"], None))[1][:2] == ("ties", 0.5)
