"""Measures while training: bits per character and per byte of texts, and a limit to forgetting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from chinese_llama.data.formats import documents
from chinese_llama.errors import UserError
from chinese_llama.evaluate.bits import Windows, score, text_windows
from chinese_llama.progress import say
from chinese_llama.train.callbacks import JsonLog

CHARACTERS = 100_000  # of a text are measured: the documents that begin before
FIGURES = ("bits_per_character", "bits_per_byte", "perplexity", "characters_per_token")


def first_documents(path: Path) -> Iterator[str]:
    """The documents of a text that begin in its first CHARACTERS characters."""
    seen = 0
    for text in documents(path):
        if seen >= CHARACTERS:
            return
        seen += len(text)
        yield text


def prepare_texts(tokenizer: Any, texts: dict[str, Path], length: int) -> dict[str, Windows]:
    """The texts that are measured, in windows of `length` tokens: as long as what is trained on."""
    return {
        name: text_windows(tokenizer, first_documents(path), max(length, 2)) for name, path in texts.items()
    }


class Evaluation(TrainerCallback):
    """Measures `texts` before the first step, every `eval_steps` and after the last one.

    Every process measures all of them: what shards the model needs them all in every forward pass. `limits`
    {name: share} are how much the bits per byte of a text may rise over the first figure; `stop` ends the
    training there. `regression` says in one sentence what has risen too far.
    """

    def __init__(
        self, trainer: Any, texts: dict[str, Windows], limits: dict[str, float], stop: bool, log: JsonLog
    ) -> None:
        for name in limits:
            if name not in texts:
                raise UserError(
                    f"max_regression: no text is named {name!r}; measured are {', '.join(texts) or 'none'} "
                    "(eval_text, eval_split)."
                )
        self.trainer, self.texts, self.limits, self.stop, self.log = trainer, texts, limits, stop, log
        self.regression = ""
        self._measured = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._measure(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = int(args.eval_steps or 0)
        if state.global_step == state.max_steps or (every and state.global_step % every == 0):
            self._measure(args, state, control)

    def _measure(self, args: Any, state: Any, control: Any) -> None:
        if not self.texts or self._measured == state.global_step:
            return
        start = time.monotonic()
        self._measured = state.global_step
        model = self.trainer.model  # FSDP2 and ZeRO-3 gather through its own hooks
        batch = args.per_device_eval_batch_size * max(len(w.windows[-1].ids) for w in self.texts.values())
        was_training = model.training
        model.eval()
        with self.trainer.compute_loss_context_manager():
            figures = {
                name: score(model, windows, self.trainer.processing_class.eos_token_id, batch)
                for name, windows in self.texts.items()
            }
        model.train(was_training)
        self.log.paused += time.monotonic() - start
        due = control.should_log
        self.trainer.log({f"eval/{n}/{key}": f[key] for n, f in figures.items() for key in FIGURES})
        control.should_log = due  # of the loss: logging anything takes it back
        say("; ".join([f"step {state.global_step:,}", *(_told(name, f) for name, f in figures.items())]))
        self._compare(state, control, figures)

    def _compare(self, state: Any, control: Any, figures: dict[str, Any]) -> None:
        """Warn, or stop, where a text is worse than its limit allows."""
        for name, limit in self.limits.items():
            key = f"eval/{name}/bits_per_byte"
            first = next((entry[key] for entry in state.log_history if key in entry), None)
            now = figures[name]["bits_per_byte"]
            if first is None or now <= first * (1 + limit):
                continue
            self.regression = (
                f"{name} rose from {first:.3f} to {now:.3f} bits per byte by step {state.global_step:,}, over the limit "
                f"of {limit:.1%}; give it a larger share of `data`, or lower learning_rate."
            )
            say(f"Warning: {self.regression}")
            if self.stop:
                control.should_save = control.should_training_stop = True


def _told(name: str, figures: dict[str, Any]) -> str:
    return (
        f"{name} {figures['bits_per_character']:.3f} bits per character, "
        f"{figures['bits_per_byte']:.3f} per byte"
    )
