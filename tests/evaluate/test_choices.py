"""Multiple choice against plain torch, one question at a time, with the prompts written out by hand."""

from __future__ import annotations

import copy
import csv
import logging
import math
import os
import random
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy
import pytest
import torch

from chinese_llama.data.templates import text_ids
from chinese_llama.errors import BadFile, UserError
from chinese_llama.evaluate import harness
from chinese_llama.evaluate.choices import (
    average,
    categories,
    check_fits,
    multiple_choice,
    wikitext,
)
from chinese_llama.evaluate.exams import find_exam, read_exam
from chinese_llama.evaluate.harness import Loaded, choice_ids, likelihoods
from chinese_llama.model.load import load_model, load_tokenizer
from tests import tiny
from tests.evaluate.exam_files import csv_file, write_exam

SUBJECTS = {
    "ceval": {"advanced_mathematics": 6, "law": 9, "physician": 5, "logic": 2},
    "cmmlu": {"agronomy": 5, "chinese_history": 8, "virology": 4},
}
SCORED = {"ceval": "val", "cmmlu": "test"}
EXAMS = sorted(SUBJECTS)
PROMPTS = {
    "ceval": ("以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n", "", "答案："),
    "cmmlu": ("以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", "题目：", "答案是："),
}
NAMES = {"advanced_mathematics": "高等数学", "law": "法学", "physician": "医师资格", "logic": "逻辑学"}
NAMES |= {"agronomy": "农学", "chinese_history": "中国历史", "virology": "病毒学"}


@pytest.fixture(scope="module")
def model(extended: Path) -> Any:
    loaded = load_model(extended, "float32")
    loaded.config.max_position_embeddings = 2048
    return loaded


@pytest.fixture(scope="module")
def reader(extended: Path) -> Any:
    return load_tokenizer(extended)


@pytest.fixture(scope="module")
def exams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exams")
    return {exam: write_exam(folder / exam, exam, SUBJECTS[exam]) for exam in EXAMS}


def rows(exam: str, root: Path, split: str, subject: str) -> list[list[str]]:
    """Question, choices and answer of each line."""
    with csv_file(root, exam, split, subject).open(encoding="utf-8", newline="") as stream:
        return [line[1:7] for line in list(csv.reader(stream))[1:]]


def prompts(exam: str, root: Path, subject: str, shots: int) -> list[str]:
    begin, before, end = PROMPTS[exam]

    def asked(row: list[str]) -> str:
        return f"{before}{row[0]}\nA. {row[1]}\nB. {row[2]}\nC. {row[3]}\nD. {row[4]}\n{end}"

    examples = "".join(f"{asked(row)}{row[5]}\n\n" for row in rows(exam, root, "dev", subject)[:shots])
    head = begin.format(NAMES[subject]) + examples
    return [head + asked(row) for row in rows(exam, root, SCORED[exam], subject)]


@torch.no_grad()
def log_probability(model: Any, ids: list[int], wanted: list[int]) -> float:
    logits = model(torch.tensor([ids + wanted])).logits[0].double()
    known = torch.log_softmax(logits, -1)
    return sum(float(known[len(ids) + n - 1, token]) for n, token in enumerate(wanted))


def letter_id(tokenizer: Any, letter: str) -> int:
    """The pico vocabularies have no piece for these letters: a byte stands for one."""
    (index,) = tokenizer.convert_tokens_to_ids([f"<0x{ord(letter):02X}>"])
    assert letter not in tokenizer.get_vocab() and index != tokenizer.unk_token_id
    return index


