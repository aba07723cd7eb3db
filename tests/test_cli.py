"""The command line: light help, lists either way, whole outputs, and the workspace behind it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from chinese_llama import cli, commandline, workspace
from chinese_llama.directories import MANIFEST
from chinese_llama.vocab.train import MODEL
from tests import test_errors, tiny
from tests.test_errors import adapter, sentence, tree

COMMANDS = get_command(cli.app).commands  # type: ignore[attr-defined]
Run = test_errors.Run
run = test_errors.run  # a fixture


# --- help


def test_help_imports_no_model_library() -> None:
    code = (
        "import sys; sys.argv = ['chinese-llama', '--help']; from chinese_llama.cli import main\n"
        "try: main()\n"
        "finally: print('LOADED', sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, _, loaded = done.stdout.partition("LOADED")
    assert "extend-vocab" in told
    assert "'typer'" in loaded
    for name in ("torch", "transformers", "peft", "datasets", "sentencepiece", "tokenizers", "matplotlib"):
        assert f"'{name}'" not in loaded


def test_every_command_is_there() -> None:
    wanted = (
        "init adapt quickstart train-vocab extend-vocab audit-vocab extend-model prepare merge convert "
        "eval generate chat rate judge doctor"
    )
    assert set(COMMANDS) == set(wanted.split())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_shows_an_example(name: str, run: Run) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert f"chinese-llama {name}" in " ".join(out.partition("Examples")[2].split())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_examples_are_understood(name: str) -> None:
    """No example names an option that is not there."""
    text = re.sub(r"\[dim\].*?\[/dim\]", "", COMMANDS[name].epilog)
    lines = [line for line in text.splitlines() if line.startswith("chinese-llama ")]
    assert any(shlex.split(line)[1] == name for line in lines)
    for line in lines:
        _, command, *words = shlex.split(line)
        COMMANDS[command].make_context(command, commandline.repeated([command, *words])[1:])


def test_version(run: Run) -> None:
    from chinese_llama import __version__

    assert run("--version") == (0, f"chinese-llama {__version__}\n", "")


# --- lists


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("train-vocab --corpus a b c --output d", "train-vocab --corpus a --corpus b --corpus c --output d"),
        ("eval --corpus a --corpus b", "eval --corpus a --corpus b"),
        (
            "audit-vocab --corpus a a --text n=b m=c",
            "audit-vocab --corpus a --corpus a --text n=b --text m=c",
        ),
        ("x --output a b", "x --output a b"),
        ("init --corpus b a", "init --corpus b a"),
    ],
)
def test_a_list_is_written_either_way(written: str, read: str) -> None:
    assert commandline.repeated(written.split()) == read.split()


def test_both_ways_of_a_list_make_the_same_model(run: Run, work: Path, tmp_path: Path) -> None:
    files = [tiny.write_texts(tmp_path / f"{i}.jsonl", tiny.CHINESE[i::2]) for i in range(2)]
    options = ("--vocab-size", 120, "--output")
    code, out, _ = run("train-vocab", "--corpus", *files, *map(str, options), tmp_path / "a")
    assert code == 0
    assert "120 pieces" in out
    assert run("train-vocab", "--corpus", files[0], "--corpus", files[1], *map(str, options), "b")[0] == 0
    assert (tmp_path / "a" / MODEL).read_bytes() == (tmp_path / "b" / MODEL).read_bytes()
    assert json.loads((tmp_path / "a/chinese_llama.json").read_text())["command"] == "train-vocab"


# --- outputs


@pytest.fixture
def making(work: Path, base: Path, chinese_sp: Path, tokenizer: Path, tmp_path: Path) -> dict[str, list[Any]]:
    """A call of each command that writes a directory, lacking only --output."""
    return {
        "train-vocab": ["train-vocab", "--corpus", work / "zh.jsonl", "--vocab-size", "120"],
        "extend-vocab": ["extend-vocab", "--base", base, "--chinese-sp", chinese_sp],
        "extend-model": ["extend-model", "--base", base, "--tokenizer", tokenizer],
        "merge": ["merge", "--base", base, "--loras", adapter(tmp_path / "fit", 32)],
    }


@pytest.mark.parametrize("command", ["train-vocab", "extend-vocab", "extend-model", "merge"])
def test_outputs_are_whole_or_not_at_all(
    command: str, run: Run, making: dict[str, list[Any]], tmp_path: Path
) -> None:
    """Not below a file, not over what is there; then, with --force, as a whole."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    before = tree(tmp_path)
    for output in ("file/out", "file/a/b"):
        assert "cannot be written" in sentence(run(*making[command], "--output", output))
    assert "is a file" in sentence(run(*making[command], "--output", "file"))
    assert "mine exists; --force replaces it" in sentence(run(*making[command], "--output", "mine"))
    assert "mine is no result of this tool" in sentence(run(*making[command], "--output", "mine", "--force"))
    assert tree(tmp_path) == before
    (tmp_path / "mine" / MANIFEST).write_text('{"kind": "x", "command": "x"}')
    assert run(*making[command], "--output", "mine", "--force")[0] == 0
    assert not (tmp_path / "mine" / "notes").exists()
    manifest = json.loads((tmp_path / "mine" / "chinese_llama.json").read_text(encoding="utf-8"))
    assert manifest["command"] == command
    assert {path.name for path in tmp_path.iterdir()} == {"file", "mine", "fit"}


