"""The Chinese pieces that come along: what they hold, and that their recipe runs."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from chinese_llama.resources import shipped
from chinese_llama.vocab import merge
from chinese_llama.vocab.audit import audit_vocab
from chinese_llama.vocab.bases import open_base
from chinese_llama.vocab.proto import NORMAL, read_chinese
from chinese_llama.vocab.readers import open_readers
from chinese_llama.vocab.scripts import is_chinese
from chinese_llama.vocab.select import select
from tests import tiny

FILES = {"chinese_20k": 49_920, "chinese_8k": 39_936}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vocab_build", shipped("vocab") / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_the_list_says_what_the_model_holds(name: str) -> None:
    model = read_chinese(shipped("vocab") / f"{name}.model")
    pieces = [piece for piece in model.pieces if piece.type == NORMAL]
    lines = (shipped("vocab") / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.split("\t") for line in lines]
    assert [piece for piece, _ in listed] == [piece.piece for piece in pieces]
    uses = [int(count) for _, count in listed]
    assert uses == sorted(uses, reverse=True)
    assert [p.score for p in pieces] == sorted((p.score for p in pieces), reverse=True)
    assert all(is_chinese(piece.piece) for piece in pieces)


@pytest.mark.parametrize(("name", "size"), FILES.items())
def test_llama_grows_to_a_multiple_of_128_and_nothing_needs_repair(name: str, size: int, data: Path) -> None:
    base = open_base(data / "tokenizers" / "llama")
    selection = select(base, read_chinese(shipped("vocab") / f"{name}.model"))
    assert base.size + len(selection.pieces) == size
    assert size % 128 == 0
    assert not selection.repaired
    assert not selection.dropped


def test_it_is_what_extend_vocab_takes_where_nothing_else_is_given(base: Path, tmp_path: Path) -> None:
    told = merge.extend_vocab(base, None, tmp_path / "out", size=1500)
    assert told["chinese_sp"] == str(shipped("vocab") / "chinese_20k.model")
    assert told["checks"]["broken"] == []
    assert len(open_readers(tmp_path / "out")[0].pieces) == 1500


def test_the_recipe_rebuilds_to_the_byte(
    build: ModuleType, base: Path, chinese_sp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe itself, on text of a few lines; `vocab/build.py --data` does it on the real text."""
    folder = tmp_path / "data"
    (folder / "tokenizers" / "llama").mkdir(parents=True)
    shutil.copy(base / "tokenizer.model", folder / "tokenizers" / "llama")
    shutil.copy(chinese_sp, folder / "tokenizers" / "chinese_sp.model")
    for name in build.CORPUS:
        with gzip.open(folder / name, "wt", encoding="utf-8") as stream:
            stream.writelines(
                json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in tiny.CHINESE[:10]
            )
    monkeypatch.setattr(build, "SIZES", {"small": 420 + 60})
    first, second = build.build(folder), build.build(folder)
    assert first == second
    assert set(first) == {"small.model", "small.txt"}
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "small.model").write_bytes(first["small.model"])
    (tmp_path / "small.txt").write_bytes(b"")
    with pytest.raises(SystemExit) as done:
        build.main(["--data", str(folder)])
    assert done.value.code == 1
    with pytest.raises(SystemExit) as done:
        build.main(["--data", str(folder), "--write"])
    assert done.value.code == 0
    selection = select(open_base(base), read_chinese(tmp_path / "small.model"))
    assert 0 < len(selection.pieces) <= 60


def test_the_contract_holds_on_real_text(data: Path, tmp_path: Path) -> None:
    """On every eighth record of each file: 7 MB."""
    llama = data / "tokenizers" / "llama"
    merge.extend_vocab(llama, None, tmp_path / "out")
    files = []
    for file in sorted(data.glob("*.jsonl.gz")):
        files.append(tmp_path / file.stem)
        with gzip.open(file, "rb") as lines:
            files[-1].write_bytes(b"".join(islice(lines, 0, None, 8)))
    assert len(files) >= 5
    told = audit_vocab(tmp_path / "out", files, llama)
    assert not told["dead"]
    for found in told["files"].values():
        assert found["documents"] > 30
        assert (found["disagreements"], found["changed"], found["longer"]) == (0, 0, 0)