@torch.no_grad()
def letter(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = [tokenizer.bos_token_id, *text_ids(tokenizer, prompt)]
    logits = model(torch.tensor([ids])).logits[0, -1]
    return max("ABCD", key=lambda choice: float(logits[letter_id(tokenizer, choice)]))


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("exam", EXAMS)
def test_accuracies_are_those_of_plain_torch(
    exam: str, shots: int, exams: dict[str, Path], model: Any, reader: Any
) -> None:
    told = multiple_choice(model, reader, exam, exams[exam], shots)
    assert list(told["subjects"]) == [s for s in find_exam(exam).subjects if s in SUBJECTS[exam]]
    errors = []
    for subject, size in SUBJECTS[exam].items():
        answers = [row[5] for row in rows(exam, exams[exam], SCORED[exam], subject)]
        said = [letter(model, reader, prompt) for prompt in prompts(exam, exams[exam], subject, shots)]
        right = sum(a == b for a, b in zip(said, answers, strict=True)) / size
        one = told["subjects"][subject]
        assert (one["accuracy"], one["questions"]) == (pytest.approx(right), size)
        errors.append(math.sqrt(right * (1 - right) / (size - 1)))
        assert one["stderr"] == pytest.approx(errors[-1])
    shares = [one["accuracy"] for one in told["subjects"].values()]
    assert told["average"]["accuracy"] == pytest.approx(sum(shares) / len(shares))
    assert told["average"]["stderr"] == pytest.approx(math.sqrt(sum(e * e for e in errors)) / len(errors))
    assert (told["exam"], told["shots"], told["questions"]) == (exam, shots, sum(SUBJECTS[exam].values()))
    assert told["shots_used"] == dict.fromkeys(SUBJECTS[exam], shots)
    assert told["source"].startswith("lm-eval 0.") and told["place"] == str(exams[exam])
    assert len(told["missing"]) == len(find_exam(exam).subjects) - len(shares)


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("exam", EXAMS)
def test_the_prompts_are_the_published_ones_and_examples_the_first_of_dev(
    exam: str, shots: int, exams: dict[str, Path], model: Any, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def recorded(tokenizer: Any, context: str, choices: list[str]) -> Any:
        assert choices == ["A", "B", "C", "D"]
        seen.append(context)
        return choice_ids(tokenizer, context, choices)

    monkeypatch.setattr(harness, "choice_ids", recorded)
    multiple_choice(model, reader, exam, exams[exam], shots)
    wanted = [prompts(exam, exams[exam], s, shots) for s in find_exam(exam).subjects if s in SUBJECTS[exam]]
    assert seen == [prompt for of_subject in wanted for prompt in of_subject]


def test_batched_is_the_same_as_one_by_one(exams: dict[str, Path], model: Any, reader: Any) -> None:
    texts = prompts("ceval", exams["ceval"], "law", 0) + prompts("ceval", exams["ceval"], "physician", 3)
    asked = [pair for text in texts for pair in choice_ids(reader, text, "ABCD")]
    asked += [([1, 5, 9], [4, 8, 7]), ([1, 5, 9], [4, 8, 6]), ([1], [300])]
    together = likelihoods(model, asked, 2, 4096)
    assert together == pytest.approx(likelihoods(model, asked, 2, 1), rel=1e-4)
    assert together == pytest.approx([log_probability(model, *pair) for pair in asked], rel=1e-4)


def test_the_harness_has_the_same_probabilities_through_its_own_model(
    exams: dict[str, Path], model: Any, reader: Any
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = prompts("cmmlu", exams["cmmlu"], "virology", 1)
    asked = [Instance("loglikelihood", {}, (text, choice), 0) for text in texts for choice in "ABCD"]
    theirs = HFLM(model, backend="causal", tokenizer=reader, batch_size=3, add_bos_token=True)
    ours = [value for value, _ in Loaded(model, reader).loglikelihood(asked)]
    assert ours == pytest.approx([value for value, _ in theirs.loglikelihood(asked)], rel=1e-4)
    limit = 64
    theirs = HFLM(
        model, backend="causal", tokenizer=reader, batch_size=3, add_bos_token=False, max_length=limit
    )
    long = [" ".join(tiny.ENGLISH[:9]), tiny.CHINESE[0], "".join(tiny.CHINESE[:7])]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in long]
    loaded = Loaded(model, reader)
    loaded.limit = limit
    assert loaded.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), rel=1e-4
    )


def test_a_model_that_always_knows(tmp_path: Path, extended: Path, reader: Any) -> None:
    write_exam(tmp_path, "cmmlu", {"arts": 4, "virology": 1}, answer="C")
    knowing = load_model(extended, "float32")
    knowing.config.max_position_embeddings = 2048
    head = torch.nn.Linear(knowing.lm_head.in_features, knowing.lm_head.out_features)
    head.weight, head.bias.data[:] = knowing.lm_head.weight, 0.0
    head.bias.data[letter_id(reader, "C")] = 1e4
    knowing.lm_head = head
    told = multiple_choice(knowing, reader, "cmmlu", tmp_path, 1)
    assert told["average"] == {"accuracy": 1.0, "stderr": None}, "one question tells no standard error"
    assert told["subjects"]["arts"] == {
        "accuracy": 1.0,
        "stderr": 0.0,
        "questions": 4,
        "category": "Humanities",
    }
    assert told["categories"] == {
        "STEM": {"accuracy": 1.0, "stderr": None, "questions": 1},
        "Humanities": {"accuracy": 1.0, "stderr": 0.0, "questions": 4},
    }
    head.bias.data[letter_id(reader, "D")] = 2e4
    assert multiple_choice(knowing, reader, "cmmlu", tmp_path, 1)["average"]["accuracy"] == 0.0


