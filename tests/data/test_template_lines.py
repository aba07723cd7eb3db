"""A template's own lines are tokenised once, where that gives the ids of the whole text; elsewhere they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.data.templates import IGNORE, prompt_ids, samples, text_ids
from chinese_llama.model.load import load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '\n\nThe  first line.\n中国 Q: ' + m.content + ' ?\n\n# a\n' + m.content | trim + '\n### A:\n' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
CHARACTERS = st.sampled_from("\n\n\n  ▁ab中国\r\t\x1f\x85\u2028\ue000😀<>0xA") | st.characters(
    exclude_categories=["Cs"]
)
TEXTS = st.lists(CHARACTERS, max_size=20).map("".join)


def written(question: str) -> str:
    return f"\n\nThe  first line.\n中国 Q: {question} ?\n\n# a\n{question.strip()}\n### A:\n"


@settings(max_examples=150, deadline=None)
@given(question=TEXTS, answer=TEXTS)
def test_ids_are_those_of_the_whole_text(fast: Any, question: str, answer: str) -> None:
    asked = {"role": "user", "content": question}
    prompt = [fast.bos_token_id, *text_ids(fast, written(question))]
    assert prompt_ids(fast, TEMPLATE, [asked]) == prompt
    made = samples(fast, TEMPLATE, [[asked, {"role": "assistant", "content": answer}]])[0]
    ids = [fast.bos_token_id, *text_ids(fast, written(question) + answer), fast.eos_token_id]
    assert made.input_ids == ids
    assert made.labels == [IGNORE] * len(prompt) + ids[len(prompt) :]


def test_what_a_template_writes_around_no_text(fast: Any) -> None:
    """The dummy prefix stands before the line break then."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + '\n|\n' + m.content }}{% endfor %}"
    for content in ("", " ", "\n", "x"):
        ids = [fast.bos_token_id, *text_ids(fast, f"{content}\n|\n{content}")]
        assert prompt_ids(fast, template, [{"role": "user", "content": content}]) == ids


def _piece(content: dict[str, Any], piece: str) -> None:
    content["model"]["vocab"].setdefault(piece, len(content["model"]["vocab"]))


def a_piece_over_lines(content: dict[str, Any]) -> None:
    for piece in ("\n", "\n\n"):
        _piece(content, piece)
    content["model"]["merges"].insert(0, ["\n", "\n"])


def a_merge_of_bytes(content: dict[str, Any]) -> None:
    _piece(content, "<0x0A><0x0A>")
    content["model"]["merges"].insert(0, ["<0x0A>", "<0x0A>"])


def a_token_in_texts(content: dict[str, Any]) -> None:
    _piece(content, "a\n")
    token = {"id": content["model"]["vocab"]["a\n"], "content": "a\n", "special": False, "normalized": False}
    content["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": True})


def fewer_line_breaks(content: dict[str, Any]) -> None:
    step = {"type": "Replace", "pattern": {"Regex": "\\s*\n\\s*"}, "content": "\n"}
    content["normalizer"]["normalizers"].insert(0, step)


def no_spaces_at_the_end(content: dict[str, Any]) -> None:
    content["normalizer"]["normalizers"].insert(
        0, {"type": "Strip", "strip_left": False, "strip_right": True}
    )


def line_breaks_with_what_follows(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "\\n."}, "behavior": "Isolated", "invert": False
    }  # fmt: skip


CHANGES = [
    a_piece_over_lines,
    a_merge_of_bytes,
    a_token_in_texts,
    fewer_line_breaks,
    no_spaces_at_the_end,
    line_breaks_with_what_follows,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_tokenizer_that_looks_over_line_breaks_is_given_whole_texts(
    tokenizer: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    shutil.copytree(tokenizer, tmp_path / "changed")
    file = tmp_path / "changed" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    changed = load_tokenizer(tmp_path / "changed")
    for question in ("问", " a ", "a\nb"):
        wanted = [changed.bos_token_id, *text_ids(changed, written(question))]
        assert prompt_ids(changed, TEMPLATE, [{"role": "user", "content": question}]) == wanted
