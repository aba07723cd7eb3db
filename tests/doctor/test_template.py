"""A made case for everything that can be wrong with a chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chinese_llama.artifacts import Manifest, write_manifest
from chinese_llama.data.published import TEMPLATES
from chinese_llama.data.templates import fit_template
from chinese_llama.doctor.finding import Finding
from chinese_llama.doctor.opened import open_tokenizer
from chinese_llama.doctor.template import check_template
from chinese_llama.doctor.things import Thing
from chinese_llama.model.load import load_tokenizer
from chinese_llama.model.resize import save_chat_template

CHATML = TEMPLATES["chatml"]
LOOP = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


@pytest.fixture
def place(tokenizer: Path, tmp_path: Path) -> Path:
    shutil.copytree(tokenizer, tmp_path / "model")
    return tmp_path / "model"


def findings(place: Path, thing: Thing | None = None) -> dict[str, Finding]:
    thing = thing or Thing(place, "model", "a model")
    return {one.check: one for one in check_template(open_tokenizer(place, []), thing)}


def with_template(place: Path, template: str) -> dict[str, Finding]:
    save_chat_template(place, template)
    return findings(place)


def add_tokens(place: Path, tokens: list[str], special: bool) -> None:
    file = place / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    size = max(content["model"]["vocab"].values()) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, token in enumerate(tokens):
        content["added_tokens"].append({"id": size + number, "content": token, **flags, "special": special})
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_templates_of_this_toolkit_are_healthy(place: Path, name: str) -> None:
    found = with_template(place, fit_template(TEMPLATES[name], load_tokenizer(place)))
    assert {one.severity for one in found.values()} <= {"note"}


def test_no_template_is_no_fault_of_a_base(place: Path) -> None:
    assert not findings(place)


def test_a_tuned_model_without_a_template(place: Path, tmp_path: Path) -> None:
    write_manifest(place, Manifest("adapter", "sft_lora"))
    assert findings(place, Thing(place, "adapter", "an adapter"))["no-template"].severity == "warning"
    assert not findings(place, Thing(place, "tokenizer", "a tokenizer"))
    (place / "chinese_llama.json").unlink()
    published = Thing(place, "adapter", "an adapter", {}, "chinese-alpaca-7b")
    assert "chinese-alpaca-7b" in findings(place, published)["no-template"].evidence[0]
    assert findings(place, published)["no-template"].severity == "note"  # a name proves nothing


def test_templates_that_cannot_be_rendered(place: Path) -> None:
    for template in ("{% for %}", "{{ nothing.at.all }}", "{{ raise_exception('no') }}"):
        assert with_template(place, template)["template-broken"].severity == "error"
    (place / "chat_template.jinja").write_bytes("你".encode("gb18030"))
    assert "UTF-8" in findings(place)["template-broken"].what


def test_a_template_that_drops_the_answer(place: Path) -> None:
    assert with_template(place, "{{ messages[0]['content'] }}")["template-drops-messages"].severity == "error"


def test_a_template_without_an_end(place: Path) -> None:
    assert with_template(place, LOOP)["template-without-end"].severity == "error"
    spelt = with_template(place, CHATML)["template-without-end"]
    assert "<|im_end|>" in spelt.what and "spelt as text" in spelt.what


def test_an_end_that_is_not_special(place: Path) -> None:
    add_tokens(place, ["<|im_start|>", "<|im_end|>"], special=False)
    assert with_template(place, CHATML)["template-end-not-special"].severity == "warning"


def test_generation_that_does_not_stop(place: Path) -> None:
    add_tokens(place, ["<|im_start|>", "<|im_end|>"], special=True)
    assert not with_template(place, CHATML)
    (place / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    assert findings(place)["generation-does-not-stop"].where.endswith("/config.json")
    size = len(load_tokenizer(place))
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, size - 1]}))
    assert not findings(place)
    (place / "generation_config.json").write_text('{"eos_token_id": 2}')
    found = findings(place)["generation-does-not-stop"]
    assert found.severity == "error"
    assert f"[2, {size - 1}]" in found.remedy


def test_markers_that_are_spelt_as_text(place: Path) -> None:
    found = with_template(place, fit_template(CHATML, load_tokenizer(place)))
    assert found["template-tokens-as-text"].severity == "note"
    assert "<|im_start|>" in found["template-tokens-as-text"].evidence[0]


def test_a_prompt_that_is_not_what_stands_before_answers(place: Path) -> None:
    template = LOOP + "{{ eos_token }}{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}"
    assert with_template(place, template)["template-prompt-differs"].severity == "warning"


def test_a_template_without_a_generation_prompt(place: Path) -> None:
    found = with_template(place, LOOP.replace("}}{% endfor", "+ eos_token }}{% endfor"))
    assert "assistant: " in found["template-without-prompt"].evidence[0]


def test_two_templates(place: Path) -> None:
    good = TEMPLATES["chinese-alpaca"]
    save_chat_template(place, good)
    file = place / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for other, told in (
        (good + "\n", False),
        (TEMPLATES["belle"], True),
        ([{"name": "default", "template": "x"}], True),
    ):
        file.write_text(json.dumps(config | {"chat_template": other}), encoding="utf-8")
        assert ("templates-differ" in findings(place)) is told
