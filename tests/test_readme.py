"""Every command of the READMEs runs, on a pico base in the place of the user's."""

from __future__ import annotations

import gzip
import io
import re
import shlex
from pathlib import Path

import pytest

from chinese_llama import cli
from chinese_llama.adapt.launch import recipe
from tests import tiny
from tests.evaluate.exam_files import write_exam

ROOT = Path(__file__).parents[1]
READMES = ["README.md", "README_zh.md"]
OVERRIDES = {  # a pico base and seconds instead of days
    "block_size: 512": "block_size: 64",
    "max_seq_length: 512": "max_seq_length: 256",
    "# size: 49920": "size: 600",
    "num_train_epochs: 1": "max_steps: 3",
    "num_train_epochs: 2": "max_steps: 3",
}


def commands(readme: str) -> list[str]:
    """The command lines in ```console blocks, in order."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.strip().splitlines()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/llama-7b, data/*.gz as the README names them; the current directory."""
    monkeypatch.chdir(tmp_path)
    for folder in ("models", "data"):
        (tmp_path / folder).mkdir()
    tiny.write_base(tmp_path / "models/llama-7b", tiny.base_tokenizer(), max_position_embeddings=256)
    for name, texts in (
        ("zh", tiny.CHINESE),
        ("en", tiny.ENGLISH),
        ("zh_heldout", tiny.CHINESE[:3]),
        ("en_heldout", tiny.ENGLISH[:3]),
    ):
        tiny.write_texts(tmp_path / "data" / f"{name}.jsonl", texts)
    for name in ("zh", "en"):
        with gzip.open(tmp_path / f"data/{name}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.write((tmp_path / f"data/{name}.jsonl").read_text(encoding="utf-8"))
    (tmp_path / "data/questions.txt").write_text("你好吗？\n长江在哪里？\n", encoding="utf-8")
    for exam, subject in (("ceval", "high_school_physics"), ("cmmlu", "chinese_history")):
        write_exam(tmp_path / "data" / exam, exam, {subject: 3})
    records = '[{"instruction": "你好吗？", "input": "", "output": "我很好。"}]'
    (tmp_path / "data/alpaca_zh.json").write_text(records, encoding="utf-8")
    return tmp_path


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command line, in this process; raises SystemExit with another code than 0 if it fails."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["accelerate", "launch"]:
        script = next(word for word in words if word.endswith(".py"))
        assert Path(script).is_file(), "init puts the recipes into the workspace"
        recipe(Path(script).stem).main(words[words.index(script) + 1 :])
        return
    assert words[0] == "chinese-llama", line
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as done:
        cli.main()
    gate = "--max-regression" in words  # three steps may do more harm than it allows
    assert done.value.code in ((0, 1) if gate else (0,)), line


def test_the_way_from_a_base_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one README: `test_both_languages_give_the_same_commands`."""
    lines = commands(READMES[0])
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("chinese-llama init")) :]
    assert len(lines) >= 9
    for line in lines:
        run(line, monkeypatch)
        if line.startswith("chinese-llama init"):
            file = place / "chinese-llama.yaml"
            text = file.read_text(encoding="utf-8")
            for old, new in OVERRIDES.items():
                assert old in text
                text = text.replace(old, new)
            file.write_text(text, encoding="utf-8")
    assert (Path("work") / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("readme", READMES)
def test_the_other_commands_are_those_of_the_makefile_and_the_quickstart(readme: str) -> None:
    lines = commands(readme)
    first = lines[: next(i for i, line in enumerate(lines) if line.startswith("chinese-llama init"))]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in first:
        if line.startswith("make "):
            assert f"\n{line.removeprefix('make ')}:" in makefile
    # Run as they are typed by tests/test_quickstart.py.
    three = [
        "chinese-llama extend-vocab",
        "accelerate launch recipes/pt_lora.py",
        "chinese-llama merge --loras plus,alpaca",
    ]
    rest = [line for line in first if not line.startswith("make ")]
    assert rest == three


def test_both_languages_give_the_same_commands() -> None:
    assert commands("README.md") == commands("README_zh.md")
