"""Multiple choice against plain torch, one question at a time, with the prompts written out by hand."""

from __future__ import annotations

import csv
import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from chinese_llama.data.templates import text_ids
from chinese_llama.errors import BadFile, UserError
from chinese_llama.evaluate import harness
from chinese_llama.evaluate.bits import evaluate_text
from chinese_llama.evaluate.choices import average, categories, check_choices, multiple_choice, wikitext
from chinese_llama.evaluate.exams import find_exam, read_exam
from chinese_llama.evaluate.harness import Loaded, choice_ids, likelihoods
from chinese_llama.model.load import load_model, load_tokenizer
from chinese_llama.vocab.fast import write_tokenizer
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
        model, backend="causal", tokenizer=reader, batch_size=3, add_bos_token=False, max_length=limit - 1
    )
    long = [" ".join(tiny.ENGLISH[:9]), tiny.CHINESE[0], "".join(tiny.CHINESE[:7])]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in long]
    loaded = Loaded(model, reader)
    loaded.limit = limit
    assert loaded.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), rel=1e-4
    )


@pytest.mark.parametrize("place", ["base", "extended"])
@pytest.mark.parametrize("text", ["题目\nA. 一\n答案：", "a </s> b\n答案是：", "<s>答案：", "答案： "])
def test_a_choice_is_one_token_after_the_tokens_of_its_prompt(
    place: str, text: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(place))
    pairs = choice_ids(tokenizer, text, "ABCD")
    assert len({tuple(context) for context, _ in pairs}) == 1
    for choice, (context, wanted) in zip("ABCD", pairs, strict=True):
        assert wanted == [letter_id(tokenizer, choice)]
        assert context + wanted == [tokenizer.bos_token_id, *text_ids(tokenizer, text + choice)]
        assert context.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in context, "what looks like eos in a question is text"


