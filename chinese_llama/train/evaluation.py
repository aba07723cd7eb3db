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

CHARACTERS = 50_000  # of a text are measured: the documents that begin before
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
    training there.
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
        self._measured = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._measure(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = int(state.eval_steps or 0)
        if state.global_step == state.max_steps or (every and state.global_step % every == 0):
            self._measure(args, state, control)

    def _measure(self, args: Any, state: Any, control: Any) -> None:
        if not self.texts or self._measured == state.global_step:
            return
        start = time.monotonic()
        self._measured = state.global_step
        self.trainer.check()
        figures = self._figures(args, state)
        self.log.paused += time.monotonic() - start
        due = control.should_log
        self.trainer.log({f"eval/{n}/{key}": f[key] for n, f in figures.items() for key in FIGURES})
        control.should_log = due  # of the loss: logging anything takes it back
        say("; ".join([f"step {state.global_step:,}", *(_told(name, f) for name, f in figures.items())]))
        if sentence := self.regression(state.log_history):
            say(f"Warning: {sentence}")
            if self.stop:
                control.should_save = control.should_training_stop = True

    def _figures(self, args: Any, state: Any) -> dict[str, dict[str, Any]]:
        model = self.trainer.model  # FSDP2 and ZeRO-3 gather through its own hooks
        batch = args.per_device_eval_batch_size * max(len(w.windows[-1].ids) for w in self.texts.values())
        filler = self.trainer.processing_class.eos_token_id
        was_training = model.training
        model.eval()
        try:
            with self.trainer.compute_loss_context_manager():
                return {
                    name: score(model, windows, filler, batch).figures()
                    for name, windows in self.texts.items()
                }
        except UserError as error:
            raise UserError(
                f"At step {state.global_step:,} the measures are not finite. Likely cause: {self.trainer.cause()}."
            ) from error
        finally:
            model.train(was_training)

    def regression(self, history: list[dict[str, Any]]) -> str:
        """What is worse than its limit allows at the last measuring in a log, in one sentence, or ''."""
        for name, limit in self.limits.items():
            key = f"eval/{name}/bits_per_byte"
            found = [(entry["step"], entry[key]) for entry in history if key in entry]
            if found and found[-1][1] > found[0][1] * (1 + limit):
                return (
                    f"{name} rose from {found[0][1]:.3f} to {found[-1][1]:.3f} bits per byte by step {found[-1][0]:,}, over "
                    f"the limit of {limit:.1%}; give it a larger share of `data`, or lower learning_rate."
                )
        return ""


def _told(name: str, figures: dict[str, Any]) -> str:
    return (
        f"{name} {figures['bits_per_character']:.3f} bits per character, "
        f"{figures['bits_per_byte']:.3f} per byte"
    )
