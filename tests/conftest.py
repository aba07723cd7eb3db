"""Fixtures shared by all tests: pico artifacts made once, and where the real data lies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import chinese_llama  # noqa: F401 (sets how torch's threads wait, before torch is loaded)
from tests import tiny

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is wrong
signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: two workers then end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with real tokenizers and corpora; skips where it is absent."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("CHINESE_LLAMA_DATA", default))
    if not (folder / "tokenizers").is_dir():
        pytest.skip("no real data: set CHINESE_LLAMA_DATA to the folder that holds tokenizers/")
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with zh.jsonl, en.jsonl, ins.jsonl."""
    folder = tmp_path_factory.mktemp("work")
    tiny.write_texts(folder / "zh.jsonl", tiny.CHINESE)
    tiny.write_texts(folder / "en.jsonl", tiny.ENGLISH)
    records = [
        '{"instruction": "中国的首都是哪里？", "input": "", "output": "北京。"}',
        '{"instruction": "写出反义词。", "input": "大", "output": "小。"}',
    ]
    (folder / "ins.jsonl").write_text("\n".join(records * 8) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def base(work: Path) -> Path:
    """A pico LLaMA with an English tokenizer."""
    return tiny.write_base(work / "base", tiny.base_tokenizer())


@pytest.fixture(scope="session")
def chinese_sp(work: Path) -> Path:
    """A Chinese SentencePiece model."""
    from chinese_llama.vocab.train import MODEL, train_vocab

    train_vocab([work / "zh.jsonl"], work / "chinese_sp", vocab_size=160)
    return work / "chinese_sp" / MODEL


@pytest.fixture(scope="session")
def tokenizer(work: Path, base: Path, chinese_sp: Path) -> Path:
    """The extended tokenizer."""
    from chinese_llama.vocab.merge import extend_vocab

    extend_vocab(base, chinese_sp, work / "tokenizer")
    return work / "tokenizer"


@pytest.fixture(scope="session")
def extended(work: Path, base: Path, tokenizer: Path) -> Path:
    """The extended pico LLaMA."""
    from chinese_llama.model.resize import extend_model

    extend_model(base, tokenizer, work / "extended")
    return work / "extended"
