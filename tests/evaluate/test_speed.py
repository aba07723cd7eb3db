"""Decoding speed: every token is decoded once, with the cache, after what stands before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chinese_llama.errors import UserError
from chinese_llama.evaluate import speed
from chinese_llama.evaluate.speed import decoding_speed, sample
from chinese_llama.model.load import load_model, load_tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def model(extended: Path) -> Any:
    return load_model(extended, "float32")


@pytest.fixture(scope="module")
def reader(extended: Path) -> Any:
    return load_tokenizer(extended)


class Watched:
    """A model that writes down what it is given, and takes a second of a clock for each token."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.device, self.dtype, self.config = model, model.device, model.dtype, model.config
        self.seen: list[tuple[int, int]] = []
        self.seconds = 0.0
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.seconds)

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        assert input_ids.shape == (1, 1) and use_cache
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        self.seen.append((int(input_ids), before))
        self.seconds += 1.0 if len(self.seen) % 7 else 50.0  # now and then the machine is busy
        return self.model(input_ids=input_ids, past_key_values=past_key_values, use_cache=True)


def test_each_token_is_decoded_after_those_before_it(
    model: Any, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sample(tiny.CHINESE)
    ids = reader(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(model.config, "max_position_embeddings", 40)
    watched = Watched(model, monkeypatch)
    told = decoding_speed(watched, reader, text)
    assert len(ids) > 80 and told["repeats"] == speed.REPEATS
    run = watched.seen[speed.WARM_UP : speed.WARM_UP + len(ids)]
    wanted = []
    for start in range(0, len(ids), 40):
        wanted += [(index, place) for place, index in enumerate([1, *ids[start : start + 40]][:-1])]
    assert run == wanted
    assert len(watched.seen) == speed.WARM_UP + speed.REPEATS * len(ids)
    assert told["tokens"] == len(ids) and told["characters"] == len(text) == speed.CHARACTERS
    assert told["tokens_per_second"] == 1.0  # busy moments are not the model's
    assert told["characters_per_second"] == told["characters_per_token"] == len(text) / len(ids)
    assert (told["device"], told["dtype"]) == ("cpu", "float32")


def test_a_slow_model_is_not_run_five_times(model: Any, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PATIENCE", -1.0)
    assert decoding_speed(model, reader, "abc")["repeats"] == 1


def test_a_text_of_a_character_runs_and_none_is_refused(model: Any, reader: Any) -> None:
    assert decoding_speed(model, reader, "a")["characters_per_second"] > 0
    with pytest.raises(UserError, match="a token in it"):
        decoding_speed(model, reader, "")


def test_the_sample_is_the_beginning_of_a_text() -> None:
    assert sample(["ab", "c"]) == "ab\nc"
    assert sample(["x" * 1000]) == "x" * speed.CHARACTERS
    assert len(sample(["a"] * 1000)) == speed.CHARACTERS
