"""Conversations, and the published texts that templates make of them."""

from __future__ import annotations

from chinese_llama.data.conversations import Message

MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BELOW = "Below is an instruction that describes a task"
INTRO = f"{BELOW}. Write a response that appropriately completes the request.\n\n"
INPUT_INTRO = (
    f"{BELOW}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HELPFUL = "You are a helpful assistant. 你是一个乐于助人的助手。"


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


WITH_INPUT = {**user("反义词\n大"), "instruction": "反义词", "input": "大"}
TWO_TURNS = [user("问一"), assistant("答一"), user("问二"), assistant("The end")]
INPUT_FIRST = [WITH_INPUT, assistant("小")]
SYSTEM_FIRST = [system("简短"), user("问一"), assistant("答一"), user("问二"), assistant("答二")]

# What each template makes of a conversation: {s} is bos, {e} eos, ‖ where the prompt for an answer ends.
PUBLISHED = [
    ("chinese-alpaca", TWO_TURNS,
     "{s}" + INTRO + "### Instruction:\n问一\n\n### Response: ‖答一{e}"
     "\n\n### Instruction:\n问二\n\n### Response: ‖The end{e}\n\n"),
    ("chinese-alpaca", INPUT_FIRST, "{s}" + INTRO + "### Instruction:\n反义词\n大\n\n### Response: ‖小{e}\n\n"),
    ("chinese-alpaca", SYSTEM_FIRST,
     "{s}" + INTRO + "### Instruction:\n简短\n问一\n\n### Response: ‖答一{e}"
     "\n\n### Instruction:\n问二\n\n### Response: ‖答二{e}\n\n"),
    ("stanford-alpaca", TWO_TURNS,
     "{s}" + INTRO + "### Instruction:\n问一\n\n### Response:‖答一{e}"
     "\n\n### Instruction:\n问二\n\n### Response:‖The end{e}\n\n"),
    ("stanford-alpaca", INPUT_FIRST,
     "{s}" + INPUT_INTRO + "### Instruction:\n反义词\n\n### Input:\n大\n\n### Response:‖小{e}\n\n"),
    ("stanford-alpaca", [system("简短"), *INPUT_FIRST],
     "{s}" + INPUT_INTRO + "### Instruction:\n简短\n反义词\n\n### Input:\n大\n\n### Response:‖小{e}\n\n"),
    ("stanford-alpaca", [user("问一"), assistant("答一"), *INPUT_FIRST],
     "{s}" + INTRO + "### Instruction:\n问一\n\n### Response:‖答一{e}"
     "\n\n### Instruction:\n反义词\n\n### Input:\n大\n\n### Response:‖小{e}\n\n"),
    ("alpaca-2", TWO_TURNS,
     "{s}[INST] <<SYS>>\n" + HELPFUL + "\n<</SYS>>\n\n问一 [/INST]‖ 答一{e}{s}[INST] 问二 [/INST]‖ The end{e}"),
    ("alpaca-2", SYSTEM_FIRST,
     "{s}[INST] <<SYS>>\n简短\n<</SYS>>\n\n问一 [/INST]‖ 答一{e}{s}[INST] 问二 [/INST]‖ 答二{e}"),
    ("alpaca-2", INPUT_FIRST, "{s}[INST] <<SYS>>\n" + HELPFUL + "\n<</SYS>>\n\n反义词\n大 [/INST]‖ 小{e}"),
    ("vicuna", TWO_TURNS, "{s}" + CURIOUS + " USER: 问一 ASSISTANT:‖ 答一{e}USER: 问二 ASSISTANT:‖ The end{e}"),
    ("vicuna", SYSTEM_FIRST, "{s}简短 USER: 问一 ASSISTANT:‖ 答一{e}USER: 问二 ASSISTANT:‖ 答二{e}"),
    ("belle", TWO_TURNS, "{s}Human: 问一\n\nAssistant: ‖答一{e}\n\nHuman: 问二\n\nAssistant: ‖The end{e}\n\n"),
    ("belle", SYSTEM_FIRST, "{s}Human: 简短\n问一\n\nAssistant: ‖答一{e}\n\nHuman: 问二\n\nAssistant: ‖答二{e}\n\n"),
    ("ziya", TWO_TURNS, "{s}<human>:问一\n<bot>:‖ 答一{e}<human>:问二\n<bot>:‖ The end{e}"),
    ("ziya", SYSTEM_FIRST, "{s}<human>:简短\n问一\n<bot>:‖ 答一{e}<human>:问二\n<bot>:‖ 答二{e}"),
    ("chatml", TWO_TURNS,
     "<|im_start|>user\n问一<|im_end|>\n<|im_start|>assistant\n‖答一<|im_end|>\n"
     "<|im_start|>user\n问二<|im_end|>\n<|im_start|>assistant\n‖The end<|im_end|>\n"),
    ("chatml", [system("简短"), *INPUT_FIRST],
     "<|im_start|>system\n简短<|im_end|>\n<|im_start|>user\n反义词\n大<|im_end|>\n<|im_start|>assistant\n‖小<|im_end|>\n"),
    ("llama-3", TWO_TURNS,
     "{s}<|start_header_id|>user<|end_header_id|>\n\n问一<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n‖答一<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\n问二<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n‖The end<|eot_id|>"),
    ("llama-3", SYSTEM_FIRST[:3],
     "{s}<|start_header_id|>system<|end_header_id|>\n\n简短<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\n问一<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n‖答一<|eot_id|>"),
]  # fmt: skip
