"""Templates of one's own, and those that cannot be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chinese_llama.data.templates import (
    IGNORE,
    Sample,
    find_template,
    prompt_ids,
    samples,
    stop_ids,
    text_ids,
)
from chinese_llama.errors import BadFile, UserError
from chinese_llama.model.load import load_tokenizer
from tests import tiny
from tests.data.published import (
    TWO_TURNS,
    assistant,
    user,
)

# What a template of one's own may do: think before it answers, use control tokens as text and the other way.
OWN = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|begin|>Q: ' + m.content + '\\n' }}
{%- elif m.role == 'assistant' %}{{ 'A:<|pad|>\\n\\n' + m.content | trim + '\\n<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}A:{% endif %}
"""


def test_a_template_of_ones_own_from_a_file(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(OWN, encoding="utf-8")
    template = find_template(str(tmp_path / "own.jinja"))
    assert template == OWN
    tokenizer = tokenizers["byte-level"]
    made = samples(tokenizer, template, [[user("问<|end|>"), assistant(" 答 ")]])[0]
    end, pad, begin = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|pad|>", "<|begin|>")
    )
    prompt = [begin, *text_ids(tokenizer, "Q: 问<|end|>\nA:")]
    learnt = [pad, *text_ids(tokenizer, "\n\n答\n"), end]
    assert made == Sample(prompt + learnt, [IGNORE] * len(prompt) + learnt, [len(prompt + learnt)])


def test_a_control_token_that_begins_with_another_is_read_whole(tmp_path: Path) -> None:
    backend = tiny.byte_level()
    backend.add_special_tokens(["<|end|><|x|>"])
    tokenizer = load_tokenizer(tiny.write_byte_level(tmp_path, backend))
    template = "{% for m in messages %}{{ m.content + '<|end|><|x|>' }}{% endfor %}"
    (made,) = samples(tokenizer, template, [[user("a"), assistant("b")]])
    assert tokenizer.convert_ids_to_tokens(made.input_ids) == ["a", "<|end|><|x|>", "b", "<|end|><|x|>"]
    assert stop_ids(tokenizer, template) == [tokenizer.eos_token_id, made.input_ids[-1]]


WRONG = [
    ("{{ messages[0].content", r"cannot be rendered \(unexpected end"),
    ("{{ raise_exception('system first') }}", r"cannot be rendered \(system first\)"),
    ("{{ messages[0].content + 1 }}", r"cannot be rendered"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", r"no control token after an answer, .*eos_token"),
    ("{% for m in messages %}{{ bos_token + m.content }}{% endfor %}{{ '' if add_generation_prompt else eos_token }}",
     r"no control token after an answer"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content + eos_token }}{% endfor %}", r"no control token after"),
    ("{% for m in messages %}{{ m.content + (eos_token if loop.last else '') }}{% endfor %}", r"something else before"),
    ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}{{ eos_token }}", r"something else before an answer"),
    ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{{ 'A:' if add_generation_prompt }}",
     r"something else before an answer than where it asks for one \(add_generation_prompt\)"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "message"), WRONG)
def test_a_template_that_teaches_something_else_than_it_asks_is_told(
    tokenizers: dict[str, Any], template: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        samples(tokenizers["byte-level"], template, [TWO_TURNS])


def test_a_template_whose_answers_do_not_end_one_by_one_is_told(tokenizers: dict[str, Any]) -> None:
    """The eos after the last answer is not the end of the first."""
    template = (
        "{% for m in messages %}{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="no control token after an answer"):
        samples(tokenizers["byte-level"], template, [TWO_TURNS])


def test_generation_does_not_need_a_template_that_is_fit_for_training(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["byte-level"]
    template = "{% for m in messages %}{{ 'Q:' + m.content }}{% endfor %}A:"
    assert prompt_ids(tokenizer, template, [user("问")]) == text_ids(tokenizer, "Q:问A:")
    assert stop_ids(tokenizer, template) == [tokenizer.eos_token_id]


def test_an_unknown_template_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'chinese-alpacca' is unknown \(did you mean 'chinese-alpaca'\?\)"):
        find_template("chinese-alpacca")
    with pytest.raises(UserError, match=r"'xyz' is unknown; known are alpaca-2, .*, or give a \.jinja file"):
        find_template("xyz")


def test_a_template_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"gone\.jinja: cannot be read \(No such file"):
        find_template(str(tmp_path / "gone.jinja"))
    (tmp_path / "a.jinja").write_bytes("{{ '答' }}".encode("gb18030"))
    with pytest.raises(BadFile, match=r"a\.jinja: is not UTF-8"):
        find_template(str(tmp_path / "a.jinja"))
