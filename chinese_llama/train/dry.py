"""`--dry-run`: what would train, on what, in which memory; then one step. Only the packed data is kept."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import numpy

from chinese_llama.data.prepare import Prepared
from chinese_llama.model.lora import trainable_groups
from chinese_llama.train.callbacks import Bar, JsonLog
from chinese_llama.train.estimate import estimate, settings_of
from chinese_llama.train.evaluation import Evaluation
from chinese_llama.train.fields import Recipe
from chinese_llama.train.jobs import named_sources
from chinese_llama.train.trainer import check_steps


def run(recipe: Recipe[Any], trainer: Any, prepared: Prepared) -> None:
    """Print the tables and run one step with the settings of the recipe."""
    if trainer.is_world_process_zero():
        for lines in (_trainable(trainer), _data(recipe, trainer, prepared), _memory(recipe, trainer)):
            print("\n".join([*lines, ""]))
    for callback in (Bar, JsonLog, Evaluation):
        trainer.remove_callback(callback)
    trainer.args.max_steps = 1
    trainer.args.save_strategy = "no"
    trainer.fields = dataclasses.replace(trainer.fields, rows_only_steps=0)
    start = time.monotonic()
    loss = trainer.train().training_loss
    trainer.check()
    if trainer.is_world_process_zero():
        print(
            f"One step ran: loss {loss:.3f}, {time.monotonic() - start:.1f} s with warming up. No adapter was written."
        )


def _trainable(trainer: Any) -> list[str]:
    groups = trainable_groups(trainer.model)
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    lines = [f"{'trained':<24}{'numbers':>16}"]
    lines += [f"{group:<24}{count:>16,}" for group, count in groups.items()]
    return [*lines, f"{'all of':<24}{sum(groups.values()):>16,} of {total:,}"]


def _data(recipe: Recipe[Any], trainer: Any, prepared: Prepared) -> list[str]:
    """Tokens and steps of each source in one epoch, and of the run."""
    args, length = trainer.args, recipe.fields.length
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    sources = named_sources(prepared)
    blocks = numpy.bincount(
        numpy.asarray(trainer.train_dataset.with_format("numpy")["source"]), minlength=len(sources)
    )
    lines = [
        f"{'one epoch of':<24}{'documents':>12}{'held out':>10}{'blocks':>10}{'tokens':>16}{'share':>8}{'steps':>10}"
    ]
    tokens = [count * s["tokens"] / s["blocks"] for s, count in zip(sources, blocks, strict=True)]
    for source, count, held in zip(sources, blocks, tokens, strict=True):
        lines.append(
            f"{source['name'][:23]:<24}{source['documents']:>12,}{source['held_out']:>10,}{count:>10,}"
            f"{held:>16,.0f}{held / sum(tokens):>8.1%}{count / batch:>10,.1f}"
        )
    per_epoch = math.ceil(blocks.sum() / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    check_steps(steps, recipe.fields.rows_only_steps)
    return [*lines, f"The run: {steps:,} steps of {batch} blocks of {length} tokens."]


def _memory(recipe: Recipe[Any], trainer: Any) -> list[str]:
    config = trainer.model.config.to_dict()
    rows = next((len(p) for n, p in trainer.model.named_parameters() if "trainable_tokens_delta" in n), 0)
    told = estimate(config, settings_of(recipe.fields, recipe.training, rows))
    return ["estimated memory of a process", told.table()]
