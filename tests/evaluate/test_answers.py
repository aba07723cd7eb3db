"""Prompts of every form, answers to JSONL, a run that goes on where it was stopped."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import BadFile, Interrupted, OutputExists, UserError
from chinese_llama.evaluate import answers as module
from chinese_llama.evaluate.answers import (
    ANSWERS,
    JUDGEMENTS,
    PAGE,
    VOTES,
    How,
    Prompt,
    answer_file,
    read_answers,
    read_prompts,
    right,
)
from chinese_llama.evaluate.generate import answer
from chinese_llama.evaluate.models import Subject, open_subject
from chinese_llama.merging.plan import load
from chinese_llama.model.load import load_model, load_tokenizer
from tests import tiny
from tests.model.test_adapters import peft_adapter

HOW = How(max_new_tokens=6)
PROMPTS = ["The fox", "中国", "She sells"]


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


# --- prompts


def test_prompts_of_records(tmp_path: Path) -> None:
    user = {"role": "user", "content": "问五"}
    records = [
        {"prompt": "问一", "keyword": "答"},
        {"instruction": "问二", "input": "给定"},
        {"instruction": "问三", "input": "", "output": "答", "keyword": "词"},
        {"instruction": "Human:问四\nAssistant:答\nHuman:再问\nAssistant:", "output": "答"},
        {"messages": [{"role": "system", "content": "系统"}, user]},
        {"conversations": [{"from": "human", "value": "问六"}, {"from": "gpt", "value": "答"}]},
        {"prompt": "问七", "keyword": None, "messages": "not looked at"},
    ]
    wanted = [
        Prompt("问一", "答", 1),
        Prompt("问二\n给定", None, 2),
        Prompt("问三", "词", 3),
        Prompt("问四", None, 4),
        Prompt("问五", None, 5),
        Prompt("问六", None, 6),
        Prompt("问七", None, 7),
    ]
    file = lines(tmp_path / "p.jsonl", *records)
    assert read_prompts(file) == wanted
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert read_prompts(tmp_path / "p.jsonl.gz") == wanted
    (tmp_path / "p.json").write_text(json.dumps(records), encoding="utf-8")
    assert [(p.text, p.line) for p in read_prompts(tmp_path / "p.json")] == [(p.text, None) for p in wanted]
    table = pyarrow.table({"prompt": ["问一", "问二"], "keyword": ["答", None]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == [Prompt("问一", "答", 1), Prompt("问二", None, 2)]


def test_prompts_of_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeff 问一 \r\n\r\n问二".encode())
    assert read_prompts(tmp_path / "p.txt") == [Prompt("问一", None, 1), Prompt("问二", None, 3)]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"text": "x"}, "line 2: has no field 'prompt', and is in no known format (found: text)"),
        ([1], "line 2: has no field 'prompt', and is in no known format (found: list)"),
        ({"prompt": 7}, "line 2: the field 'prompt' is not text."),
        ({"prompt": None}, "line 2: the field 'prompt' is not text."),
        ({"prompt": " \n"}, "line 2: the prompt is empty."),
        ({"prompt": "x", "keyword": 7}, "line 2: the field 'keyword' is not text."),
        ({"prompt": "\ud800"}, "line 2: holds half a surrogate pair"),
        ({"messages": []}, "line 2: the prompt is empty."),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 2: the prompt is empty."),
        ({"messages": 7}, "line 2: has no field 'prompt', and it has no list 'messages'"),
        ({"conversations": [{"from": "moon", "value": ""}]}, "turn 1 is from 'moon'"),
        ({"instruction": 7}, "its 'instruction' is not text"),
    ],
)
def test_a_record_without_a_prompt_is_told(record: Any, told: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "x"}}\n{json.dumps(record)}\n')
    with pytest.raises(BadFile) as error:
        read_prompts(file)
    assert told in str(error.value)


def test_files_that_hold_no_prompts_are_told(tmp_path: Path) -> None:
    for name, content, told in (
        ("e.txt", "\n \n", "holds no prompts"),
        ("e.jsonl", "", "holds no prompts"),
        ("e.json", '[{"text": "x"}]', "record 1 has no field"),
        ("e.jsonl", "{", "line 1: is not valid JSON"),
        ("e.csv", "x", "unknown format"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(BadFile, match=told):
            read_prompts(tmp_path / name)
    with pytest.raises(BadFile, match="is a directory"):
        read_prompts(tmp_path)
    with pytest.raises(BadFile, match="no such file"):
        read_prompts(tmp_path / "no.txt")


def test_right_is_the_keyword_in_the_answer() -> None:
    prompts = [Prompt("a", "北京"), Prompt("b", "长江"), Prompt("c")]
    found = right(["是北京。", "黄河", "北京"], prompts)
    assert found == {
        "questions": 2, "right": 1, "share": 0.5, "interval": pytest.approx([0.0945, 0.9055], abs=1e-4)
    }  # fmt: skip
    assert right(["x"], [Prompt("c")]) is None


# --- answers


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return tmp_path / "p.txt"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another pico base, with the same tokenizer."""
    return tiny.write_base(
        tmp_path_factory.mktemp("other") / "base", tiny.base_tokenizer(), num_hidden_layers=1
    )


