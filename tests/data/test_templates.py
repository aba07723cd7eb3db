"""The published texts to the letter, their ids, what is learnt of them, and that users' texts stay texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.conversations import Message
from chinese_llama.data.templates import (
    IGNORE,
    TEMPLATES,
    Sample,
    find_template,
    fit_template,
    prompt_ids,
    samples,
    stop_ids,
)
from chinese_llama.model.load import load_tokenizer
from chinese_llama.model.resize import copy_tokenizer, save_chat_template
from chinese_llama.vocab.proto import encoder, read_model
from tests.data.published import (
    HELPFUL,
    INPUT_FIRST,
    INTRO,
    MARKERS,
    PUBLISHED,
    SYSTEM_FIRST,
    TWO_TURNS,
    assistant,
    system,
    user,
)

KINDS = ("sentencepiece", "byte-level")


def whole(tokenizer: Any, name: str, messages: list[Message]) -> Sample:
    return samples(tokenizer, fit_template(find_template(name), tokenizer), [messages])[0]


def expected(published: str, tokenizer: Any, encode: Callable[[str], list[int]]) -> Sample:
    """Ids, labels and ends from a published text with ‖ before answers, by a tokenizer's own library: text
    between control tokens is encoded as one, an answer is what it adds to its prompt; but after a prompt
    that ends in a space it is encoded apart."""
    text = published.replace("{s}", tokenizer.bos_token).replace("{e}", tokenizer.eos_token)
    controls = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    controls |= {
        token: tokenizer.convert_tokens_to_ids(token) for token in MARKERS if token in tokenizer.vocab
    }
    if "<|im_end|>" not in controls:  # eos ends every turn, bos comes first
        text = re.sub(r"<\|im_end\|>|<\|eot_id\|>", tokenizer.eos_token, text)
        text = text if text.startswith(tokenizer.bos_token) else tokenizer.bos_token + text
    made = Sample([], [])
    before, answering = "", False
    for part in re.split("(‖|" + "|".join(map(re.escape, controls)) + ")", text):
        if part == "‖":
            answering = True
            continue
        if part in controls:
            ids = [controls[part]]
        elif answering and before and not before.endswith(" "):
            ids = encode(before + part)[len(encode(before)) :]
        else:
            ids = encode(part)
        made.input_ids += ids
        made.labels += ids if answering else [IGNORE] * len(ids)
        if answering and part in controls:
            made.turns.append(len(made.input_ids))
            answering = False
        before = "" if part in controls else part
    end = made.turns[-1]
    return Sample(made.input_ids[:end], made.labels[:end], made.turns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "messages", "published"), PUBLISHED)
def test_texts_ids_and_what_is_learnt_are_the_published_ones(
    tokenizers: dict[str, Any], tokenizer: Path, kind: str, name: str, messages: Any, published: str
) -> None:
    used = tokenizers[kind]
    spm = encoder(read_model(tokenizer / "tokenizer.model"))

    def encode(text: str) -> list[int]:
        if kind == "sentencepiece":
            return spm.encode(text)
        return used.backend_tokenizer.encode(text, add_special_tokens=False).ids

    assert whole(used, name, messages) == expected(published, used, encode)
    if kind == "byte-level":
        text = published.replace("{s}", used.bos_token).replace("{e}", used.eos_token).replace("‖", "")
        assert used.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False) == text


def test_every_template_is_among_the_published_ones() -> None:
    assert {name for name, _, _ in PUBLISHED} == set(TEMPLATES)


@pytest.fixture(scope="module")
def llama(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The real LLaMA tokenizer, and SentencePiece's own encoder of it."""
    directory = tmp_path_factory.mktemp("llama")
    copy_tokenizer(data / "tokenizers" / "llama", directory)
    return load_tokenizer(directory), encoder(read_model(directory / "tokenizer.model"))


@pytest.mark.parametrize(("name", "messages", "published"), PUBLISHED)
def test_on_llamas_tokenizer_ids_are_the_published_ones(
    llama: tuple[Any, Any], name: str, messages: Any, published: str
) -> None:
    tokenizer, spm = llama
    assert whole(tokenizer, name, messages) == expected(published, tokenizer, spm.encode)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("chinese-alpaca", f"{INTRO}### Instruction:\n中国的首都是哪里？\n\n### Response: "),
        ("alpaca-2", f"[INST] <<SYS>>\n{HELPFUL}\n<</SYS>>\n\n中国的首都是哪里？ [/INST]"),
        ("ziya", "<human>:中国的首都是哪里？\n<bot>:"),
        ("belle", "Human: 中国的首都是哪里？\n\nAssistant: "),
    ],
)
@pytest.mark.parametrize("answer", ["北京。", "Beijing is.", "1) 北京", "\n北京", "</s>"])
def test_these_models_were_trained_on_prompt_and_answer_tokenised_apart(
    llama: tuple[Any, Any], name: str, prompt: str, answer: str
) -> None:
    """With bos before the prompt and eos after the answer, as their published code does."""
    tokenizer, spm = llama
    made = whole(tokenizer, name, [user("中国的首都是哪里？"), assistant(answer)])
    question = [spm.bos_id(), *spm.encode(prompt)]
    learnt = [*spm.encode(answer), spm.eos_id()]
    assert made == Sample(question + learnt, [IGNORE] * len(question) + learnt, [len(question + learnt)])


