"""A step never reads from the device: on a GPU each read would wait for all that is queued."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chinese_llama.model.attention import put_on
from chinese_llama.train import course
from chinese_llama.train.later import Later
from chinese_llama.train.trainer import VocabularyTrainer
from tests.train.running import pretrain

READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
)


class Reads(TorchDispatchMode):
    """Where numbers are read out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ops = self.step = 0
        self.allowed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        if func in READS:
            self.saw()
        return func(*args, **(kwargs or {}))

    def saw(self, what: str = "") -> None:
        if 1 <= self.step < 5 and not self.allowed:
            self.found.append(what + "".join(traceback.format_stack(limit=7)[:-2]))


def watch(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also see what reads tensors whole, and figures that are read in the step that made them. (Dropout's seed is a
    number of the host.)"""
    made, read = Later.__init__, Later.read
    born: dict[Later, int] = {}

    def make(self: Later, values: torch.Tensor) -> None:
        born[self] = reads.step
        made(self, values)

    def late(self: Later) -> list[float]:
        if born[self] == reads.step:
            reads.saw("read in the step that made it")
        reads.allowed = True
        values = read(self)
        reads.allowed = False
        return values

    monkeypatch.setattr(Later, "__init__", make)
    monkeypatch.setattr(Later, "read", late)
    for name in ("tolist", "cpu", "numpy"):
        plain = getattr(torch.Tensor, name)

        def seen(self: torch.Tensor, *given: Any, plain: Any = plain, **named: Any) -> Any:
            if not traceback.extract_stack(limit=2)[0].filename.endswith(
                "attention.py"
            ):  # the CPU's, part by part
                reads.saw()
            return plain(self, *given, **named)

        monkeypatch.setattr(torch.Tensor, name, seen)


@pytest.mark.parametrize(
    "more", [[], ["--gradient_accumulation_steps", "2"], ["--gradient_checkpointing", "true"]]
)
def test_a_step_reads_nothing(
    more: list[str], extended: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step to the fifth, none of which logs. Attention is the one that GPUs have."""
    reads, plain, steps = Reads(), VocabularyTrainer.training_step, set[int]()
    watch(reads, monkeypatch)

    def step(self: Any, *given: Any, **named: Any) -> torch.Tensor:
        now = reads.step = self.state.global_step
        if now == 1 and now not in steps:
            reads.__enter__()
        if now == 5 and now not in steps:
            reads.__exit__(None, None, None)
        steps.add(now)
        return plain(self, *given, **named)

    monkeypatch.setattr(VocabularyTrainer, "training_step", step)
    monkeypatch.setattr(course, "use_packed", lambda model, *_: not put_on(model))
    pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "out", "--max_steps", "7", "--use_cpu", "true"),
        *("--dtype", "bfloat16", "--logging_steps", "7", "--lora_dropout", "0", *more),
    )
    assert steps == set(range(7)) and reads.ops > 1000
    assert not reads.found, "\n\n".join(reads.found)
