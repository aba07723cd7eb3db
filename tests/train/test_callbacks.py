"""Stopping, alone and together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chinese_llama.train.callbacks import StopOnSignal
from chinese_llama.train.later import Later

ARGUMENTS = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def stop() -> Iterator[StopOnSignal]:
    callback = StopOnSignal()
    callback.on_train_begin(ARGUMENTS, None, None)
    yield callback
    callback.on_train_end(ARGUMENTS, None, None)


@pytest.fixture
def together() -> Iterator[None]:
    """A group of processes; this one is all of it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ended(callback: StopOnSignal) -> Any:
    """What a step's end sets."""
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    callback.on_step_end(ARGUMENTS, None, control)
    assert control.should_save == control.should_training_stop == callback.stopped
    return callback.stopped


def test_a_signal_stops_after_the_step(stop: StopOnSignal) -> None:
    assert not ended(stop)
    signal.raise_signal(signal.SIGTERM)
    assert not stop.stopped, "the step goes on"
    assert ended(stop)


def test_processes_agree_on_a_signal(stop: StopOnSignal, together: None) -> None:
    assert not ended(stop)
    signal.raise_signal(signal.SIGINT)
    assert ended(stop)


def test_a_second_interrupt_stops_at_once(stop: StopOnSignal) -> None:
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_figures_are_read_as_they_are() -> None:
    values = Later(torch.tensor([1.5, float("inf"), float("nan")])).read()
    assert values[:2] == [1.5, float("inf")] and values[2] != values[2]