def said(place: Path, **how: Any) -> list[str]:
    model, tokenizer = load_model(place), load_tokenizer(place)
    seed = how.pop("seed", 0)
    return [answer(model, tokenizer, p, 6, seed=seed + n, **how) for n, p in enumerate(PROMPTS)]


def test_both_models_answer_every_prompt_as_they_do_alone(
    base: Path, other: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    models = {"A": str(base), "B": str(other)}
    answer_file(prompts, models, output, How(6, temperature=0.9, seed=3))
    records = [json.loads(line) for line in (output / ANSWERS).read_text(encoding="utf-8").splitlines()]
    wanted = [said(place, temperature=0.9, seed=3) for place in (base, other)]
    assert [list(r["answers"].values()) for r in records] == [
        list(pair) for pair in zip(*wanted, strict=True)
    ]
    assert wanted[0] != wanted[1]
    assert [(r["number"], r["line"], r["prompt"]) for r in records] == [
        (n, n, p) for n, p in enumerate(PROMPTS, 1)
    ]
    answered, names, seed = read_answers(output)
    assert (len(answered), names, seed) == (3, models, 3)
    manifest = read_manifest(output)
    assert manifest and manifest.kind == "answers" and set(manifest.inputs) == {"A", "B", "prompts"}
    how = {"max_new_tokens": 6, "temperature": 0.9, "seed": 3, "raw": False}
    assert manifest.settings == how | {"models": manifest.settings["models"]}
    assert set(manifest.settings["models"]) == {"A", "B"}
    assert (output / PAGE).read_text(encoding="utf-8").count("<section") == 3
    assert {path.name for path in tmp_path.iterdir()} == {"out", "p.txt"}


def test_the_keywords_are_counted_and_one_model_may_answer(base: Path, tmp_path: Path) -> None:
    first = said(base)[0]
    file = lines(tmp_path / "p.jsonl", {"prompt": PROMPTS[0], "keyword": first}, {"prompt": "x"})
    manifest = answer_file(file, {"A": str(base)}, tmp_path / "out", HOW)
    assert manifest.metrics["right"]["A"]["right"] == manifest.metrics["right"]["A"]["questions"] == 1


def test_the_same_prompt_is_drawn_for_anew(base: Path) -> None:
    """So that prompts are independent, as the intervals of win rates take them to be."""
    same = dict(enumerate([Prompt("The fox")] * 6, 1))
    model, tokenizer = load_model(base), load_tokenizer(base)
    drawn = dict(module.answering(model, tokenizer, same, How(6, temperature=1.5)))
    assert len(set(drawn.values())) > 1
    left = dict(list(same.items())[4:])
    assert dict(module.answering(model, tokenizer, left, How(6, temperature=1.5))) == {
        5: drawn[5],
        6: drawn[6],
    }


def stopping(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> Callable[[], int]:
    """Make the run end in `error` after some answers; gives how many were generated."""
    original, count = module.answering, [0]

    def broken(*arguments: Any) -> Any:
        for said in original(*arguments):
            if count[0] == after:
                raise error
            count[0] += 1
            yield said

    monkeypatch.setattr(module, "answering", broken)
    return lambda: count[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("The disk is gone.")])
def test_a_run_that_was_stopped_goes_on(
    error: BaseException, base: Path, other: Path, prompts: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    models, output = {"A": str(base), "B": str(other)}, tmp_path / "out"
    with monkeypatch.context() as patch:
        stopping(patch, 4, error)
        wanted = "Stopped: 4 of 6 answers are kept in .*out.run; the same command goes on"
        stopped = isinstance(error, KeyboardInterrupt)
        with pytest.raises(Interrupted if stopped else UserError, match=wanted if stopped else "gone"):
            answer_file(prompts, models, output, HOW)
    assert not output.exists()
    journal = tmp_path / "out.run" / module.JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"model": "B", "sa')  # what a kill leaves
    with monkeypatch.context() as patch:
        generated = stopping(patch, 99, error)
        answer_file(prompts, models, output, HOW)
        assert generated() == 2
    assert [a.answers for a in read_answers(output)[0]] == [
        {"A": a, "B": b} for a, b in zip(said(base), said(other), strict=True)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "p.txt"}


def test_what_was_left_of_other_settings_is_not_taken_and_not_lost_unasked(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopping(patch, 2, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            answer_file(prompts, {"A": str(base)}, tmp_path / "out", How(2))
    with pytest.raises(UserError, match=r"out\.run holds 2 answers of a run with other inputs or settings"):
        answer_file(prompts, {"A": str(base)}, tmp_path / "out", HOW)
    answer_file(prompts, {"A": str(base)}, tmp_path / "out", HOW, force=True)
    assert [a.answers["A"] for a in read_answers(tmp_path / "out")[0]] == said(base)


def test_a_directory_of_somebody_else_is_left_alone(base: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"out\.run, where answers are kept on the way, holds other things"):
        answer_file(prompts, {"A": str(base)}, tmp_path / "out", HOW)
    assert (tmp_path / "out.run" / "notes").read_text() == "mine"


def test_stopped_before_the_first_answer_nothing_is_left(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        answer_file(prompts, {"A": str(base)}, tmp_path / "out", HOW)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_what_stands_is_kept_and_opinions_are_not_replaced(base: Path, prompts: Path, tmp_path: Path) -> None:
    output, models = tmp_path / "out", {"A": str(base)}
    made = answer_file(prompts, models, output, HOW)
    (output / VOTES).write_text("{}\n")
    assert answer_file(prompts, models, output, HOW).created == made.created
    with pytest.raises(OutputExists, match="max_new_tokens 6, and 7"):
        answer_file(prompts, models, output, How(7))
    for name in (VOTES, JUDGEMENTS):
        (output / name).write_text("{}\n")
        with pytest.raises(UserError, match=f"{name} is about the answers there; move it away"):
            answer_file(prompts, models, output, How(7), force=True)
        (output / name).unlink()
    assert answer_file(prompts, models, output, How(7), force=True).settings["max_new_tokens"] == 7


# --- what cannot be answered


def test_a_prompt_that_leaves_no_room_is_told_with_its_line(base: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("x\n\n" + "fox " * 200)
    with pytest.raises(
        BadFile, match=r"p\.txt, line 3: the prompt is too long: \d+ tokens, and the model holds 128"
    ):
        answer_file(tmp_path / "p.txt", {"A": str(base)}, tmp_path / "out")
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "x"}, {"prompt": "fox " * 200}]))
    with pytest.raises(BadFile, match=r"p\.json: prompt 2 is too long"):
        answer_file(tmp_path / "p.json", {"A": str(base)}, tmp_path / "out")
    assert not (tmp_path / "out.run").exists()


def test_a_second_model_without_a_tokenizer_is_told_before_the_first_answers(
    base: Path, prompts: Path, tmp_path: Path
) -> None:
    bare = tiny.write_llama(tmp_path / "bare", 420)
    with pytest.raises(BadFile, match="bare: has no tokenizer"):
        answer_file(prompts, {"A": str(base), "B": str(bare)}, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bare", "p.txt"}


def test_a_model_that_gives_nan_is_told(base: Path, prompts: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(base, "float32"), load_tokenizer(base)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    broken = tmp_path / "nan"
    model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="not finite"):
            answer_file(prompts, {"A": str(broken)}, tmp_path / "out", How(6, temperature))
    assert {path.name for path in tmp_path.iterdir()} == {"nan", "p.txt"}


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"number": 1, "prompt": "x", "answers": {"A": "y"}}, "line 2: number 1 is there twice"),
        ({"number": 2, "prompt": "x", "answers": {"B": "y"}}, "line 2: has answers of other models"),
        ({"number": 2, "prompt": "x", "answers": {}}, "line 2: is no record"),
        ({"number": 2, "prompt": "x", "answers": {"A": 1}}, "line 2: is no record"),
        ({"number": True, "prompt": "x", "answers": {"A": "y"}}, "line 2: is no record"),
        ({"number": 2, "answers": {"A": "y"}}, "line 2: is no record"),
        ([], "line 2: is no record"),
    ],
)
def test_answers_that_are_none_are_told(second: Any, told: str, tmp_path: Path) -> None:
    lines(tmp_path / ANSWERS, {"number": 1, "prompt": "x", "answers": {"A": "y"}}, second)
    with pytest.raises(BadFile, match=told):
        read_answers(tmp_path)


