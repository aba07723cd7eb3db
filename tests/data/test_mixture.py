"""Sources and their shares of the tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.mixture import Source, dataset, mix, sources
from chinese_llama.errors import BadFile, UserError

WEIGHTED = st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 100)), min_size=1, max_size=5)


def test_sources_from_every_form() -> None:
    assert sources("a.txt") == sources(Path("a.txt")) == sources(["a.txt"]) == [Source(Path("a.txt"))]
    assert sources({"path": "a.txt"}) == [Source(Path("a.txt"))]
    given = [{"path": "a.txt", "weight": 2}, {"path": "b.txt", "weight": 0.5}]
    assert sources(given) == [Source(Path("a.txt"), 2), Source(Path("b.txt"), 0.5)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data: no corpus is given"),
        (None, "data: None is neither a path nor"),
        ([3], r"data: 3 is neither a path nor \{path: FILE, weight: NUMBER\}"),
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


def block(value: int) -> dict[str, list[int]]:
    return {"input_ids": [value] * 4, "labels": [value] * 4, "position_ids": [0, 1, 2, 3]}


class Blocks:
    """As many blocks of the number in a source's name as that number says."""

    def __call__(self, path: Path) -> Iterator[dict[str, list[int]]]:
        for _ in range(int(path.name)):
            yield block(int(path.name))


def test_a_data_set_of_two_sources(tmp_path: Path) -> None:
    made = dataset([Source(Path("2")), Source(Path("3"))], Blocks(), tmp_path, seed=0)
    assert made[:]["input_ids"][:, 0].tolist() == [2, 2, 3, 3, 3]
    assert {name: tuple(values.shape) for name, values in made[:].items()} == dict.fromkeys(block(0), (5, 4))
    assert any(tmp_path.iterdir()), "kept on disk"


def test_a_weighted_data_set(tmp_path: Path) -> None:
    made = dataset([Source(Path("2"), 3.0), Source(Path("6"), 1.0)], Blocks(), tmp_path, seed=0)
    assert Counter(made[:]["input_ids"][:, 0].tolist()) == {2: 6, 6: 2}


def test_a_source_without_a_block_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0: nothing to train on: no sample fits into the block"):
        dataset([Source(Path("2")), Source(Path("0"))], Blocks(), tmp_path, seed=0)


def broken(path: Path) -> Iterator[dict[str, list[int]]]:
    yield block(1)
    raise BadFile(path, "is not valid JSON.", 2)


def test_an_error_in_a_source_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"zh\.jsonl, line 2: is not valid JSON"):
        dataset([Source(Path("zh.jsonl"))], broken, tmp_path, seed=0)
