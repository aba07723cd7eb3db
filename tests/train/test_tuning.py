"""Instruction tuning end to end: formats, templates, what is dropped, what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.adapt.launch import recipe
from chinese_llama.artifacts import read_manifest
from chinese_llama.data.published import TEMPLATES
from chinese_llama.data.templates import fit_template, prompt_ids
from chinese_llama.errors import BadFile, UserError
from chinese_llama.merging.plan import Step, load
from chinese_llama.merging.stream import merge
from chinese_llama.model.load import load_tokenizer
from chinese_llama.model.resize import extend_model
from tests import tiny
from tests.train.running import losses

TURNS = [
    {"from": "human", "value": "你好"},
    {"from": "gpt", "value": "你好！"},
    {"from": "human", "value": "中国的首都是哪里？"},
    {"from": "gpt", "value": "北京。"},
]
MESSAGES = [{"role": "user", "content": "大的反义词？"}, {"role": "assistant", "content": "小。"}]


@pytest.fixture(scope="module")
def extended(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extended pico model that reads long prompts."""
    folder = tmp_path_factory.mktemp("roomy")
    tiny.write_base(folder / "base", tiny.base_tokenizer(), max_position_embeddings=512)
    extend_model(folder / "base", tokenizer, folder / "extended")
    return folder / "extended"


def write(path: Path, records: list[Any]) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tune(base: Path, data: Any, output: Path, *more: str) -> Path:
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps({"data": data}, default=str), encoding="utf-8")
    recipe("sft_lora").main(
        [
            *("--config", str(config), "--model_name_or_path", str(base), "--output_dir", str(output)),
            *("--max_seq_length", "256", "--max_steps", "6", "--logging_steps", "1", "--lora_r", "4"),
            *("--per_device_train_batch_size", "2", "--learning_rate", "1e-2", *more),
        ]
    )
    return output


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_template_is_learnt_and_asks_elsewhere_as_it_was_taught(
    name: str, extended: Path, tmp_path: Path
) -> None:
    """The tokenizer that is saved gives other programs the ids that training began its answers after."""
    data = write(tmp_path / "chats.jsonl", [{"conversations": TURNS}] * 12)
    made = tune(extended, data, tmp_path / "a", "--template", name)
    found = losses(made)
    assert found[-1] < found[0] - 0.5
    tokenizer = load_tokenizer(made)
    question = [{"role": "user", "content": "中国的首都是哪里？"}]
    template = fit_template(TEMPLATES[name], load_tokenizer(extended))
    assert tokenizer.chat_template == template
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    assert ids == prompt_ids(load_tokenizer(extended), template, question)  # type: ignore[arg-type]


def test_formats_are_mixed_by_weight_and_what_is_dropped_is_told(extended: Path, tmp_path: Path) -> None:
    long = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "很长。" * 400}]
    data = [
        {"path": write(tmp_path / "a.jsonl", [{"conversations": TURNS}] * 20), "weight": 0.75},
        {
            "path": write(tmp_path / "b.jsonl", [{"messages": MESSAGES}] * 20),
            "weight": 0.25,
            "format": "openai",
        },
    ]
    write(tmp_path / "a.jsonl", [{"conversations": TURNS}] * 20 + [{"conversations": long}])
    made = tune(extended, data, tmp_path / "out", "--template", "ziya")
    manifest = read_manifest(made)
    assert manifest is not None
    first, second = manifest.metrics["sources"]
    assert (first["weight"], second["weight"]) == (0.75, 0.25)
    assert sum(first["dropped"].values()) == 1 and not any(second["dropped"].values())
    assert "| a | 0.75 |" in (made / "run.md").read_text(encoding="utf-8")


def test_a_malformed_record_stops_or_is_counted(extended: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 12)
    with open(data, "a", encoding="utf-8") as stream:
        stream.write('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(BadFile, match=r"a\.jsonl, line 13"):
        tune(extended, data, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()
    made = tune(extended, data, tmp_path / "out", "--bad_records", "skip")
    manifest = read_manifest(made)
    assert manifest is not None
    assert sum(manifest.metrics["sources"][0]["dropped"].values()) == 1


def test_a_template_is_a_name_or_a_file(extended: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 12)
    with pytest.raises(UserError, match="did you mean 'chatml'"):
        tune(extended, data, tmp_path / "out", "--template", "chatlm")
    own = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A:{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    (tmp_path / "own.jinja").write_text(own, encoding="utf-8")
    made = tune(extended, data, tmp_path / "out", "--template", str(tmp_path / "own.jinja"))
    assert load_tokenizer(made).chat_template == own


def test_a_merged_model_says_what_ends_an_answer(extended: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 12)
    made = tune(extended, data, tmp_path / "a", "--template", "vicuna")
    merge(extended, [Step([load("a", made)])], tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == load_tokenizer(made).eos_token_id
    manifest = read_manifest(made)
    assert manifest is not None
    assert manifest.metrics["stop_ids"] == [settings["eos_token_id"]]
