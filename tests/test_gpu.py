"""What only a GPU shows; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chinese_llama.adapt.launch import recipe
from chinese_llama.evaluate.generate import answer_all, model_input
from chinese_llama.evaluate.models import Subject
from chinese_llama.evaluate.run import Request, measure
from chinese_llama.merging.plan import Step, load
from chinese_llama.merging.stream import merge
from chinese_llama.model.load import load_model, load_tokenizer
from chinese_llama.model.resize import extend_model
from chinese_llama.train.log import read_log
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
        [
            *("--activation_checkpointing", "true"),
            *("--activation_checkpointing_kwargs", "{offload: true, every_n_layers: 2}"),
        ],
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


def test_batched_answers_are_those_given_alone(extended: Path) -> None:
    """In float32: in bfloat16 a batch may decide a near tie otherwise."""
    model, tokenizer = load_model(extended, "float32").to("cuda"), load_tokenizer(extended)
    prompts = [model_input(tokenizer, text) for text in ("The", "中国的首都是哪里", "fox " * 9)]
    alone = [text for ids in prompts for _, text in answer_all(model, tokenizer, [ids], 12, 0.0, [0])]
    assert [text for _, text in sorted(answer_all(model, tokenizer, prompts, 12, 0.0, [0] * 3))] == alone


def test_the_packed_kernel_agrees_here() -> None:
    from chinese_llama.model.attention import probe

    for dtype in (torch.bfloat16, torch.float16):
        for heads, groups, dim in ((32, 32, 128), (32, 8, 128), (4, 2, 8)):
            assert probe(torch.device("cuda"), dtype, heads, groups, dim) == ""


@pytest.mark.parametrize("embeddings", ["new-rows", "full", "frozen"])
def test_a_lean_model_learns_as_on_the_cpu(embeddings: str) -> None:
    """In float32 to rounding; in bfloat16 as near to that as PEFT."""
    from chinese_llama.data.templates import IGNORE
    from tests.model.test_lean import batch, check_same, learn, pair

    torch.backends.cuda.matmul.allow_tf32 = False
    exact = learn(pair(embeddings)[1])
    on_gpu = {name: tensor.cuda() for name, tensor in batch().items()}
    ours = pair(embeddings)[1].cuda()
    learnt = int((batch()["labels"][:, 1:] != IGNORE).sum())
    loss = ours(**on_gpu, learnt=learnt).loss
    loss.backward()
    found = {name: p.grad.cpu() for name, p in ours.named_parameters() if p.requires_grad}
    check_same((loss.detach().cpu(), found), exact, rtol=1e-3, atol=1e-4)
    far = []
    for model in pair(embeddings, dtype=torch.bfloat16):
        model.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            model(**on_gpu).loss.backward()
        found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
        far.append(sum(float((g - exact[1][n]).square().sum()) for n, g in found.items()) ** 0.5)
    assert far[1] < 1.5 * far[0]


def test_a_step_is_watched_without_waiting() -> None:
    from chinese_llama.train.trainer import Watch

    watch, loss = Watch(), torch.tensor(float("nan"), device="cuda")
    norm = torch.tensor(1.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.losses.append((loss, [(0, [1])]))
        watch.step(1, norm, scaled=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.bad() == (1, "The loss is nan", [(0, [1])])


def test_a_step_waits_for_nothing(
    extended: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chinese_llama.train.trainer import VocabularyTrainer

    plain = VocabularyTrainer.training_step

    def step(self: VocabularyTrainer, *given: Any, **named: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if 2 <= self.state.global_step < 5 else "default")
        return plain(self, *given, **named)

    monkeypatch.setattr(VocabularyTrainer, "training_step", step)
    try:
        recipe("pt_lora").main(
            [
                *("--model_name_or_path", str(extended), "--data", str(work / "zh.jsonl")),
                *("--output_dir", str(tmp_path / "out"), "--block_size", "64"),
                *("--max_steps", "6", "--logging_steps", "100"),
            ]
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_processes_agree_one_step_late(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from chinese_llama.train.callbacks import StopOnSignal

    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stop, told = StopOnSignal(), []
        for asked in (False, True, True):
            stop._asked = asked
            stop.on_step_end(SimpleNamespace(device=torch.device("cuda")), None, SimpleNamespace())
            told.append(stop.stopped)
        assert told == [False, False, True]
    finally:
        torch.distributed.destroy_process_group()
