"""The instruction templates by name, as Jinja chat templates; their texts are those of published models.

alpaca-2, vicuna, chatml and llama-3 have a place for a system message, the first two with a text of their own
where there is none. The others put it before the first question, with a newline between.
"""

from __future__ import annotations

ALPACA = "Below is an instruction that describes a task"
ALPACA_INTRO = f"{ALPACA}. Write a response that appropriately completes the request.\n\n"
ALPACA_INPUT_INTRO = (
    f"{ALPACA}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_2_SYSTEM = "You are a helpful assistant. 你是一个乐于助人的助手。"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

HAS_SYSTEM = "messages[0]['role'] == 'system'"
AFTER_SYSTEM = f"loop.index0 == 1 and {HAS_SYSTEM}"
SYSTEM_AND_NEWLINE = f"{{% if {AFTER_SYSTEM} %}}{{{{ messages[0]['content'] + '\\n' }}}}{{% endif %}}"


def _text(text: str) -> str:
    """`text` as a Jinja string."""
    return '"' + text.replace("\n", "\\n") + '"'


def _turns(user: str, assistant: str) -> str:
    """A Jinja loop that writes `user` for questions and `assistant` for answers."""
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}" + user + "{% elif message['role'] == 'assistant' %}" + assistant
        + "{% endif %}{% endfor %}"
    )  # fmt: skip


def _plain(question: str, prompt: str, answer: str = "", between: str = "", intro: str = "") -> str:
    """A template that writes `question` before a question and `prompt` after it, `answer` before an answer,
    and `between` the turns."""
    start = "{{ " + _text(question) + " }}"
    return (
        "{{ bos_token }}{{ " + _text(intro) + " }}"
        + _turns(
            start + SYSTEM_AND_NEWLINE + "{{ message['content'] + " + _text(prompt) + " }}",
            "{{ " + _text(answer) + " + message['content'] + eos_token + " + _text(between) + " }}",
        )
    )  # fmt: skip


def _system_or(default: str) -> str:
    return f"(messages[0]['content'] if {HAS_SYSTEM} else {_text(default)})"


# https://github.com/tatsu-lab/stanford_alpaca (train.py); it has single turns, further ones are as those of
# chinese-alpaca
STANFORD_ALPACA = "{{ bos_token }}" + _turns(
    "{% if loop.first or (" + AFTER_SYSTEM + ") %}"
    "{{ " + _text(ALPACA_INPUT_INTRO) + " if message['input'] else " + _text(ALPACA_INTRO) + " }}{% endif %}"
    "{{ '### Instruction:\\n' }}" + SYSTEM_AND_NEWLINE +
    "{% if message['input'] %}"
    "{{ message['instruction'] + '\\n\\n### Input:\\n' + message['input'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n\\n### Response:' }}",
    "{{ message['content'] + eos_token + '\\n\\n' }}",
)  # fmt: skip
# https://github.com/ymcui/Chinese-LLaMA-Alpaca-2 (scripts/training/build_dataset.py, inference/gradio_demo.py)
ALPACA_2 = _turns(
    "{{ bos_token + '[INST] ' }}"
    "{% if loop.first or (" + AFTER_SYSTEM + ") %}"
    "{{ '<<SYS>>\\n' + " + _system_or(ALPACA_2_SYSTEM) + " + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ message['content'] + ' [/INST]' }}",
    "{{ ' ' + message['content'] + eos_token }}",
)  # fmt: skip
# https://github.com/lm-sys/FastChat (fastchat/conversation.py, vicuna_v1.1)
VICUNA = (
    "{{ bos_token + "
    + _system_or(VICUNA_SYSTEM)
    + " + ' ' }}"
    + _turns(
        "{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}",
        "{{ ' ' + message['content'] + eos_token }}",
    )
)
# https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
LLAMA_3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

TEMPLATES = {
    # https://github.com/ymcui/Chinese-LLaMA-Alpaca (scripts/training/build_dataset.py)
    "chinese-alpaca": _plain("### Instruction:\n", "\n\n### Response: ", between="\n\n", intro=ALPACA_INTRO),
    "stanford-alpaca": STANFORD_ALPACA,
    "alpaca-2": ALPACA_2,
    "vicuna": VICUNA,
    # https://huggingface.co/BelleGroup/BELLE-7B-2M
    "belle": _plain("Human: ", "\n\nAssistant: ", between="\n\n"),
    # https://github.com/IDEA-CCNL/Fengshenbang-LM (fengshen/examples/ziya_llama/finetune_ziya_with_hf.py);
    # the answer's space is the dummy prefix that it has there, tokenised apart
    "ziya": _plain("<human>:", "\n<bot>:", answer=" "),
    "chatml": CHATML,
    "llama-3": LLAMA_3,
}
