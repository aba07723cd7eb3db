"""`generate`, `chat`, `rate` and `judge` as typed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chinese_llama import workspace
from chinese_llama.evaluate.answers import ANSWERS, JUDGEMENTS, VOTES
from chinese_llama.evaluate.rating import Votes
from chinese_llama.merging.plan import Step, load
from chinese_llama.merging.stream import Options, merge
from tests import test_errors
from tests.evaluate.serving import close, drip, hang, says, serving, status
from tests.model.test_adapters import peft_adapter
from tests.test_errors import Run, sentence

run = test_errors.run  # a fixture
SHORT = ["--max-new-tokens", "6"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "The fox", "keyword": "x"}\n{"instruction": "中国", "output": ""}\n', encoding="utf-8"
    )
    return file


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """A directory of answers, as from elsewhere."""
    (tmp_path / "out").mkdir()
    records = [{"number": n, "prompt": "问", "answers": {"A": f"{n}", "B": "x"}} for n in (1, 2, 3)]
    text = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "out" / ANSWERS).write_text(text + "\n", encoding="utf-8")
    return tmp_path / "out"


# --- generate


def test_one_prompt_is_answered_on_the_terminal(run: Run, base: Path) -> None:
    from chinese_llama.evaluate.generate import answer
    from chinese_llama.model.load import load_model, load_tokenizer

    wanted = answer(load_model(base), load_tokenizer(base), "The fox", 6)
    assert run("generate", "--prompt", "The fox", "--model", base, *SHORT)[:2] == (0, wanted + "\n")


def test_a_file_is_answered_by_two_models_and_stands(
    run: Run, base: Path, prompts: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "two")
    argv = ["generate", "--prompts", prompts, "--model", base, "--against", "two", "--output", "out", *SHORT]
    code, out, err = run(*argv)
    assert (code, err) == (0, ""), err
    assert f"A ({base}): the keyword is in " in out and " of 1 answers" in out
    assert out.endswith("out: 2 prompts; to read: out/answers.html; to vote: chinese-llama rate out\n")
    names = {"answers.html", "answers.jsonl", "chinese_llama.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    before = test_errors.tree(tmp_path)
    assert run(*argv)[:2] == (0, out) and test_errors.tree(tmp_path) == before
    assert "with max_new_tokens 6, and 7 is asked for" in sentence(run(*argv[:-1], "7"))
    assert run(*argv[:-1], "7", "--force")[0] == 0
    assert run("rate", "out", "--tally")[:2] == (0, "0 of 2 prompts voted on.\n")


def test_adapters_answer_unmerged_as_merged(run: Run, extended: Path, prompts: Path, tmp_path: Path) -> None:
    peft_adapter(extended, tmp_path / "a")
    merge(extended, [Step([load("a", tmp_path / "a")])], tmp_path / "merged", Options(verify=False))
    loras = ["generate", "--base", extended, "--loras", "mine=a", *SHORT]
    asked = ["--prompt", "The fox"]
    wanted = run("generate", "--model", "merged", *asked, *SHORT)
    assert wanted[0] == 0 and run(*loras, *asked) == wanted
    code, out, err = run(*loras, "--prompts", prompts, "--against", "merged", "--output", "out")
    assert code == 0 and f"A ({extended} + mine): the keyword is in " in out, err
    said = [json.loads(line)["answers"] for line in (tmp_path / "out" / ANSWERS).open(encoding="utf-8")]
    assert len(said) == 2 and all(answer["A"] == answer["B"] for answer in said)
    space = {"extend_model": {"output": str(extended)}}
    (tmp_path / workspace.FILE).write_text(json.dumps({"base": "x", **space}))
    assert run("generate", "--loras", "mine=a", *asked, *SHORT) == wanted


def test_a_workspace_gives_the_merged_model(run: Run, base: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / workspace.FILE).write_text("base: x\n")
    told = sentence(run("generate", "--prompts", prompts, "--output", "out"))
    assert "work/merged does not exist yet; make it with chinese-llama merge" in told
    shutil.copytree(base, tmp_path / "work" / "merged")
    code, out, _ = run("generate", "--prompts", prompts, "--output", "out", *SHORT)
    assert code == 0 and "to vote" not in out
    assert "of one model, of which none is better" in sentence(run("rate", "out"))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "give --prompt TEXT, or --prompts FILE with --output DIR."),
        (["--prompt", "x", "--prompts", "p.jsonl"], "give --prompt TEXT, or --prompts"),
        (["--prompts", "p.jsonl"], "--prompts, --output and --against go together"),
        (["--prompt", "x", "--output", "out"], "--prompts, --output and --against go together"),
        (["--prompt", "x", "--against", "two"], "--prompts, --output and --against go together"),
        (["--prompt", "x", "--base", "."], "--base is what the adapters of --loras are put on"),
        (
            ["--prompt", "x", "--loras", "a"],
            "give --model, or --loras with what they are put on (--base), not both",
        ),
        (["--prompts", "no.txt", "--output", "out"], "no.txt: no such file."),
        (["--prompts", "empty.txt", "--output", "out"], "empty.txt: holds no prompts."),
        (["--prompts", "text.jsonl", "--output", "out"], "text.jsonl, line 1: has no field 'prompt'"),
        (["--prompts", "long.txt", "--output", "out"], "long.txt, line 2: the prompt is too long: "),
        (["--prompt", "fox " * 200], "The prompt is too long"),
        (["--prompts", "p.jsonl", "--output", "p.jsonl"], "is a file; give a directory"),
        (["--prompts", "p.jsonl", "--output", "p.jsonl/x"], "cannot be written"),
        (["--prompts", "p.jsonl", "--output", "out", "--against", "bare"], "bare: has no tokenizer"),
        (["--prompts", "p.jsonl", "--output", "."], "is the directory that you are in"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    argv: list[str], told: str, run: Run, base: Path, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "long.txt").write_text("x\n" + "fox " * 200)
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    before = test_errors.tree(tmp_path)
    assert told in sentence(run("generate", "--model", base, *argv))
    assert test_errors.tree(tmp_path) == before


def test_an_empty_list_of_adapters_is_not_the_merged_model(run: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / workspace.FILE).write_text("base: x\n")
    shutil.copytree(base, tmp_path / "work" / "merged")
    told = sentence(run("generate", "--prompt", "x", "--base", base, "--loras", ""))
    assert told.startswith("--loras '': an item is empty; write names or directories with commas")


# --- rate


@pytest.mark.parametrize("place", ["no/f.json", "."])
def test_figures_that_cannot_be_written_are_told_before_the_work(
    place: str, run: Run, answers: Path, key: str
) -> None:
    wanted = f"--json {place} cannot be written; give a file in a directory that exists."
    with serving(says('{"better": 1}')) as server:
        assert wanted in sentence(judged(run, server.url, key, "--json", place))
        assert server.asked == []
    with socket.create_server(("127.0.0.1", 0)) as taken:  # or it would wait for votes
        port = taken.getsockname()[1]
        assert wanted in sentence(run("rate", "out", "--port", port, "--json", place))


def test_the_tally_names_the_models(run: Run, answers: Path) -> None:
    votes = Votes(answers)
    for number, choice in ((1, "tie"), (2, "bad"), (3, "first")):
        votes.add(number, choice)
    code, out, _ = run("rate", "out", "--tally")
    assert code == 0 and out.startswith(
        "3 of 3 prompts voted on; both bad, which counts as a tie: 1.\nA (A) better: "
    )
    assert "ties half: " in out and "(95 %: " in out


def test_what_cannot_be_rated_is_one_sentence(run: Run, answers: Path) -> None:
    assert "no/answers.jsonl: no such file; chinese-llama generate" in sentence(run("rate", "no"))
    (answers / VOTES).write_text("x\n")
    assert "votes.jsonl, line 1: is no record of this tool; remove the line." in sentence(run("rate", "out"))


# --- judge


def judged(run: Run, url: str, *options: str) -> tuple[int, str, str]:
    return run("judge", "out", "--url", url, "--judge", "j", "--retries", "0", "--timeout", "0.5", *options)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return "--key-env=JUDGE_KEY"


def test_answers_are_judged(run: Run, answers: Path, key: str) -> None:
    with serving(says('{"better": "tie"}')) as server:
        code, out, err = judged(run, server.url, key)
        assert {head["Authorization"] for head in server.heads} == {"Bearer sk-secret"}
        assert len(server.asked) == 6
        assert (code, err) == (0, "")
        assert out.startswith("3 of 3 prompts judged by j.\nA (A) better: 0, B (B) better: 0, ties: 3.\n")
        again = judged(run, server.url, key, "--json", "figures.json")
        assert again == (0, out, "6 of 6 judgements are there.\n") and len(server.asked) == 6
    figures = json.loads((answers.parent / "figures.json").read_text())
    assert (figures["judge"], figures["ties"], len(figures["interval"])) == ("j", 3, 2)
    assert len((answers / JUDGEMENTS).read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (hang, "gives no whole answer within 0.5 s"),
        (drip("body"), "gives no whole answer within 0.5 s"),
        (close, "breaks the connection off"),
        (status(401), "answers 401: the key is not accepted."),
        (status(404), "answers 404: the URL or the model is wrong."),
        (status(500), "answers 500; the same command goes on later."),
        (status(302, Location="http://elsewhere"), "answers 302, a redirect to http://elsewhere, which"),
        (status(200, "<html>"), "answers with a web page, not JSON"),
        (status(200, "{}"), "JSON that has no choices"),
        (says("nothing"), "gives no verdict that can be read (last: 'nothing')."),
    ],
)
def test_a_bad_endpoint_is_one_sentence(fault: object, told: str, run: Run, answers: Path, key: str) -> None:
    with serving(fault) as server:  # type: ignore[arg-type]
        found = sentence(judged(run, server.url, key))
    assert told in found and "sk-secret" not in found
    assert [path.name for path in answers.iterdir()] == [ANSWERS]


def test_nothing_is_asked_without_a_key_or_a_url(run: Run, answers: Path, key: str) -> None:
    assert "begins with http:// or https://" in sentence(judged(run, "localhost:1/v1", key))
    told = sentence(judged(run, "http://127.0.0.1:1/v1"))
    assert "the environment variable OPENAI_API_KEY (--key-env) holds no key; set it" in told
    code, _, err = run("judge", "out", "--judge", "j")
    assert code == 2 and "--url" in err, "no endpoint is the default"


def test_judging_loads_no_model_library(answers: Path, key: str) -> None:
    code = (
        "import sys; from chinese_llama import cli_answers\n"
        "cli_answers.app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    with serving(says('{"better": 1}')) as server:
        argv = ["judge", str(answers), "--url", server.url, "--judge", "j", key]
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
