"""Activation checkpointing through a recipe: the same adapter, from fewer bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from chinese_llama.errors import UserError
from tests.train.running import losses, pretrain, tensors

pytestmark = pytest.mark.skipif(
    "activation_checkpointing" not in {field.name for field in dataclasses.fields(TrainingArguments)},
    reason="this transformers has gradient_checkpointing only",
)
SHORT = ["--max_steps", "3", "--lora_dropout", "0.1"]


@pytest.fixture(scope="module")
def plain(extended: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(extended, work / "zh.jsonl", tmp_path_factory.mktemp("plain") / "out", *SHORT)


def assert_same(found: Path, wanted: Path) -> None:
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-6)
    for name, tensor in tensors(wanted).items():
        torch.testing.assert_close(tensors(found)[name], tensor, atol=1e-6, rtol=1e-5)


def test_every_second_layer_gives_the_same_adapter(
    plain: Path, extended: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, and from a file."""
    ran = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*given: Any, **named: Any) -> Any:
        ran.append(named)
        return checkpoint(*given, **named)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    words = ["--activation_checkpointing", "true"]
    words += ["--activation_checkpointing_kwargs", "{every_n_layers: 2, use_reentrant: false}"]
    assert_same(pretrain(extended, work / "zh.jsonl", tmp_path / "words", *SHORT, *words), plain)
    assert len(ran) == 3 and ran[0] == {"use_reentrant": False}, "one of two layers, in three steps"
    file = tmp_path / "run.yaml"
    file.write_text("activation_checkpointing: true\nactivation_checkpointing_kwargs:\n  every_n_layers: 1\n")
    out = pretrain(extended, work / "zh.jsonl", tmp_path / "file", *SHORT, "--config", str(file))
    assert_same(out, plain)
    assert len(ran) == 3 + 3 * 2


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ("{offload: true}", "offload needs a GPU"),
        ("{every_n_layers: 0}", "every_n_layers: 0 is not a number of layers"),
        ("some", "activation_checkpointing_kwargs: 'some' is no mapping"),
        ("{every_n_layers: two}", "every_n_layers: 'two' is not a number of layers"),
    ],
)
def test_what_cannot_be_is_refused(
    kwargs: str, told: str, extended: Path, work: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        pretrain(
            *(extended, work / "zh.jsonl", tmp_path / "out", "--activation_checkpointing", "true"),
            *("--activation_checkpointing_kwargs", kwargs, "--use_cpu", "true"),
        )
    assert not (tmp_path / "out.run").exists()
