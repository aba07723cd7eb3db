"""The conversation in the terminal: what is remembered, what is forgotten, how it ends."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.data.templates import find_template, prompt_ids
from chinese_llama.evaluate import chat as module
from chinese_llama.evaluate.chat import chat, newest
from chinese_llama.evaluate.generate import stream
from chinese_llama.model.load import load_model, load_tokenizer

TEMPLATE = find_template("ziya")
BYTES = range(3, 259)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """The pico base, its bytes and eos made unlikely, so that it says the same number of tokens each time."""
    import torch

    model = load_model(base, "float32")
    with torch.no_grad():
        model.lm_head.weight[[2, *BYTES]] = 0
    return model


class Terminal:
    """Types the lines, and keeps the ids that the model was given."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.asked = patch, []

    def talk(self, model: Any, tokenizer: Any, *lines: str, tokens: int = 4) -> None:
        left = iter(lines)

        def typed(prompt: str) -> str:
            assert prompt == "> "
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        def watched(model: Any, tokenizer: Any, ids: list[int], *rest: Any) -> Any:
            self.asked.append(ids)
            return stream(model, tokenizer, ids, *rest)

        self.patch.setattr(builtins, "input", typed)
        self.patch.setattr(module, "stream", watched)
        chat(model, tokenizer, tokens, 0.0)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_the_conversation_is_remembered_until_new(
    terminal: Terminal, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.talk(model, tokenizer, "The fox", " the dog ", "/new", "The fox", "")
    first, second, afresh = terminal.asked
    said = capsys.readouterr().out.splitlines()
    assert first == afresh == prompt_ids(tokenizer, TEMPLATE, messages("The fox"))
    assert second == prompt_ids(tokenizer, TEMPLATE, messages("The fox", said[0].strip(), "the dog"))
    assert len(said) == 3 and said[0] == said[2] and all(line.strip() for line in said)


@pytest.mark.parametrize("lines", [(), ("",), ("  ", "never asked")])
def test_an_empty_line_and_the_end_end_it(
    terminal: Terminal, model: Any, tokenizer: Any, lines: tuple[str, ...]
) -> None:
    terminal.talk(model, tokenizer, *lines)
    assert terminal.asked == []


def test_the_oldest_turns_are_forgotten_when_the_model_is_full_and_it_says_so(
    terminal: Terminal, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = model.config.max_position_embeddings
    terminal.talk(model, tokenizer, *["The quick brown fox"] * 5, tokens=8)
    assert all(len(ids) + 8 <= limit for ids in terminal.asked)
    assert len(terminal.asked[1]) > len(terminal.asked[0])
    said = capsys.readouterr().out.splitlines()
    told = [line for line in said if line.startswith("(Forgotten:")]
    assert told and told[0].endswith(f"answers; the model holds {limit} tokens.)")
    assert len(said) == 5 + len(told)


def test_a_question_that_is_too_long_is_told_and_the_conversation_goes_on(
    terminal: Terminal, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.talk(model, tokenizer, "The fox", "fox " * 200, "the dog")
    said = capsys.readouterr().out.splitlines()
    assert "The prompt is too long" in said[1]
    assert terminal.asked[2] == prompt_ids(
        tokenizer, TEMPLATE, messages("The fox", said[0].strip(), "the dog")
    )


def test_a_base_model_continues_each_text_alone(terminal: Terminal, model: Any, base: Path) -> None:
    plain = load_tokenizer(base)
    terminal.talk(model, plain, "The fox", "the dog")
    texts = [plain.decode(ids, skip_special_tokens=True) for ids in terminal.asked]
    assert texts == ["The fox", "the dog"]


def test_newest_keeps_whole_turns_and_the_last_question_in_any_case(tokenizer: Any) -> None:
    talk = messages("one", "two", "three", "four", "five")
    lengths = {n: len(prompt_ids(tokenizer, TEMPLATE, talk[n:])) for n in (0, 2, 4)}
    for room in range(1, lengths[0] + 2):
        ids, kept = newest(tokenizer, TEMPLATE, talk, room)
        start = next((n for n in (0, 2) if lengths[n] <= room), 4)
        assert kept == talk[start:] and ids == prompt_ids(tokenizer, TEMPLATE, kept)
