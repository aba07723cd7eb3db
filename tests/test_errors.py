"""Errors of the user are one sentence and an exit code, seen from inside and from the command line."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from chinese_llama import cli, workspace
from chinese_llama.errors import BadFile, DoesNotFit, Interrupted, OutputExists, UserError, nearest, report

SAYING = re.compile(r"[a-z-]+: making .*")  # what stages announce before they begin
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Calls the command in this process, in an empty directory; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(*argv: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chinese-llama", *map(str, argv)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capfd.readouterr()
        return int(done.value.code or 0), out, err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def sentence(told: tuple[int, str, str]) -> str:
    """The one sentence on stderr of a call that failed because of its input."""
    code, out, err = told
    lines = [line for line in err.splitlines() if not SAYING.fullmatch(line)]
    assert (code, len(lines), out) == (2, 1, ""), err
    assert lines[0].startswith("Error: ")
    assert lines[0].endswith(".")
    return lines[0].removeprefix("Error: ")


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def raising(error: BaseException) -> object:
    def main(argv: Sequence[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize("kind", [UserError, DoesNotFit, OutputExists])
def test_a_user_error_is_one_line_and_code_2(
    kind: type[UserError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(raising(kind("the cause, and what to do.")), []) == 2  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Error: the cause, and what to do.\n"


def test_bad_file_says_where() -> None:
    assert str(BadFile(Path("a.jsonl"), "is bad.", 3)) == "a.jsonl, line 3: is bad."
    assert str(BadFile("a.jsonl", "is bad.")) == "a.jsonl: is bad."
    assert isinstance(BadFile("a", "b"), UserError)


def test_debug_raises_and_is_not_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def main(argv: Sequence[str]) -> None:
        seen.extend(argv)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        report(main, ["--debug", "x"])
    assert seen == ["x"]
    assert capsys.readouterr().err == ""


def test_a_bug_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        report(raising(ZeroDivisionError()), [])  # type: ignore[arg-type]


def test_stopping_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(raising(KeyboardInterrupt()), []) == 130  # type: ignore[arg-type]
    assert "nothing half-written is left" in capsys.readouterr().err
    assert report(raising(Interrupted("Go on with X.")), []) == 130  # type: ignore[arg-type]
    assert capsys.readouterr().err == "Go on with X.\n"
    with pytest.raises(KeyboardInterrupt):
        report(raising(KeyboardInterrupt()), ["--debug"])  # type: ignore[arg-type]


def test_success_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(lambda argv: print(*argv), ["a", "b"]) == 0
    assert capsys.readouterr().out == "a b\n"


def test_nearest_names_what_is_close_and_nothing_else() -> None:
    assert nearest("embedings", ["embeddings", "data"]) == " (did you mean 'embeddings'?)"
    assert nearest("zzz", ["embeddings", "data"]) == ""
    assert nearest("x", []) == ""


# --- from the command line

GOOD = '{"text": "' + "中国的首都是北京。" * 20 + '"}\n'
CORPORA: dict[str, tuple[bytes | None, str]] = {
    "missing.jsonl": (None, r"missing\.jsonl: no such file"),
    "empty.txt": (b"", r"empty\.txt: holds no text"),
    "blank.jsonl": (b"\n \n", r"blank\.jsonl: holds no text"),
    "first.jsonl": (b"{oops\n", r"first\.jsonl, line 1: is not valid JSON"),
    "third.jsonl": ((GOOD * 2 + "{oops\n").encode(), r"third\.jsonl, line 3: is not valid JSON"),
    "field.jsonl": (
        (GOOD + '{"n": 1}\n').encode(),
        r"field\.jsonl, line 2: has no field ('text'|with text) \(found: n\)",
    ),
    "gbk.txt": ("中国\n".encode("gb18030"), r"gbk\.txt, line 1: is not UTF-8"),
    "late.txt": ("中国\n".encode() * 2 + "中国\n".encode("gb18030"), r"late\.txt, line 3: is not UTF-8"),
    "cut.txt.gz": (b"\x1f\x8b\x08\x00", r"cut\.txt\.gz: cannot be unpacked"),
    "notes.doc": (b"x", r"notes\.doc: unknown format"),
    "english.txt": (b"no Chinese here\n", "no Chinese characters"),
}


def corpus(folder: Path, name: str) -> Path:
    content = CORPORA[name][0]
    if content is not None:
        (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("name", CORPORA)
def test_a_bad_corpus_of_train_vocab(name: str, run: Run, tmp_path: Path) -> None:
    file = corpus(tmp_path, name)
    before = tree(tmp_path)
    told = sentence(run("train-vocab", "--corpus", file, "--vocab-size", "20", "--output", "new/out"))
    assert re.search(CORPORA[name][1], told)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", sorted(set(CORPORA) - {"english.txt"}))
def test_a_bad_corpus_of_audit_vocab(name: str, run: Run, tmp_path: Path, tokenizer: Path) -> None:
    file = corpus(tmp_path, name)
    before = tree(tmp_path)
    told = sentence(run("audit-vocab", "--tokenizer", tokenizer, "--corpus", file, "--json", "told.json"))
    assert re.search(CORPORA[name][1], told)
    assert tree(tmp_path) == before


def test_a_bad_text_of_eval(run: Run, tmp_path: Path, base: Path) -> None:
    file = corpus(tmp_path, "third.jsonl")
    assert re.search(CORPORA[file.name][1], sentence(run("eval", "--model", base, "--text", f"zh={file}")))
    assert "--text zh: write NAME=FILE" in sentence(run("eval", "--model", base, "--text", "zh"))


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\x0a\x03\x0a\x01a", b"{}", bytes(range(255, -1, -1))]
)
def test_a_tokenizer_model_that_is_none(run: Run, tmp_path: Path, base: Path, content: bytes) -> None:
    bad = tmp_path / "tokenizer.model"
    bad.write_bytes(content)
    before = tree(tmp_path)
    for given in ((base, bad), (bad, bad), (tmp_path, bad)):
        argv = ("extend-vocab", "--base", given[0], "--chinese-sp", given[1], "--output", "out")
        assert f"{bad}: is not a SentencePiece model" in sentence(run(*argv))
        assert tree(tmp_path) == before


def test_a_model_that_is_none(run: Run, tmp_path: Path, tokenizer: Path) -> None:
    before = tree(tmp_path)
    for argv in (
        ("extend-model", "--base", tmp_path / "none", "--tokenizer", tokenizer, "--output", "out"),
        ("extend-model", "--base", tmp_path, "--tokenizer", tokenizer, "--output", "out"),
        ("extend-vocab", "--base", tmp_path / "none", "--chinese-sp", tmp_path / "x", "--output", "out"),
        ("generate", "--model", tmp_path / "none", "--prompt", "x"),
        ("chat", "--model", tmp_path),
    ):
        assert str(tmp_path) in sentence(run(*argv))
        assert tree(tmp_path) == before


def adapter(folder: Path, width: int) -> Path:
    """A LoRA adapter for a query projection of `width` inputs."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{stem}A.weight": torch.ones(4, width), f"{stem}B.weight": torch.ones(32, 4)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_that_does_not_fit(run: Run, tmp_path: Path, base: Path) -> None:
    adapter(tmp_path / "wide", 48)
    before = tree(tmp_path)
    told = sentence(run("merge", "--base", base, "--loras", "wide", "--output", "out"))
    assert "wide" in told
    assert "q_proj" in told
    assert tree(tmp_path) == before


def test_an_unknown_adapter_names_those_that_exist(run: Run, tmp_path: Path, base: Path) -> None:
    argv = ("merge", "--base", base, "--loras", "plsu", "--output", "out")
    told = sentence(run(*argv))
    assert "there is no chinese-llama.yaml" in told
    assert "chinese-alpaca-pro-7b" in told
    (tmp_path / workspace.FILE).write_text("adapters: {mine: here}\n")
    told = sentence(run(*argv))
    assert "did you mean 'plus'?" in told
    assert f"{tmp_path / workspace.FILE} names plus, alpaca, mine" in told
    assert "registry" in told
    assert not (tmp_path / "out").exists()