def test_choices_that_a_tokenizer_joins_are_compared_after_the_same(tmp_path: Path) -> None:
    proto = tiny.base_tokenizer()
    for piece in ("：", "A", "B", "C", "D", "：A", "：B"):
        proto.pieces.add(piece=piece, score=0.0, type=1)
    write_tokenizer(tmp_path, proto, None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenize("x：A") == ["▁", "x", "：A"]
    pairs = choice_ids(tokenizer, "x：", "ABCD")
    assert {tuple(tokenizer.convert_ids_to_tokens(context)) for context, _ in pairs} == {("<s>", "▁", "x")}
    said = [tokenizer.convert_ids_to_tokens(wanted) for _, wanted in pairs]
    assert said == [["：A"], ["：B"], ["：", "C"], ["：", "D"]]


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
    torch.nn.init.normal_(live.base_model.model.lm_head.lora_B["default"].weight, std=5.0)
    assert multiple_choice(live, reader, "ceval", exams["ceval"], 0)["subjects"] != before["subjects"]


def test_a_prompt_that_is_too_long_is_refused(exams: dict[str, Path], extended: Path, reader: Any) -> None:
    short = load_model(extended, "float32")
    lengths = {
        subject: max(len(text_ids(reader, text)) + 1 for text in prompts("ceval", exams["ceval"], subject, 3))
        for subject in SUBJECTS["ceval"]
    }
    worst = max(lengths, key=lambda subject: lengths[subject])
    short.config.max_position_embeddings = lengths[worst]
    multiple_choice(short, reader, "ceval", exams["ceval"], 3)
    short.config.max_position_embeddings = lengths[worst] - 1
    with pytest.raises(UserError) as error:
        multiple_choice(short, reader, "ceval", exams["ceval"], 3)
    assert str(error.value) == (
        f"{worst}: a prompt is {lengths[worst]} tokens long, the model reads {lengths[worst] - 1}; give fewer "
        f"examples (shots), or a directory without what is too long for it ({worst})."
    )


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
        check_choices("ceval", exams["ceval"], 0)
    with pytest.raises(UserError, match=told):
        multiple_choice(None, None, "ceval", exams["ceval"], 0)
    with pytest.raises(UserError, match=told):
        wikitext(None, None, work / "en.jsonl")


def test_bad_input_is_told_before_a_model_is_loaded(exams: dict[str, Path]) -> None:
    check_choices("ceval", exams["ceval"], 5)
    with pytest.raises(BadFile, match="holds 5 examples, 6 are asked for"):
        check_choices("ceval", exams["ceval"], 6)
    with pytest.raises(UserError, match="exam 'mmlu' is unknown"):
        check_choices("mmlu", exams["ceval"], 0)


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


PROGRAM = """
import socket, sys
from pathlib import Path
def refused(*_, **__):
    raise AssertionError("the network is asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
from chinese_llama.evaluate.choices import multiple_choice, wikitext
from chinese_llama.model.load import load_model, load_tokenizer
model, tokenizer = load_model(sys.argv[1], "float32"), load_tokenizer(sys.argv[1])
model.config.max_position_embeddings = 2048
print(multiple_choice(model, tokenizer, "cmmlu", sys.argv[2], 1)["questions"])
print(wikitext(model, tokenizer, Path(sys.argv[3]))["documents"])
"""


def test_a_local_directory_needs_no_network_and_leaves_no_file(
    exams: dict[str, Path], extended: Path, work: Path, tmp_path: Path
) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    environment = {**os.environ, "HF_HOME": str(home), "HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", PROGRAM, str(extended), str(exams["cmmlu"]), str(work / "zh.jsonl")]
    done = subprocess.run(command, cwd=here, env=environment, text=True, capture_output=True)
    assert done.stdout.split() == [str(sum(SUBJECTS["cmmlu"].values())), str(len(tiny.CHINESE))], done.stderr
    assert not list(here.iterdir())
    assert not [file for file in home.rglob("*") if file.is_file()], "no copies in a cache either"


def test_wikitext_is_the_sum_of_log_probabilities(model: Any, reader: Any, tmp_path: Path) -> None:
    texts = [tiny.ENGLISH[0], "one  two\nthree", tiny.CHINESE[0]]
    tiny.write_texts(tmp_path / "text.jsonl", texts)
    nats = 0.0
    for text in texts:
        nats -= log_probability(model, [reader.bos_token_id], text_ids(reader, text))
    told = wikitext(model, reader, tmp_path / "text.jsonl")
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    assert (told["words"], told["bytes"], told["documents"]) == (words, size, 3)
    assert told["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert told["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-4)
    assert math.log(told["word_perplexity"]) == pytest.approx(nats / words, rel=1e-4)
    assert told["bits_per_byte"] == pytest.approx(
        evaluate_text(model, reader, texts)["bits_per_byte"], rel=1e-5
    )


def test_wikitext_of_documents_longer_than_a_window(extended: Path, reader: Any, tmp_path: Path) -> None:
    """Windows written out: 127 tokens each after the one before them, the last as long as the others."""
    model = load_model(extended, "float32")
    text = "".join(tiny.CHINESE[:60])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids, room = text_ids(reader, text), 127
    assert len(ids) > 2 * room and len(ids) % room
    whole = [reader.bos_token_id, *ids]
    nats = -log_probability(model, whole[:1], whole[1 : room + 1])
    for start in range(room, len(ids), room):
        end = min(start + room, len(ids))
        nats -= log_probability(model, whole[end - room : start + 1], whole[start + 1 : end + 1])
    told = wikitext(model, reader, tmp_path / "text.txt")
    assert told["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert told["words"] == 1 and nats > 709, "a number that exp cannot hold"
    assert math.isfinite(told["word_perplexity"])


def test_wikitext_of_no_text_is_one_sentence(model: Any, reader: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BadFile, match=r"empty.txt: holds no text\.$"):
        wikitext(model, reader, tmp_path / "empty.txt")


def test_the_questions_have_what_the_task_files_name(exams: dict[str, Path]) -> None:
    for exam in EXAMS:
        told = find_exam(exam)
        one = next(iter(read_exam(told, exams[exam], 0).values()))["test"][0]
        assert all(f"{{{{{name}}}}}" in told.task["doc_to_text"] for name in one if name != "answer")
        assert told.task["doc_to_target"] == "answer"
