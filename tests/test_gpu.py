"""What only a GPU shows; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chinese_llama.adapt.launch import recipe
from chinese_llama.evaluate.models import Subject
from chinese_llama.evaluate.run import Request, measure
from chinese_llama.merging.plan import Step, load
from chinese_llama.merging.stream import merge
from chinese_llama.model.resize import extend_model
from chinese_llama.train.callbacks import read_log
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("embeddings", ["new-rows", "full", "frozen"])
def test_training_in_bfloat16_learns_and_merges(
    embeddings: str, extended: Path, work: Path, tmp_path: Path
) -> None:
    recipe("pt_lora").main(
        [
            *("--model_name_or_path", str(extended), "--data", str(work / "zh.jsonl"), "--lora_r", "8"),
            *("--output_dir", str(tmp_path / "plus"), "--block_size", "64", "--max_steps", "30"),
            *("--learning_rate", "1e-2", "--embeddings", embeddings, "--logging_steps", "10"),
        ]
    )
    tensors = load_file(tmp_path / "plus" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    merge(extended, [Step([load("plus", tmp_path / "plus")])], tmp_path / "merged")
    before, after = (
        measure(Subject("m", str(place)), Request({"zh": work / "zh.jsonl"}))["texts"]["zh"][
            "bits_per_character"
        ]
        for place in (extended, tmp_path / "merged")
    )
    assert after < before - 0.2


@pytest.mark.parametrize(
    "more",
    [
        ["--quantization", "nf4", "--gradient_checkpointing", "true", "--optim", "paged_adamw_8bit"],
        ["--quantization", "int8"],
        ["--dtype", "float16"],
        ["--gradient_checkpointing", "true", "--use_dora", "true"],
    ],
)
def test_what_saves_memory_learns_too(more: list[str], tokenizer: Path, work: Path, tmp_path: Path) -> None:
    tiny.write_base(tmp_path / "base", tiny.base_tokenizer(), hidden_size=64, intermediate_size=128)
    extend_model(tmp_path / "base", tokenizer, tmp_path / "extended")
    recipe("pt_lora").main(
        [
            *("--model_name_or_path", str(tmp_path / "extended"), "--data", str(work / "zh.jsonl")),
            *("--output_dir", str(tmp_path / "plus"), "--block_size", "64", "--max_steps", "30"),
            *("--learning_rate", "1e-2", "--logging_steps", "10", "--lora_r", "8", *more),
            *("--eval_text", f"zh={work / 'zh.jsonl'}"),
        ]
    )
    measured = [e["eval"]["zh"] for e in read_log(tmp_path / "plus" / "log.jsonl") if "eval" in e]
    assert measured[-1]["bits_per_character"] < measured[0]["bits_per_character"] - 0.2


def test_scores_are_those_of_the_cpu(extended: Path, work: Path) -> None:
    from chinese_llama.data.formats import documents
    from chinese_llama.model.load import load_model, load_tokenizer
    from tests.evaluate.scoring import evaluate_text

    tokenizer = load_tokenizer(extended)
    model = load_model(extended, "float32")
    figures = [
        evaluate_text(model.to(place), tokenizer, documents(work / "zh.jsonl"))["bits_per_byte"]
        for place in ("cpu", "cuda")
    ]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
