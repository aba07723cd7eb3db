"""lm-evaluation-harness with a model that is loaded already (https://github.com/EleutherAI/lm-evaluation-harness).

It makes the prompts, draws the examples and aggregates; tokens and probabilities are this module's. Its own
HFLM would let literal control tokens in a text become control tokens, put bos twice before a text (once
itself, once the tokenizer), cut prompts that are too long from the left without a word, and read the
probabilities in the model's own precision.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval import evaluator, utils
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from chinese_llama.data.templates import text_ids
from chinese_llama.errors import UserError
from chinese_llama.evaluate.bits import BATCH_TOKENS, Window, Windows, score, window_length
from chinese_llama.progress import track

Asked = tuple[list[int], list[int]]  # ids that stand before, ids whose probability is wanted


def run(
    model: Any, tokenizer: Any, tasks: dict[str, tuple[dict[str, Any], dict[str, list[dict[str, str]]]]]
) -> dict[str, dict[str, Any]]:
    """The metrics of tasks, by name; a task is what the harness is told, and records by split. With them, of
    multiple choice, "shots": how many examples each question has before it.

    `evaluate` and not `simple_evaluate`, which would seed the program's random numbers. Questions have to fit
    into the model's context without examples. Raises UserError for values that are not finite.
    """
    loaded = Loaded(model, tokenizer)
    with _quiet():
        made = {name: _task(name, config, splits) for name, (config, splits) in tasks.items()}
        loaded.tasks = made
        # One draw: the standard error of a mean is by formula then; of other metrics it would be by bootstrap.
        draws = int(any(config["output_type"] == "multiple_choice" for config, _ in tasks.values()))
        told = evaluator.evaluate(loaded, made, bootstrap_iters=draws, log_samples=False)
    return {name: {**told["results"][name], "shots": loaded.shots[name]} for name in made}


def _task(name: str, config: dict[str, Any], splits: dict[str, list[dict[str, str]]]) -> ConfigurableTask:
    """A task over records in memory: from files the harness would make copies in a cache."""
    from datasets import Dataset

    tables = {split: Dataset.from_list(rows) for split, rows in splits.items() if rows}
    return ConfigurableTask(config={**config, "task": name, "custom_dataset": lambda: tables})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log, and its progress bar for each task, which cannot be turned off."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def choice_ids(tokenizer: Any, context: str, choices: Sequence[str]) -> list[Asked]:
    """The ids of a prompt with each of the `choices`, as the model is trained on such a text (after one bos),
    cut where the choices begin to differ.

    So they are compared after the same ids, even if a tokenizer joins a choice to what stands before it.
    """
    whole = [[tokenizer.bos_token_id, *ids] for ids in text_ids(tokenizer, [context + c for c in choices])]
    same = next(at for at, ids in enumerate(zip(*whole, strict=False)) if len(set(ids)) > 1)
    before = whole[0][:same]
    return [(before, ids[same:]) for ids in whole]


@torch.no_grad()
def likelihoods(model: Any, asked: Sequence[Asked], filler: int, batch_tokens: int) -> list[float]:
    """Natural logarithm of the probability of each continuation, in float32.

    What differs only in the last id is run once; rows are padded on the right, where causal attention does
    not look.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, (context, wanted) in enumerate(asked):
        rows.setdefault((*context, *wanted[:-1]), []).append(number)
    found = [0.0] * len(asked)
    batches = list(_batches(sorted(rows, key=len, reverse=True), batch_tokens))
    for batch in track(batches, "answering", len(batches), "batches"):
        places = [(row, number) for row, fed in enumerate(batch) for number in rows[fed]]
        kept = sorted({at for row, number in places for at in _positions(batch[row], asked[number][1])})
        column = {at: index for index, at in enumerate(kept)}
        ids = torch.full((len(batch), len(batch[0])), filler)
        for row, fed in enumerate(batch):
            ids[row, : len(fed)] = torch.tensor(fed)
        only = torch.tensor(kept, device=model.device)
        logits = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=only).logits
        known = torch.log_softmax(logits.float(), -1).cpu()
        for row, number in places:
            wanted = asked[number][1]
            at = [column[place] for place in _positions(batch[row], wanted)]
            found[number] = float(known[row, at, wanted].double().sum())
    return found


def _positions(fed: tuple[int, ...], wanted: list[int]) -> range:
    """Where in a row the probabilities of the ids of a continuation are."""
    return range(len(fed) - len(wanted), len(fed))


def _batches(rows: list[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Rows, longest first, `batch_tokens` tokens at a time: memory that is too small is told at once."""
    while rows:
        count = max(1, batch_tokens // len(rows[0]))
        yield rows[:count]
        rows = rows[count:]


def _with_last(task: ConfigurableTask, doc: dict[str, str], count: int) -> str:
    """The prompt for a question after the last `count` of its examples."""
    examples = task.sampler.df
    task.sampler.replace_df(examples[len(examples) - count :])
    try:
        return str(task.fewshot_context(doc, count))
    finally:
        task.sampler.replace_df(examples)


class Loaded(LM):
    """A loaded model (or a PeftModel) and its tokenizer, as the harness asks it about `tasks`. `shots`: how many
    examples their questions had."""

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int = BATCH_TOKENS) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.limit: int | None = getattr(model.config, "max_position_embeddings", None)
        self.terminal = sys.stderr  # before the harness is made quiet
        self.tasks: dict[str, ConfigurableTask] = {}
        self.shots: dict[str, list[int]] = defaultdict(list)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """For each (prompt, choice): the choice's log-probability. No metric of ours asks whether the model would
        have said it, so this is always False."""
        asked: list[Asked] = []
        for context, group in itertools.groupby(requests, key=lambda request: request.args[0]):
            same = list(group)
            asked += self._fitting(same[0], context, [request.args[1] for request in same])
        with contextlib.redirect_stderr(self.terminal):
            found = likelihoods(self.model, asked, self.tokenizer.eos_token_id, self.batch_tokens)
        for request, value in zip(requests, found, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"{request.task_name}: the model gives values that are not finite; is it damaged, or in float16?"
                )
        return [(value, False) for value in found]

    def _fitting(self, request: Any, context: str, choices: list[str]) -> list[Asked]:
        """The ids of a prompt with each choice. Where those are too many for the model, the prompt loses its
        examples one by one, the first one first."""
        task = self.tasks.get(request.task_name)
        shots = task.config.num_fewshot if task else 0
        while True:
            pairs = choice_ids(self.tokenizer, context, choices)
            length = max(len(before) + len(wanted) - 1 for before, wanted in pairs)
            if not (task and shots and self.limit and length > self.limit):
                self.shots[request.task_name].append(shots)
                return pairs
            shots -= 1
            context = _with_last(task, request.doc, shots)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """For each text: its log-probability after bos, in the harness's windows, of which none but the last of a
        text overlaps with another. Raises NotFinite."""
        length = window_length(self.limit)  # of what is read: the last id of a window is only asked for
        texts = Windows(length, length)
        for number, request in enumerate(requests):
            ids = text_ids(self.tokenizer, request.args[0])
            texts.tokens.append(len(ids))
            for fed in utils.get_rolling_token_windows(ids, self.tokenizer.bos_token_id, length, 1):
                context, wanted = utils.make_disjoint_window(fed)
                texts.windows.append(Window(context + wanted, len(context), number))
        texts.windows.sort(key=lambda window: len(window.ids))
        with contextlib.redirect_stderr(self.terminal):
            scores = score(self.model, texts, self.tokenizer.eos_token_id, self.batch_tokens)
        return [-nats for nats in scores.nats]

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("no task of ours generates text")
