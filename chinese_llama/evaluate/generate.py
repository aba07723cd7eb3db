"""Answers and continuations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from chinese_llama.data.templates import prompt_ids, stop_ids, text_ids
from chinese_llama.errors import UserError


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
def stream(
    model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int, temperature: float, seed: int = 0
) -> Iterator[str]:
    """The text generated after `ids`, in growing parts, up to eos or what else ends an answer in the
    tokenizer's template.

    `temperature` 0 takes the likeliest token. Parts never end inside a character. Raises UserError where
    the ids leave no room in the model, and where the model gives NaN or infinity.
    """
    template = chat_template(tokenizer)
    stop = stop_ids(tokenizer, template) if template else [tokenizer.eos_token_id]
    generator = torch.Generator(device=model.device).manual_seed(seed)
    past, step = None, torch.tensor([ids], device=model.device)
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        limit = model.config.max_position_embeddings
        raise UserError(f"The prompt is too long: {len(ids)} tokens, the model's limit is {limit}.")
    new: list[int] = []
    shown = ""
    for _ in range(min(max_new_tokens, room)):
        output = model(input_ids=step, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = output.logits[0, -1].float()
        if not logits.max().isfinite():  # NaN too: it is the maximum of what holds one
            raise UserError(
                "The model gives values that are not finite; it is damaged, or float16 is too narrow for it."
            )
        if temperature > 0:
            index = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        else:
            index = logits.argmax(keepdim=True)
        if int(index) in stop:
            break
        new.append(int(index))
        step = index[None]
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
    return "".join(stream(model, tokenizer, ids, max_new_tokens, temperature, seed)).strip()