def test_categories_average_over_subjects() -> None:
    made = {
        "law": {"accuracy": 0.5, "stderr": 0.3, "questions": 10},
        "logic": {"accuracy": 0.1, "stderr": 0.4, "questions": 1000},
        "college_physics": {"accuracy": 0.9, "stderr": 0.1, "questions": 5},
    }
    told = categories(find_exam("ceval"), made)
    both = {"accuracy": pytest.approx(0.3), "stderr": pytest.approx(0.25), "questions": 1010}
    assert told == {"STEM": average({"x": made["college_physics"]}), "Humanities": both, "Hard": told["STEM"]}
    assert average(made)["accuracy"] == pytest.approx(0.5)


def test_an_adapter_on_top_is_measured(exams: dict[str, Path], extended: Path, reader: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = load_model(extended, "float32")
    plain.config.max_position_embeddings = 2048
    before = multiple_choice(plain, reader, "ceval", exams["ceval"], 0)
    live = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], r=2))
    assert multiple_choice(live, reader, "ceval", exams["ceval"], 0) == before
    asked = choice_ids(reader, prompts("ceval", exams["ceval"], "law", 0)[0], "ABCD")
    bare = likelihoods(live, asked, 2, 4096)
    torch.nn.init.normal_(live.base_model.model.lm_head.lora_B["default"].weight, std=5.0)
    assert max(abs(a - b) for a, b in zip(bare, likelihoods(live, asked, 2, 4096), strict=True)) > 0.01


def longest(reader: Any, exams: dict[str, Path], shots: int) -> dict[str, int]:
    """Tokens of the longest prompt of each subject."""
    return {
        subject: max(
            len(text_ids(reader, text)) + 1 for text in prompts("ceval", exams["ceval"], subject, shots)
        )
        for subject in SUBJECTS["ceval"]
    }


