"""Sources and their shares of the tokens."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.mixture import Source, mix, names, sources
from chinese_llama.errors import BadFile, UserError

WEIGHTED = st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 100)), min_size=1, max_size=5)


def test_sources_from_every_form() -> None:
    assert sources("a.txt") == sources(Path("a.txt")) == sources(["a.txt"]) == [Source(Path("a.txt"))]
    assert sources({"path": "a.txt"}) == [Source(Path("a.txt"))]
    given = [{"path": "a.txt", "weight": 2}, {"path": "b.txt", "weight": 0.5}]
    assert sources(given) == [Source(Path("a.txt"), 2), Source(Path("b.txt"), 0.5)]
    whole = {"path": "user/wiki", "weight": 1, "files": "zh/*.parquet", "format": "sharegpt"}
    assert sources(whole) == [Source(Path("user/wiki"), 1, "zh/*.parquet", "sharegpt")]
    assert sources({"path": "a", "weight": None, "files": None, "format": None}) == [Source(Path("a"))]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data: no corpus is given"),
        (None, "data: None is neither a path nor"),
        ([3], r"data: 3 is neither a path nor \{path: FILE, weight: NUMBER, files: GLOB, f"),
        ({"weight": 1}, "is neither a path nor"),
        ({"path": "a", "wieght": 1}, "wieght.*is neither a path nor"),
        (["a", {"path": "b", "weight": 1}], "data: give every source a weight, or none"),
        ({"path": "a.txt", "weight": 0}, r"data: a\.txt: the weight 0 is not a positive number"),
        ({"path": "a.txt", "weight": -1}, "the weight -1 is not a positive number"),
        ({"path": "a.txt", "weight": "2"}, "the weight '2' is not a positive number"),
        ({"path": "a.txt", "weight": True}, "the weight True is not a positive number"),
        ({"path": "a.txt", "weight": float("nan")}, "the weight nan is not a positive number"),
        ({"path": "a.txt", "weight": float("inf")}, "the weight inf is not a positive number"),
        ({"path": "a.txt", "weight": [1]}, r"the weight \[1\] is not a positive number"),
        ({"path": "a", "files": ["x", "y"]}, r"data: a: files \['x', 'y'\] is not text\.$"),
        ({"path": "a", "format": 3}, r"data: a: format 3 is not text\.$"),
    ],
)
def test_data_that_cannot_be_says_what(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sources(data)


def test_without_weights_every_block_is_seen_once() -> None:
    assert mix([Source(Path("a")), Source(Path("b"))], [3, 2], seed=0) == [[0, 1, 2], [0, 1]]


@settings(max_examples=100, deadline=None)
@given(parts=WEIGHTED, seed=st.integers(0, 9))
def test_shares_follow_the_weights(parts: list[tuple[int, float]], seed: int) -> None:
    """To the block; in an epoch as long as all sources together; no source is left out."""
    lengths = [length for length, _ in parts]
    found = [Source(Path(str(number)), weight) for number, (_, weight) in enumerate(parts)]
    whole = sum(weight for _, weight in parts)
    chosen = mix(found, lengths, seed)
    assert chosen == mix(found, lengths, seed)
    for (length, weight), indices in zip(parts, chosen, strict=True):
        share = sum(lengths) * weight / whole
        assert abs(len(indices) - max(1, share)) <= 0.5 + 1e-6
        times = Counter(dict.fromkeys(range(length), 0))
        times.update(indices)
        assert set(times) == set(range(length))
        assert max(times.values()) - min(times.values()) <= 1, "repeated evenly"


def test_a_choice_of_blocks_is_random_and_follows_the_seed() -> None:
    found = [Source(Path("a"), 1.0), Source(Path("b"), 99.0)]
    first, second = (mix(found, [1000, 1000], seed)[0] for seed in (0, 1))
    assert len(first) == len(second) == 20
    assert first != second
    assert first != sorted(first)


def test_names_are_those_of_files_and_directories_and_none_comes_twice() -> None:
    paths = ["a/zh.jsonl.gz", "b/zh.txt", "en", "user/wiki.zh", ".", "zh-2"]
    assert names([Source(Path(path)) for path in paths]) == ["zh", "zh-2", "en", "wiki", "data", "zh-2-2"]


def test_sources_are_plain() -> None:
    one = Source(Path("a"), 1.0, "*.jsonl", "belle")
    assert {one: 1}[pickle.loads(pickle.dumps(one))] == 1


def test_a_glob_chooses_files_of_a_directory(tmp_path: Path) -> None:
    for name in ("zh/a.jsonl", "zh/b.jsonl", "zh/sub/c.jsonl", "en/a.jsonl", "zh/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')

    def found(files: str | None) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in Source(tmp_path, files=files).list_files()]

    assert found("zh/*.jsonl") == ["zh/a.jsonl", "zh/b.jsonl"]
    assert found("zh/**/*.jsonl") == ["zh/a.jsonl", "zh/b.jsonl", "zh/sub/c.jsonl"]
    assert found("zh/*") == ["zh/a.jsonl", "zh/b.jsonl"]
    assert found(None) == ["en/a.jsonl", "zh/a.jsonl", "zh/b.jsonl", "zh/sub/c.jsonl"]
    with pytest.raises(BadFile, match=r"has no file that matches 'fr/\*' and ends in \.txt, "):
        found("fr/*")
    for pattern in ("/zh/*", ""):
        with pytest.raises(BadFile, match=rf"files: '{re.escape(pattern)}' is no pattern"):
            found(pattern)
    with pytest.raises(
        BadFile, match=r"a\.jsonl: is a file; files \('\*'\) chooses among those of a directory"
    ):
        Source(tmp_path / "en" / "a.jsonl", files="*").list_files()


def test_weights_are_shares_of_the_tokens_however_full_the_blocks_are() -> None:
    """One source fills its blocks, of the other's only a quarter is there."""
    found = [Source(Path("full"), 1.0), Source(Path("sparse"), 1.0)]
    full, sparse = mix(found, [100, 100], 0, tokens=[100 * 64, 100 * 16])
    assert len(full) * 64 == pytest.approx(len(sparse) * 16, rel=0.02)
    assert len(full) * 64 + len(sparse) * 16 == pytest.approx(100 * 64 + 100 * 16, rel=0.02)
