"""Answers and continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from chinese_llama.data.templates import prompt_ids, stop_ids, text_ids
from chinese_llama.errors import UserError

# Tokens that a batch may come to with its answers: 4 GiB of keys and values at 7B in bfloat16 on a GPU, and 1 GiB
# in float32 on a CPU, where memory that is too small ends the program.
BATCH_TOKENS, CPU_BATCH_TOKENS = 8192, 1024


def chat_template(tokenizer: Any) -> str | None:
    """The Jinja template of a tuned model's tokenizer; None for a base model."""
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else None


def model_input(tokenizer: Any, prompt: str, raw: bool = False) -> list[int]:
    """Ids of a prompt: as an instruction where the tokenizer has a template, else (or `raw`) as the
    beginning of a text."""
    template = None if raw else chat_template(tokenizer)
    if template:
        return prompt_ids(tokenizer, template, [{"role": "user", "content": prompt}])
    return [tokenizer.bos_token_id, *text_ids(tokenizer, prompt)]


@torch.no_grad()
def steps(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
) -> Iterator[dict[int, int]]:
    """One token more of each of `prompts` (ids) that goes on: {row: id}, until all have ended, each at eos, at what
    else ends an answer in the tokenizer's template, or where it is full.

    `temperature` 0 takes the likeliest token; else row by row by its seed. Prompts are padded on the left, and have
    the positions that they have alone; rows that have ended leave the batch. Raises UserError where ids leave no room
    in the model, and where the model gives NaN or infinity.
    """
    template = chat_template(tokenizer)
    stop = stop_ids(tokenizer, template) if template else [tokenizer.eos_token_id]
    limit, longest = model.config.max_position_embeddings, max(map(len, prompts))
    if longest >= limit:
        raise UserError(f"The prompt is too long: {longest:,} tokens, the model's limit is {limit:,}.")
    draws = [torch.Generator(device=model.device).manual_seed(seed) for seed in seeds]
    rows, past = list(range(len(prompts))), None
    step = torch.tensor([[stop[0]] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    back = torch.arange(longest, 0, -1, device=model.device)
    mask = (back <= torch.tensor([[len(ids)] for ids in prompts], device=model.device)).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for made in range(1, max_new_tokens + 1):
        output = model(
            input_ids=step, attention_mask=mask, position_ids=places, past_key_values=past, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        past = output.past_key_values
        new = _chosen(output.logits[:, -1].float(), temperature, [draws[row] for row in rows])
        said = {row: index for row, index in zip(rows, new.tolist(), strict=True) if index not in stop}
        if said:
            yield said
        going = [at for at, row in enumerate(rows) if row in said and len(prompts[row]) + made < limit]
        if not going:
            return
        if len(going) < len(rows):
            kept = torch.tensor(going, device=model.device)
            past.batch_select_indices(kept)
            rows, new, mask, places = [rows[at] for at in going], new[kept], mask[kept], places[kept]
        step, places = new[:, None], places[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(step)], 1)


def _chosen(logits: torch.Tensor, temperature: float, draws: list[torch.Generator]) -> torch.Tensor:
    """The next ids: logits (rows, vocabulary) to (rows,)."""
    if not logits.amax(-1).isfinite().all():  # NaN too: it is the maximum of what holds one
        raise UserError(
            "The model gives values that are not finite; it is damaged, or float16 is too narrow for it."
        )
    if temperature < 1e-6:  # so that float32 holds logits / temperature
        return logits.argmax(-1)
    shares = torch.softmax(logits / temperature, -1)
    return torch.cat(
        [torch.multinomial(row, 1, generator=draw) for row, draw in zip(shares, draws, strict=True)]
    )


def stream(
    model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int, temperature: float, seed: int = 0
) -> Iterator[str]:
    """The text generated after `ids`, in growing parts, as `steps` has it. Parts never end inside a character."""
    new: list[int] = []
    shown = ""
    for said in steps(model, tokenizer, [ids], max_new_tokens, temperature, [seed]):
        new += said.values()
        text = tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
) -> str:
    """What the model says after `prompt` (see `model_input`)."""
    ids = model_input(tokenizer, prompt, raw)
    ((_, text),) = answer_all(model, tokenizer, [ids], max_new_tokens, temperature, [seed])
    return text


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    batch_tokens: int | None = None,
) -> Iterator[tuple[int, str]]:
    """(number from 0, answer) of each of `prompts` (ids), as `answer` has it, in the order in which they end.

    Batches are of about equal length, the longest first, of `batch_tokens` (what the device suits) with the longest
    answers, or one prompt; ones half as large follow where a GPU's memory does not hold that. In float32 an answer is
    the one that is given alone; in bfloat16 it may differ where two tokens are about as likely. Raises UserError as
    `steps`, and where memory does not hold one prompt.
    """
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS if model.device.type == "cuda" else CPU_BATCH_TOKENS
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # its frequencies are those of a batch's longest row
        batch_tokens = 1
    todo = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    while todo:
        count = max(1, batch_tokens // (len(prompts[todo[0]]) + max_new_tokens))
        batch, todo = todo[:count], todo[count:]
        new: dict[int, list[int]] = {row: [] for row in range(len(batch))}
        ids, drawn = [prompts[number] for number in batch], [seeds[number] for number in batch]
        try:
            for said in steps(model, tokenizer, ids, max_new_tokens, temperature, drawn):
                for row in [row for row in new if row not in said]:
                    yield batch[row], _text(tokenizer, new.pop(row))
                for row, index in said.items():
                    new[row].append(index)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise UserError(
                    f"The GPU's memory does not hold the model and a prompt of {len(ids[0]):,} tokens with its answer; free "
                    "some, give a smaller --max-new-tokens, or use the CPU (CUDA_VISIBLE_DEVICES=)."
                ) from error
            batch_tokens = len(batch) * (len(ids[0]) + max_new_tokens) // 2
            todo = [batch[row] for row in new] + todo
            continue
        for row, found in new.items():
            yield batch[row], _text(tokenizer, found)


def _text(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids, without a character that is cut off at its end."""
    while (text := tokenizer.decode(ids, skip_special_tokens=True)).endswith("\ufffd"):
        ids = ids[:-1]
    return str(text).strip()
