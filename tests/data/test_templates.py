"""The prompt of the published models to the letter, and which tokens are learnt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.templates import (
    IGNORE,
    find_template,
    prompt_ids,
    prompt_text,
    question_of,
    sample,
    text_ids,
)
from chinese_llama.errors import UserError
from chinese_llama.vocab.proto import encoder, read_model

INTRO = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
TEMPLATE = find_template("chinese-alpaca")
TEXTS = st.text(alphabet="中国的 首都ab1{}%\"'\\\n\t<s>/▁😀", max_size=30)


@pytest.fixture(scope="module")
def tuned(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The extended tokenizer with the template saved beside it, as sft_lora saves it."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tuned") / "tokenizer"
    shutil.copytree(tokenizer, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return AutoTokenizer.from_pretrained(str(directory))


def test_the_prompt_of_chinese_alpaca_to_the_letter() -> None:
    assert prompt_text(TEMPLATE, "中国的首都是哪里？") == (
        INTRO + "### Instruction:\n中国的首都是哪里？\n\n### Response: "
    )


@settings(max_examples=50, deadline=None)
@given(question=TEXTS)
def test_any_question_stands_in_the_prompt_as_it_is(question: str) -> None:
    """Quotes, braces, backslashes and control tokens of a user are text to the template."""
    assert prompt_text(TEMPLATE, question) == f"{INTRO}### Instruction:\n{question}\n\n### Response: "


def test_input_is_joined_to_the_instruction_with_a_newline() -> None:
    assert question_of({"instruction": "写出反义词。", "input": "大", "output": "小"}) == "写出反义词。\n大"
    assert question_of({"instruction": "写诗。", "input": "", "output": "x"}) == "写诗。"
    assert question_of({"instruction": "写诗。", "output": "x"}) == "写诗。"


def test_an_unknown_template_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'chinese-alpacca' is unknown \(did you mean 'chinese-alpaca'\?\)"):
        find_template("chinese-alpacca")
    with pytest.raises(UserError, match=r"'xyz' is unknown; known are chinese-alpaca"):
        find_template("xyz")


def test_prompt_ids_are_bos_and_what_sentencepiece_gives(tuned: Any, tokenizer: Path) -> None:
    spm = encoder(read_model(tokenizer / "tokenizer.model"))
    ids = prompt_ids(tuned, TEMPLATE, "你好")
    assert ids == [spm.bos_id(), *spm.encode(prompt_text(TEMPLATE, "你好"))]


@settings(max_examples=50, deadline=None)
@given(question=TEXTS, answer=TEXTS)
def test_the_answer_and_its_eos_are_learnt_and_nothing_else(tuned: Any, question: str, answer: str) -> None:
    made = sample(tuned, TEMPLATE, {"instruction": question, "input": "", "output": answer})
    prompt = prompt_ids(tuned, TEMPLATE, question)
    learnt = [label for label in made.labels if label != IGNORE]
    assert made.input_ids[: len(prompt)] == prompt
    assert made.labels == [IGNORE] * len(prompt) + made.input_ids[len(prompt) :]
    assert learnt == [*text_ids(tuned, answer), tuned.eos_token_id]


@settings(max_examples=50, deadline=None)
@given(question=TEXTS, answer=TEXTS)
def test_a_sample_holds_one_bos_and_one_eos_whatever_the_user_writes(
    tuned: Any, question: str, answer: str
) -> None:
    record = {"instruction": f"<s>{question}</s>", "input": "<unk>", "output": f"</s>{answer}<s>"}
    ids = sample(tuned, TEMPLATE, record).input_ids
    special = [index for index in ids if index in tuned.all_special_ids]
    assert special == [tuned.bos_token_id, tuned.eos_token_id]
    assert (ids[0], ids[-1]) == tuple(special)


def test_the_saved_template_gives_the_same_prompt_text(tuned: Any) -> None:
    messages = [{"role": "user", "content": "你好"}]
    assert tuned.chat_template == TEMPLATE
    text = tuned.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>" + prompt_text(TEMPLATE, "你好")


def test_the_saved_template_gives_the_same_prompt_ids_when_control_tokens_are_read(tuned: Any) -> None:
    """By default this tokenizer reads `<s>` as text, also the one that the template writes."""
    messages = [{"role": "user", "content": "中国的首都是哪里？"}]
    kwargs = {"split_special_tokens": False}
    ids = tuned.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, tokenizer_kwargs=kwargs
    )
    assert ids == prompt_ids(tuned, TEMPLATE, "中国的首都是哪里？")


def test_a_conversation_ends_each_answer_with_eos(tuned: Any) -> None:
    messages = [
        {"role": "user", "content": "问一"},
        {"role": "assistant", "content": "答一"},
        {"role": "user", "content": "问二"},
    ]
    text = tuned.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<s>{INTRO}### Instruction:\n问一\n\n### Response: 答一</s>\n\n"
        "### Instruction:\n问二\n\n### Response: "
    )