def test_a_prompt_that_does_not_fit_loses_its_first_examples(
    exams: dict[str, Path],
    extended: Path,
    reader: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One by one, question by question, and no more than it takes."""
    short, lengths = load_model(extended, "float32"), longest(reader, exams, 3)
    limit = short.config.max_position_embeddings = sorted(lengths.values())[1] - 100
    tasks: list[Any] = []

    def recorded(model: Any, asked: list[Any], *_: Any) -> list[float]:
        tasks.append(asked)
        return [0.0] * len(asked)

    monkeypatch.setattr(harness, "likelihoods", recorded)
    capfd.readouterr()
    told = multiple_choice(short, reader, "ceval", exams["ceval"], 3)
    lines = capfd.readouterr().err.splitlines()[1:]
    found = [[*context, *wanted] for context, wanted in tasks[0][::4]]
    used = {}
    for subject in told["subjects"]:
        whole = prompts("ceval", exams["ceval"], subject, 3)
        bare = prompts("ceval", exams["ceval"], subject, 0)
        head = PROMPTS["ceval"][0].format(NAMES[subject])
        examples = whole[0].removeprefix(head).split("\n\n")[:3]
        counts = []
        for question in bare:
            for count in (3, 2, 1, 0):
                kept = "".join(f"{example}\n\n" for example in examples[3 - count :])
                ids = [1, *text_ids(reader, head + kept + question.removeprefix(head) + "A")]
                if len(ids) - 1 <= limit:
                    break
            counts.append(count)
            assert found.pop(0) == ids
        used[subject] = min(counts)
        if fewer := sum(count < 3 for count in counts):
            said = f"{subject}: {fewer} of {len(bare)} questions are asked after fewer than 3 examples, {used[subject]} at"
            assert lines.pop(0) == f"{said} least: more do not fit into the model's context."
    assert told["shots_used"] == used and len({*used.values()}) > 1 and not lines and not found


def test_a_question_that_does_not_fit_is_refused(exams: dict[str, Path], model: Any, reader: Any) -> None:
    """With a model, and before there is one: what just fits is asked."""
    texts = [(s, text) for s in SUBJECTS["ceval"] for text in prompts("ceval", exams["ceval"], s, 0)]
    lengths = [len(text_ids(reader, text + "A")) for _, text in texts]
    limit = max(lengths)
    subject, text = texts[lengths.index(limit)]
    line = 2 + prompts("ceval", exams["ceval"], subject, 0).index(text)
    told = (
        f"{csv_file(exams['ceval'], 'ceval', 'val', subject)}, line {line}: the question is {limit} tokens long "
        f"without an example, the model reads {limit - 1}; give a directory without it"
    )
    for window in (limit, None):
        check_fits("ceval", exams["ceval"], 3, reader, window)
    short = copy.copy(model)
    short.config = copy.copy(model.config)
    short.config.max_position_embeddings = limit
    assert multiple_choice(short, reader, "ceval", exams["ceval"], 3)["shots_used"][subject] == 0
    short.config.max_position_embeddings = limit - 1
    with pytest.raises(BadFile) as error:
        multiple_choice(short, reader, "ceval", exams["ceval"], 3)
    assert str(error.value) == f"{told}."
    second = sorted(lengths)[-2]
    more = sum(length >= second for length in lengths) - 1
    with pytest.raises(BadFile, match=rf" without it and {more} more that are too long\.$"):
        check_fits("ceval", exams["ceval"], 0, reader, second - 1)
    with pytest.raises(BadFile, match="holds 5 examples, 6 are asked for"):
        check_fits("ceval", exams["ceval"], 6, reader, None)


def test_a_damaged_model_is_told(exams: dict[str, Path], extended: Path, reader: Any) -> None:
    damaged = load_model(extended, "float32")
    damaged.config.max_position_embeddings = 2048
    with torch.no_grad():
        damaged.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="advanced_mathematics: the model gives values that are not finite"):
        multiple_choice(damaged, reader, "ceval", exams["ceval"], 0)


def test_without_the_extra_it_says_what_to_install(
    exams: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    told = r'^Multiple choice and WikiText-style perplexity need pip install "chinese-llama\[eval\]"\.$'
    with pytest.raises(UserError, match=told):
        check_fits("ceval", exams["ceval"], 0, None, None)
    with pytest.raises(UserError, match=told):
        multiple_choice(None, None, "ceval", exams["ceval"], 0)
    with pytest.raises(UserError, match=told):
        wikitext(None, None, work / "en.jsonl")


def test_bad_input_is_told_before_a_model_is_loaded(exams: dict[str, Path]) -> None:
    check_fits("ceval", exams["ceval"], 5, None, None)
    with pytest.raises(BadFile, match="holds 5 examples, 6 are asked for"):
        check_fits("ceval", exams["ceval"], 6, None, None)
    with pytest.raises(UserError, match="exam 'mmlu' is unknown"):
        check_fits("mmlu", exams["ceval"], 0, None, None)


def test_nothing_around_it_changes(
    exams: dict[str, Path], model: Any, reader: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Random numbers, log levels; and of the harness's own bars and lines nothing is shown."""
    log = logging.getLogger("lm_eval")
    log.setLevel(logging.INFO)
    state = random.getstate(), torch.get_rng_state().tolist(), str(numpy.random.get_state())
    multiple_choice(model, reader, "cmmlu", exams["cmmlu"], 1)
    assert state == (random.getstate(), torch.get_rng_state().tolist(), str(numpy.random.get_state()))
    assert log.level == logging.INFO
    log.setLevel(logging.NOTSET)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == f"{exams['cmmlu']}: 3 of the 67 subjects of CMMLU; averages are theirs.\n"


def test_a_local_directory_needs_no_network_and_leaves_no_file(
    exams: dict[str, Path],
    model: Any,
    reader: Any,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor a copy in a cache. Python tells every connection and every file that is opened."""
    seen: list[str] = []
    watched = True

    def watch(event: str, told: tuple[Any, ...]) -> None:
        writes = event == "open" and told[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if watched and (writes or event == "os.mkdir" or event.startswith("socket.")):
            seen.append(f"{event} {told[0]}")
            raise PermissionError(seen[-1])

    sys.addaudithook(watch)  # for good: there is no way to take it back
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    try:
        assert multiple_choice(model, reader, "cmmlu", exams["cmmlu"], 1)["questions"] == 17
        assert wikitext(model, reader, work / "zh.jsonl")["documents"] == len(tiny.CHINESE)
        assert not seen
        for attempt in ((tmp_path / "x").touch, (tmp_path / "y").mkdir, socket.socket):
            with pytest.raises(PermissionError):
                attempt()
    finally:
        watched = False


def test_the_questions_have_what_the_task_files_name(exams: dict[str, Path]) -> None:
    for exam in EXAMS:
        told = find_exam(exam)
        one = next(iter(read_exam(told, exams[exam], 0).values()))["test"][0]
        assert all(f"{{{{{name}}}}}" in told.task["doc_to_text"] for name in one.texts if name != "answer")
        assert told.task["doc_to_target"] == "answer"
