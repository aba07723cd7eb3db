"""Instruction templates: the one place that turns an instruction into text and ids.

Training, `generate` and `chat` all come here. A template is a Jinja chat template, saved with the
tokenizer of a tuned model, so that `apply_chat_template` gives the same prompt ids elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from chinese_llama.errors import UserError, nearest

IGNORE = -100  # label of a token that is not learnt

ALPACA_INTRO = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n"
)
# The text is fixed by the published Chinese-Alpaca models, trailing space included.
CHINESE_ALPACA = (
    "{{ bos_token }}"
    '{{ "' + ALPACA_INTRO + '" }}'
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    '{{ "### Instruction:\\n" + message["content"] + "\\n\\n### Response: " }}'
    "{% elif message['role'] == 'assistant' %}"
    '{{ message["content"] + eos_token + "\\n\\n" }}'
    "{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"chinese-alpaca": CHINESE_ALPACA}


@dataclass
class Sample:
    """Token ids and labels of equal length; labels are IGNORE where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]


def find_template(name: str) -> str:
    """The Jinja text of a template. Raises UserError naming those there are."""
    if name not in TEMPLATES:
        known = ", ".join(sorted(TEMPLATES))
        raise UserError(f"template {name!r} is unknown{nearest(name, TEMPLATES)}; known are {known}.")
    return TEMPLATES[name]


def prompt_text(template: str, question: str) -> str:
    """The prompt for one question, without control tokens.

    >>> prompt_text(find_template("chinese-alpaca"), "你好")[-32:]
    '### Instruction:\\n你好\\n\\n### Response: '
    """
    messages = [{"role": "user", "content": question}]
    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    return compiled.render(messages=messages, bos_token="", eos_token="", add_generation_prompt=True)


def question_of(record: dict[str, str]) -> str:
    """Instruction and input as one question, joined with a newline."""
    return f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text of a user or a corpus: no bos, and literal control tokens are text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def prompt_ids(tokenizer: Any, template: str, question: str) -> list[int]:
    """bos and the ids of the prompt for one question."""
    return [tokenizer.bos_token_id, *text_ids(tokenizer, prompt_text(template, question))]


def sample(tokenizer: Any, template: str, record: dict[str, str]) -> Sample:
    """Prompt, answer and eos; only the answer and its eos are learnt."""
    prompt = prompt_ids(tokenizer, template, question_of(record))
    answer = [*text_ids(tokenizer, record["output"]), tokenizer.eos_token_id]
    return Sample(prompt + answer, [IGNORE] * len(prompt) + answer)
