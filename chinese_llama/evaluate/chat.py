"""A conversation in the terminal."""

from __future__ import annotations

from typing import Any

from chinese_llama.data.conversations import Message
from chinese_llama.data.templates import prompt_ids
from chinese_llama.errors import UserError
from chinese_llama.evaluate.generate import chat_template, model_input, stream

AFRESH = "/new"


def newest(
    tokenizer: Any, template: str, messages: list[Message], room: int
) -> tuple[list[int], list[Message]]:
    """The ids of the newest turns that fit into `room` tokens, and these; of the last question in any case."""
    while len(ids := prompt_ids(tokenizer, template, messages)) > room and len(messages) > 1:
        messages = messages[2:]
    return ids, messages


def chat(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> None:
    """Answer what is typed until it is an empty line or the end; a model with a template remembers the
    conversation, as far as it has room for it beside the answer, a base model continues each text alone."""
    template = chat_template(tokenizer)
    limit = model.config.max_position_embeddings
    room = limit - min(max_new_tokens, limit // 2)
    messages: list[Message] = []
    while question := _typed():
        if question == AFRESH:
            messages = []
            continue
        asked = [*messages, {"role": "user", "content": question}]
        answer = ""
        try:
            if template:
                ids, kept = newest(tokenizer, template, asked, room)
            else:
                ids, kept = model_input(tokenizer, question), asked
            for part in stream(model, tokenizer, ids, max_new_tokens, temperature):
                print(part, end="", flush=True)
                answer += part
        except UserError as error:
            print(error, end="")
            continue
        finally:
            print()
        if forgotten := (len(asked) - len(kept)) // 2:
            before = len(messages) // 2
            print(
                f"(Forgotten: the oldest {forgotten} of {before} answers; the model holds {limit:,} tokens.)"
            )
        messages = [*kept, {"role": "assistant", "content": answer.strip()}]


def _typed() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