def test_answers_from_elsewhere_will_do(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"answers.jsonl: no such file; chinese-llama generate"):
        read_answers(tmp_path)
    (tmp_path / ANSWERS).write_text("")
    with pytest.raises(BadFile, match="holds no answers"):
        read_answers(tmp_path)
    lines(tmp_path / ANSWERS, {"number": 7, "prompt": "x", "answers": {"ours": "y", "theirs": "z"}})
    answered, names, seed = read_answers(tmp_path)
    assert (answered[0].number, names, seed) == (7, {"ours": "ours", "theirs": "theirs"}, 0)


def test_a_model_may_have_adapters_that_are_not_merged(
    base: Path, extended: Path, prompts: Path, tmp_path: Path
) -> None:
    places = [peft_adapter(extended, tmp_path / name, seed=seed) for seed, name in enumerate("xy")]
    adapters = [load(place.name, place) for place in places]
    models, output = {"A": str(extended), "B": str(base)}, tmp_path / "out"
    manifest = answer_file(prompts, models, output, HOW, adapters=adapters)
    model, tokenizer = open_subject(Subject("it", str(extended), adapters))
    wanted = [answer(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert [one.answers["A"] for one in read_answers(output)[0]] == wanted != said(extended)
    assert read_answers(output)[1] == {"A": f"{extended} + x + y", "B": str(base)}
    assert set(manifest.inputs) == {"A", "B", "prompts", "adapter:0", "adapter:1"}
    with pytest.raises(OutputExists, match="from a adapter:1"):
        answer_file(prompts, models, output, HOW, adapters=adapters[:1])


def test_another_tokenizer_or_template_asks_again(base: Path, prompts: Path, tmp_path: Path) -> None:
    """The weights are the same, the answers are not."""
    model = shutil.copytree(base, tmp_path / "model")
    made = answer_file(prompts, {"A": str(model)}, tmp_path / "out", How(2))
    assert answer_file(prompts, {"A": str(model)}, tmp_path / "out", How(2)).created == made.created
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    with pytest.raises(OutputExists, match="was made with models"):
        answer_file(prompts, {"A": str(model)}, tmp_path / "out", How(2))
