"""What `eval` is asked for: by its options, by the workspace, and what is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chinese_llama.errors import UserError
from chinese_llama.evaluate.sets import Asked, evaluation
from chinese_llama.workspace import FILE, Workspace
from tests.merging.making import make

Z = {"text": ["zh=z.jsonl"]}


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    for name in ("plus", "alpaca"):
        make(tmp_path / "work" / name, tag=len(name))
    (tmp_path / "work" / "extended").mkdir()
    return workspace(tmp_path)


def workspace(folder: Path, **more: Any) -> Workspace:
    return Workspace(
        folder / FILE, {"base": "llama", "eval": {"text": {"zh": "z.jsonl", "en": "e.txt"}, **more}}
    )


def names(asked: Asked) -> list[str]:
    return [*([asked.baseline.name] if asked.baseline else []), *(subject.name for subject in asked.subjects)]


# --- without a workspace


def test_a_model_and_texts(tmp_path: Path) -> None:
    asked = evaluation(
        None, {"model": "work/merged", "text": ["zh=a.jsonl", "en=b=c.txt"], "stride": 5, "window": 9}
    )
    assert names(asked) == ["merged"] and asked.subjects[0].place == "work/merged"
    assert asked.request.texts == {"zh": Path("a.jsonl"), "en": Path("b=c.txt")}
    assert (asked.request.stride, asked.request.window, asked.speed) == (5, 9, False)
    assert (asked.baseline, asked.limits) == (None, {})


def test_a_model_and_adapters_unmerged_are_two_subjects(tmp_path: Path) -> None:
    places = [make(tmp_path / name, tag=index) for index, name in enumerate("pq")]
    loras = f"plus={places[0]},{places[1]}"
    asked = evaluation(None, {"model": "merged", "base": "models/llama", "loras": loras, **Z})
    assert names(asked) == ["merged", "llama + plus + q"]
    assert asked.subjects[1].place == "models/llama"
    assert [adapter.path for adapter in asked.subjects[1].adapters] == places


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give --model and --text"),
        ({"model": "m"}, "give --text"),
        (Z, "give --model"),
        ({"loras": "a", **Z}, "give --base"),
        ({"model": "m", "choices": ["ceval"]}, "--choices ceval=: write EXAM=DIRECTORY"),
        ({"model": "m", "base": "b", **Z}, "--base is what the adapters of --loras are put on"),
        ({"model": "m", "text": ["zh"]}, "--text zh: write NAME=FILE"),
        ({"model": "m", "text": ["=f"]}, "--text =f: write NAME=FILE"),
        ({"model": "m", "text": ["zh="]}, "--text zh=: write NAME=FILE"),
        ({"model": "m", "text": ["a=f", "a=g"]}, "--text a=g: 'a' is given twice"),
        ({"model": "m", "text": ["a=f", "b=./f"]}, "'a' and 'b' are the same file"),
        ({"model": "m", "choices": ["x=d"], "speed": True}, "--speed decodes the beginning of a text"),
        ({"model": "m", **Z, "max_regression": ["zh=0.1"]}, "needs a model to compare with; give --baseline"),
        ({"model": "m", **Z, "baseline": "b", "max_regression": ["zh"]}, "zh: write NAME=SHARE"),
        ({"model": "m", **Z, "baseline": "b", "max_regression": ["zh=2%"]}, "zh: a limit is a share of 0"),
        ({"model": "m", **Z, "baseline": "b", "max_regression": ["zh=nan"]}, "zh: a limit is a share of 0"),
        ({"model": "m", **Z, "baseline": "b", "max_regression": ["zh=-1"]}, "zh: a limit is a share of 0"),
        ({"model": "m", **Z, "baseline": "b", "max_regression": ["zh=1", "zh=1"]}, "given twice"),
        (
            {"model": "m", "text": ["news=f"], "baseline": "b", "max_regression": ["nwes=1"]},
            r"nwes: no text of that name \(did you mean 'news'\?\); measured are news",
        ),
        ({"model": "m", "base": "b", "loras": "a,,b", **Z}, "an item is empty"),
    ],
    ids=str,
)
def test_what_is_refused(
    given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        evaluation(None, given)


def test_a_baseline_has_another_name(tmp_path: Path) -> None:
    for model, baseline, wanted in (
        ("a/m", "b/l", ["l", "m"]),
        ("a/m", "b/m", ["b/m", "a/m"]),
        ("a/m", "a/m", ["a/m (baseline)", "a/m"]),
    ):
        asked = evaluation(None, {"model": model, "baseline": baseline, "max_regression": ["zh=0.02"], **Z})
        assert names(asked) == wanted
        assert asked.limits == {"zh": 0.02}


# --- in a workspace


def test_base_and_merged_where_nothing_is_given(space: Workspace, tmp_path: Path) -> None:
    asked = evaluation(space, {})
    assert names(asked) == ["base"] and asked.baseline is None
    (tmp_path / "work" / "merged").mkdir()
    asked = evaluation(space, {})
    assert names(asked) == ["base", "merged"] and asked.baseline is not None
    assert asked.baseline.place == str(tmp_path / "llama")
    assert asked.request.texts == {"zh": tmp_path / "z.jsonl", "en": tmp_path / "e.txt"}
    assert names(evaluation(space, {"baseline": "other"})) == ["other", "merged"]


def test_a_model_alone_is_compared_only_for_a_limit(space: Workspace) -> None:
    assert names(evaluation(space, {"model": "m"})) == ["m"]
    assert names(evaluation(space, {"model": "m", "max_regression": ["en=0.02"]})) == ["base", "m"]
    with pytest.raises(UserError, match="nothing is merged yet"):
        evaluation(space, {"max_regression": ["en=0.02"]})


def test_adapters_are_the_workspaces_on_its_extended_model(space: Workspace, tmp_path: Path) -> None:
    asked = evaluation(space, {"loras": "plus,alpaca"})
    assert names(asked) == ["extended + plus + alpaca"]
    assert asked.subjects[0].place == str(tmp_path / "work" / "extended")
    with pytest.raises(UserError, match=r"No adapter 'plsu' \(did you mean 'plus'\?\)"):
        evaluation(space, {"loras": "plsu"})
    (tmp_path / "work" / "extended").rmdir()
    with pytest.raises(UserError, match="make it with chinese-llama extend-model, or give --base"):
        evaluation(space, {"loras": "plus"})


def test_the_workspace_says_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "work" / "merged").mkdir(parents=True)
    space = workspace(
        tmp_path,
        stride=7,
        window=20,
        shots=2,
        wikitext="w.txt",
        choices={"ceval": "exam"},
        max_regression={"en": 0.1},
    )
    asked = evaluation(space, {})
    assert (asked.request.stride, asked.request.window, asked.request.shots) == (7, 20, 2)
    assert asked.request.wikitext == tmp_path / "w.txt"
    assert asked.request.choices == {"ceval": str(tmp_path / "exam")}
    assert asked.limits == {"en": 0.1}
    given = evaluation(space, {"stride": 3, "max_regression": ["zh=0.5"]})
    assert (given.request.stride, given.request.window, given.limits) == (3, 20, {"zh": 0.5})
    other = evaluation(space, Z)  # texts of the command line: exams and limits are of those of the workspace
    assert (list(other.request.texts), other.request.choices, other.limits) == (["zh"], {}, {})
    exam = evaluation(space, {"choices": ["ceval"]})
    assert (exam.request.choices, exam.request.texts) == ({"ceval": "exam"}, {})


def test_a_workspace_without_texts_says_where_to_add_them(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=rf"{FILE} names no texts, and pretraining holds none out .*; add eval.text, or give --text",
    ):
        evaluation(Workspace(tmp_path / FILE, {"base": "x"}), {})
    bad = workspace(tmp_path, max_regression={"fr": 0.1})
    with pytest.raises(UserError, match="fr: no text of that name"):
        evaluation(bad, {"model": "m"})