def test_ids_of_a_chinese_alpaca_sample_on_llamas_tokenizer(llama: tuple[Any, Any]) -> None:
    made = whole(llama[0], "chinese-alpaca", [user("你好"), assistant("您好")])
    assert made.input_ids[0] == 1 and made.input_ids[-1] == 2
    shown = llama[0].convert_ids_to_tokens(made.input_ids)
    assert shown[-17:] == [
        ":", "<0x0A>", "你", "好", "<0x0A>", "<0x0A>", "##", "#", "▁Response", ":", "▁",
        "▁", "<0xE6>", "<0x82>", "<0xA8>", "好", "</s>",
    ]  # fmt: skip
    assert [label != IGNORE for label in made.labels[-17:]] == [False] * 11 + [True] * 6


# Texts with control tokens, markers of templates, white space and characters of several tokens.
PARTS = [
    "<s>", "</s>", "<unk>", "<|begin|>", "<|end|>", *MARKERS, "[INST]", "[/INST]", "### Response: ", "ASSISTANT:",
    "{{ eos_token }}", "{%", " ", "  ", "\n", "\t", "中国", "的首都", "答", "😀", "é", "a", "The ", "1", ":", "▁", "\\n", "'",
    "\x1f", "\ue000", "\U000f0000",
]  # fmt: skip
NAMES = st.sampled_from(sorted(TEMPLATES))
TEXTS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join)


