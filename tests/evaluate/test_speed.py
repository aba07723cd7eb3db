"""Decoding speed: every token is decoded once, with the cache, after what stands before it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from chinese_llama.errors import UserError
from chinese_llama.evaluate import speed
from chinese_llama.evaluate.speed import decoding_speeds, sample
from chinese_llama.model.load import load_model, load_tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def model(extended: Path) -> Any:
    return load_model(extended, "float32")


@pytest.fixture(scope="module")
def reader(extended: Path) -> Any:
    return load_tokenizer(extended)


class Watched:
    """A model that writes down what it is given, and takes `cost` seconds of a clock for each token; now and then the
    machine is busy, or the process stands still."""

    def __init__(
        self, model: Any, monkeypatch: pytest.MonkeyPatch, seen: list[Any], cost: float = 1.0
    ) -> None:
        self.model, self.device, self.dtype, self.config = model, model.device, model.dtype, model.config
        self.seen, self.cost = seen, cost
        self.clock = [0.0]
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.clock[0])

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        assert input_ids.shape == (1, 1) and use_cache
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        self.seen.append((self.cost, int(input_ids), before))
        self.clock[0] += self.cost if len(self.seen) % 7 else 50.0
        return self.model(input_ids=input_ids, past_key_values=past_key_values, use_cache=True)


def test_each_token_is_decoded_after_those_before_it(
    model: Any, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sample(tiny.CHINESE)
    ids = reader(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(model.config, "max_position_embeddings", 40)
    seen: list[Any] = []
    told = decoding_speeds([(Watched(model, monkeypatch, seen), reader)], text)[0]
    assert len(ids) > 80 and told["repeats"] == speed.REPEATS
    wanted = []
    for start in range(0, len(ids), 40):
        wanted += [(1.0, index, place) for place, index in enumerate([1, *ids[start : start + 40]][:-1])]
    assert seen[speed.WARM_UP : speed.WARM_UP + len(ids)] == wanted
    assert len(seen) == speed.WARM_UP + speed.REPEATS * len(ids)
    assert told["tokens"] == len(ids) and told["characters"] == len(text) == speed.CHARACTERS
    assert told["tokens_per_second"] == 1.0  # busy moments are not the model's
    assert told["characters_per_second"] == told["characters_per_token"] == len(text) / len(ids)
    assert (told["device"], told["dtype"]) == ("cpu", "float32")


def test_models_take_turns_piece_by_piece(model: Any, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "REPEATS", 1)  # a process that stands still does not count in a single run
    seen: list[Any] = []
    one, two = (Watched(model, monkeypatch, seen, cost) for cost in (1.0, 4.0))
    one.clock = two.clock
    told = decoding_speeds([(one, reader), (two, reader)], sample(tiny.CHINESE))
    assert [found["tokens_per_second"] for found in told] == [1.0, 0.25]
    turns = [cost for cost, _ in itertools.groupby(seen[2 * speed.WARM_UP :], lambda call: call[0])]
    assert turns == [1.0, 4.0] * speed.PIECES


def test_a_slow_model_is_not_run_five_times(model: Any, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PATIENCE", -1.0)
    assert decoding_speeds([(model, reader)], "abc")[0]["repeats"] == 1


def test_a_text_of_a_character_runs_and_none_is_refused(model: Any, reader: Any) -> None:
    assert decoding_speeds([(model, reader)], "a")[0]["characters_per_second"] > 0
    with pytest.raises(UserError, match="a token in it"):
        decoding_speeds([(model, reader)], "")


def test_the_sample_is_the_beginning_of_a_text() -> None:
    assert sample(["ab", "c"]) == "ab\nc"
    assert sample(["x" * 1000]) == "x" * speed.CHARACTERS
    assert len(sample(["a"] * 1000)) == speed.CHARACTERS
