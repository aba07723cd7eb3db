"""What the tests of prepared data share: a tokenizer, and a job with several parts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.data import prepare, reading
from chinese_llama.data.mixture import Source
from chinese_llama.data.prepare import Job
from chinese_llama.model.load import load_tokenizer
from tests import tiny
from tests.data.published import MARKERS


@pytest.fixture(scope="session")
def fast(tokenizer: Path) -> Any:
    from chinese_llama.model.load import load_tokenizer

    return load_tokenizer(tokenizer)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of some hundred tokens, so that there are several."""
    monkeypatch.setattr(prepare, "PART", 1500)
    monkeypatch.setattr(reading, "BATCH", 400)


def texts(number: int, seed: int = 0) -> list[str]:
    """Different documents of 1 to 60 words."""
    chosen = random.Random(seed)
    words = [word for text in tiny.ENGLISH[:5] for word in text.split()] + tiny.CHINESE[:5]
    return [f"{n} " + " ".join(chosen.choices(words, k=chosen.randint(1, 60))) for n in range(number)]


def job_in(folder: Path, tokenizer: Path, **settings: Any) -> Job:
    """Two sources, one of them a directory of two files."""
    (folder / "zh").mkdir()
    tiny.write_texts(folder / "zh" / "a.jsonl", texts(60))
    tiny.write_texts(folder / "zh" / "b.jsonl", texts(60, 1))
    tiny.write_texts(folder / "en.jsonl", texts(40, 2))
    found = (Source(folder / "zh"), Source(folder / "en.jsonl"))
    return Job("pretraining", found, tokenizer, 64, **settings)


@pytest.fixture
def job(tmp_path: Path, tokenizer: Path) -> Job:
    return job_in(tmp_path, tokenizer)


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The extended SentencePiece tokenizer, and a byte-level one with the markers of ChatML and Llama-3."""
    backend = tiny.byte_level()
    backend.add_special_tokens(MARKERS)
    byte_level = tiny.write_byte_level(tmp_path_factory.mktemp("byte_level"), backend)
    return {"sentencepiece": load_tokenizer(tokenizer), "byte-level": load_tokenizer(byte_level)}