@st.composite
def talks(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> list[Message]:
    """A conversation, some of its questions with an input, and a system message or none."""
    messages = [system(draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        question, given = draw(texts), draw(texts)
        with_input = {**user(f"{question}\n{given}"), "instruction": question, "input": given}
        messages += [draw(st.sampled_from([user(question), with_input])), assistant(draw(texts))]
    return messages


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(name=NAMES, messages=talks())
def test_samples_begin_with_their_prompts_and_exactly_answers_and_their_ends_are_learnt(
    tokenizers: dict[str, Any], name: str, kind: str, messages: list[Message]
) -> None:
    tokenizer = tokenizers[kind]
    template = fit_template(find_template(name), tokenizer)
    made = samples(tokenizer, template, [messages])[0]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [prompt_ids(tokenizer, template, messages[:index]) for index in answers]
    learnt = [False] * len(made.input_ids)
    for prompt, end in zip(prompts, made.turns, strict=True):
        assert made.input_ids[: len(prompt)] == prompt
        assert len(prompt) < end and made.input_ids[end - 1] in stop_ids(tokenizer, template)
        learnt[len(prompt) : end] = [True] * (end - len(prompt))
    wanted = [one if is_learnt else IGNORE for one, is_learnt in zip(made.input_ids, learnt, strict=True)]
    assert made.labels == wanted and made.turns[-1] == len(made.input_ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(name=NAMES, messages=talks())
def test_control_tokens_in_users_texts_stay_text(
    tokenizers: dict[str, Any], name: str, kind: str, messages: list[Message]
) -> None:
    """A conversation has the control tokens of one of the same shape with plain texts, in the same order."""
    tokenizer = tokenizers[kind]
    plain = [{name: "a" if name != "role" else text for name, text in m.items()} for m in messages]
    controls = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [
        [index for index in whole(tokenizer, name, one).input_ids if index in controls]
        for one in (messages, plain)
    ]
    if kind == "sentencepiece":  # byte fallback: whatever is not in the vocabulary is bytes, never <unk>
        assert tokenizer.unk_token_id not in found[0]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(name=NAMES, content=TEXTS)
def test_any_text_stands_in_the_prompt_as_it_is(
    tokenizers: dict[str, Any], name: str, kind: str, content: str
) -> None:
    tokenizer = tokenizers[kind]
    template = fit_template(find_template(name), tokenizer)
    told = tokenizer.decode(prompt_ids(tokenizer, template, [user(content)]))
    if kind == "sentencepiece":
        content = content.replace("▁", " ")  # SentencePiece's own mark for a space
    assert (content.strip() if name == "llama-3" else content) in told


# What is between control tokens goes to the tokenizer as one text there, so an answer's first token may join
# with the end of its prompt: after a space always, after a colon (stanford-alpaca) in byte-level words.
JOINED = {("chinese-alpaca", kind) for kind in KINDS} | {("belle", kind) for kind in KINDS}
JOINED |= {("stanford-alpaca", "byte-level")}
WORDS = st.lists(st.sampled_from(["中国", "答", "The", "a b", "1,\n\n2", "😀", "。", "é"]), min_size=1).map(
    "".join
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(name=NAMES, messages=talks(WORDS))
def test_other_programs_get_the_same_ids_from_the_saved_template(
    tokenizers: dict[str, Any], name: str, kind: str, messages: list[Message]
) -> None:
    tokenizer = tokenizers[kind]
    template = fit_template(find_template(name), tokenizer)
    options = {
        "chat_template": template,
        "return_dict": False,
        "tokenizer_kwargs": {"split_special_tokens": False},
    }
    first = messages[: next(n for n, message in enumerate(messages) if message["role"] == "assistant")]
    theirs = tokenizer.apply_chat_template(first, add_generation_prompt=True, **options)
    assert theirs == prompt_ids(tokenizer, template, first), "a prompt without a history is always the same"
    if (name, kind) not in JOINED:
        ours = samples(tokenizer, template, [messages])[0].input_ids
        theirs = tokenizer.apply_chat_template(messages, **options)
        assert theirs[: len(ours)] == ours
        asked = messages[:-1]
        theirs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
        assert theirs == prompt_ids(tokenizer, template, asked)


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"chinese-alpaca", "belle"}))
def test_on_llamas_tokenizer_other_programs_get_the_same_ids(llama: tuple[Any, Any], name: str) -> None:
    tokenizer, _ = llama
    template = fit_template(find_template(name), tokenizer)
    for messages in (TWO_TURNS, SYSTEM_FIRST, [*INPUT_FIRST, *TWO_TURNS]):
        ours = samples(tokenizer, template, [messages])[0].input_ids
        kwargs = {"split_special_tokens": False}
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=False, tokenizer_kwargs=kwargs
        )
        assert theirs[: len(ours)] == ours


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_saved_tokenizer_asks_as_training_did(
    tokenizers: dict[str, Any], tokenizer: Path, tmp_path: Path, name: str
) -> None:
    """Nothing but the directory: its template, and that it reads the control tokens the template writes."""
    template = fit_template(find_template(name), tokenizers["sentencepiece"])
    copy_tokenizer(tokenizer, tmp_path)
    save_chat_template(tmp_path, template)
    saved = load_tokenizer(tmp_path)
    assert saved.chat_template == template
    ids = saved.apply_chat_template([user("你好")], add_generation_prompt=True, return_dict=False)
    assert ids == prompt_ids(tokenizers["sentencepiece"], template, [user("你好")])


@pytest.mark.parametrize("kind", KINDS)
def test_many_conversations_at_once_are_as_each_alone(tokenizers: dict[str, Any], kind: str) -> None:
    talks = [messages for _, messages, _ in PUBLISHED] * 2
    for name in TEMPLATES:
        template = fit_template(find_template(name), tokenizers[kind])
        one_by_one = [samples(tokenizers[kind], template, [messages])[0] for messages in talks]
        assert samples(tokenizers[kind], template, talks) == one_by_one
    assert samples(tokenizers[kind], TEMPLATES["vicuna"], []) == []


def test_white_space_that_a_template_trims_is_trimmed(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["byte-level"]
    spaced = [user(" \n问一 "), assistant("\n 答一\n")]
    assert whole(tokenizer, "llama-3", spaced) == whole(
        tokenizer, "llama-3", [user("问一"), assistant("答一")]
    )
    assert whole(tokenizer, "chatml", spaced) != whole(tokenizer, "chatml", [user("问一"), assistant("答一")])
    left = "{% for m in messages %}{{ m['content'].lstrip() + eos_token }}{% endfor %}"
    found = samples(tokenizer, left, [[*spaced, user(" a "), assistant(" a ")]])[0]
    assert tokenizer.decode(found.input_ids) == "问一 <|end|>答一\n<|end|>a <|end|>a <|end|>"


def test_a_tokenizer_that_lacks_the_end_of_turn_writes_eos_instead(tokenizers: dict[str, Any]) -> None:
    lacking, having = tokenizers["sentencepiece"], tokenizers["byte-level"]
    for name, token in (("chatml", "<|im_end|>"), ("llama-3", "<|eot_id|>")):
        template = find_template(name)
        assert token in template and fit_template(template, having) == template
        fitted = fit_template(template, lacking)
        assert token not in fitted and "</s>" in fitted and fitted.count("bos_token") == 1
        assert fit_template(fitted, lacking) == fitted
        assert stop_ids(lacking, fitted) == [lacking.eos_token_id]
        assert stop_ids(having, template) == [having.eos_token_id, having.convert_tokens_to_ids(token)]
    for name in set(TEMPLATES) - {"chatml", "llama-3"}:
        assert fit_template(find_template(name), lacking) == find_template(name)
        assert stop_ids(lacking, find_template(name)) == [lacking.eos_token_id]
