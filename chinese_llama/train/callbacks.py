"""What happens beside the steps: the log, the progress bar, stopping cleanly."""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from chinese_llama.directories import write_text
from chinese_llama.progress import say
from chinese_llama.train.later import Later
from chinese_llama.train.log import read_log

QUIET = 30.0  # seconds without a line where there is no terminal


class JsonLog(TrainerCallback):
    """Appends every log entry as a line of JSON: step, seconds since the start, and the figures.

    With a loss also tokens and characters per second since the entry before it (time for measuring left
    out), the learning rate of each group, and the peak memory in GiB, of the GPU if there is one, else of
    the process. After a resume, entries past the checkpoint are dropped first: the log tells one story.
    """

    def __init__(self, path: Path, block_size: int, characters_per_token: float) -> None:
        self.path, self.block_size, self.characters = path, block_size, characters_per_token
        self.paused = 0.0  # seconds that went into measuring
        self.rates: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = time.monotonic()
        self.paused = 0.0
        self.before = (state.global_step, 0.0)
        if state.is_world_process_zero:
            kept = [entry for entry in read_log(self.path) if entry["step"] <= state.global_step]
            kept = kept if state.global_step else []
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.rates = {
            group["name"]: float(group["lr"]) for group in optimizer.param_groups if "name" in group
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "train_loss" not in logs:  # which the last entry has
            seconds = time.monotonic() - self.start
            entry = {"step": state.global_step, "seconds": round(seconds, 3), **_nested(logs)}
            if "loss" in logs:
                entry |= self._speed(args, state.global_step, seconds - self.paused)
                entry["learning_rates"] = self.rates
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")

    def _speed(self, args: Any, step: int, seconds: float) -> dict[str, float]:
        blocks = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        tokens = (step - self.before[0]) * blocks * self.block_size
        speed = tokens / max(seconds - self.before[1], 1e-9)
        self.before = (step, seconds)
        figures: dict[str, float] = {"tokens_per_second": round(speed)}
        figures["characters_per_second"] = round(speed * self.characters)
        if torch.cuda.is_available():
            return {**figures, "gpu_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {**figures, "memory_gib": round(peak / 2**30, 2)}


def _nested(logs: dict[str, Any]) -> dict[str, Any]:
    """Entries `eval/zh/bits_per_byte` as {"eval": {"zh": {"bits_per_byte": ...}}}; others as they are."""
    found: dict[str, Any] = {}
    for name, value in logs.items():
        place = found
        *above, last = name.split("/")
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return found


class Bar(TrainerCallback):
    """One progress bar with the latest loss."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told = time.monotonic()
        hidden = True if not state.is_world_process_zero else None
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.what,
            unit=" steps",
            disable=hidden,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n if self.bar.n < state.global_step else 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
        if self.bar.disable and time.monotonic() - self.told > QUIET:  # no terminal: a line now and then
            self.told = time.monotonic()
            say(f"{self.what}: step {state.global_step:,} of {state.max_steps:,}, loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    Of several processes all stop after the same step; on GPUs one step later, when what they tell each other is there
    without waiting for it.
    """

    def __init__(self) -> None:
        self.stopped = False  # as all processes know
        self._asked = False
        self._sent: Later | None = None
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stopped = self._agreed(args.device) if torch.distributed.is_initialized() else self._asked
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def _agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; on CUDA, before the step that is over now."""
        flag = torch.full((1,), float(self._asked), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        before, self._sent = self._sent, Later(flag)
        told = before if flag.is_cuda else self._sent
        return told is not None and any(told.read())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