@pytest.mark.parametrize("command", ["train-vocab", "extend-vocab", "extend-model", "merge"])
def test_a_fault_puts_nothing_but_its_sentence_on_stderr(
    command: str, run: Run, making: dict[str, list[Any]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    err = run(*making[command], "--output", "file/out")[2]
    assert len(err.splitlines()) == 1, err


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    argv = ["train-vocab", "--corpus", "empty.txt", "--output", "out"]
    (tmp_path / "empty.txt").write_text("")
    assert "Traceback" not in run(*argv)[2]
    command = [sys.executable, "-m", "chinese_llama", *argv, "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "BadFile: empty.txt: holds no text" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_leaves_nothing_and_is_told(number: int, tmp_path: Path) -> None:
    han = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    tiny.write_texts(tmp_path / "zh.jsonl", [han[i % 250 :] for i in range(30_000)])
    argv = ["-m", "chinese_llama", "train-vocab", "--corpus", "zh.jsonl", "--output", "out"]

    def listen() -> (
        None
    ):  # tests that run in the background of a shell, or under nohup, inherit what is ignored
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, *argv], cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    ) as process:
        until = time.monotonic() + 20
        while not list(tmp_path.glob(".out.*")) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.03)
        process.send_signal(number)
        err = process.communicate()[1]
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "nothing half-written is left" in err
    assert {path.name for path in tmp_path.iterdir()} == {"zh.jsonl"}


# --- the workspace


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["train-vocab"], "--corpus and --output"),
        (["extend-vocab"], "--base"),
        (["extend-model"], "--base"),
        (["merge"], "--base"),
        (["merge", "--loras", "plus,alpaca"], "--base and --output"),
        (["eval"], "--model"),
        (["generate", "--prompt", "x"], "--model"),
        (["chat"], "--model"),
    ],
)
def test_without_options_both_ways_out_are_named(argv: list[str], missing: str, run: Run) -> None:
    told = sentence(run(*argv))
    assert f"give {missing}" in told
    assert "chinese-llama init DIR" in told


def test_init_makes_a_workspace_that_is_found_from_below(run: Run, tmp_path: Path, work: Path) -> None:
    argv = ["init", "my/space", "--corpus", work / "zh.jsonl", "--base", "models/llama"]
    assert run(*argv)[0] == 0
    file = tmp_path / "my" / "space" / workspace.FILE
    assert f"{Path('my/space') / workspace.FILE} exists; --force replaces it" in sentence(run(*argv))
    below = file.parent / "notes" / "today"
    below.mkdir(parents=True)
    os.chdir(below)
    assert run("train-vocab", "--vocab-size", "120")[0] == 0
    assert (file.parent / "work" / "chinese_sp" / MODEL).is_file()
    assert list(below.iterdir()) == []
    assert run(*argv, "--force")[0] == 0


def test_init_where_nothing_can_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in sentence(run("init", "file/space"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_generate_before_the_merge_says_what_to_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / workspace.FILE).write_text("base: x\n")
    assert "make it with chinese-llama merge" in sentence(run("generate", "--prompt", "x"))
    assert "is not trained yet" in sentence(run("merge"))


def test_a_step_makes_the_ones_before_it_and_takes_what_was_made_on_purpose(
    base: Path, work: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", ".", "--base", str(base), "--corpus", str(work / "zh.jsonl"))[0] == 0
    assert run("train-vocab", "--vocab-size", "150")[0] == 0
    done = run("extend-model")
    assert done[0] == 0, done
    assert "work/tokenizer is missing; making it first" in done[2]
    assert "work/chinese_sp is missing" not in done[2]
    assert run("extend-vocab")[0] == 0


def test_a_wrong_base_is_told_before_anything_is_made(
    base: Path, work: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("init", ".", "--base", str(base), "--corpus", str(work / "zh.jsonl"))
    for command in ("extend-model", "extend-vocab"):
        assert "nope" in sentence(run(command, "--base", "./nope"))
    assert not (tmp_path / "work").exists()


def test_no_command_replaces_what_it_reads(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path, run: Run
) -> None:
    """The base, the corpus: whatever is given as the output too, even with --force."""
    own = shutil.copytree(base, tmp_path / "base")
    (own / MANIFEST).write_text('{"kind": "model", "command": "quickstart"}')
    before = sorted((file.name, file.read_bytes()) for file in own.iterdir())
    for argv in (
        ["extend-vocab", "--base", own, "--chinese-sp", chinese_sp],
        ["extend-vocab", "--base", own / "tokenizer.model", "--chinese-sp", chinese_sp],
        ["extend-model", "--base", own, "--tokenizer", work / "tokenizer"],
    ):
        assert "is or holds an input" in sentence(run(*argv, "--output", own, "--force"))
    assert sorted((file.name, file.read_bytes()) for file in own.iterdir()) == before


def test_vocabulary_commands_do_not_load_torch(
    base: Path, chinese_sp: Path, work: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from chinese_llama import cli\n"
        "try: cli.main()\nexcept SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    made = [
        "--base",
        base,
        "--output",
        tmp_path / "out",
        "--chinese-sp",
        chinese_sp,
        "--corpus",
        work / "zh.jsonl",
    ]
    audit = ["--tokenizer", tmp_path / "out", "--base", base, "--corpus", work / "zh.jsonl"]
    for argv in (["extend-vocab", *made], ["audit-vocab", *audit]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
