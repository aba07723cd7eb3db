"""What a run leaves: an adapter that PEFT loads, all of which trained; and what goes on from one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.train import course
from chinese_llama.train.log import read_log
from tests import tiny
from tests.train.running import losses, pretrain, tensors


@pytest.mark.parametrize("embeddings", ["new-rows", "full", "frozen"])
@pytest.mark.parametrize("more", [[], ["--use_rslora"], ["--use_dora"]])
def test_peft_gives_the_logits_that_training_had(
    embeddings: str,
    more: list[str],
    extended: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.arange(4, 120)[None]
    kept: list[torch.Tensor] = []
    save = course.save

    def saving(trainer: Any, *rest: Any) -> None:
        trainer.model.eval()
        with torch.no_grad():
            kept.append(trainer.model(ids).logits)
        save(trainer, *rest)

    monkeypatch.setattr(course, "save", saving)
    out = tmp_path / "a"
    pretrain(
        *(extended, work / "zh.jsonl", out, "--max_steps", "3", "--learning_rate", "1e-2"),
        *("--embeddings", embeddings, *more),
    )
    model = AutoModelForCausalLM.from_pretrained(extended, dtype=torch.float32)
    with torch.no_grad():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, str(out)).eval()(ids).logits
    assert torch.allclose(after, kept[0], atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)


def test_lora_plus_trains_b_faster(extended: Path, work: Path, tmp_path: Path) -> None:
    out = pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "2", "--loraplus_lr_ratio", "16"),
        *(
            "--include_num_input_tokens_seen",
            "true",
        ),  # with which transformers puts its summary into every entry
    )
    (entry,) = [entry for entry in read_log(out / "log.jsonl") if "loss" in entry]
    rates = entry["learning_rates"]
    assert rates["lora_B"] == pytest.approx(16 * rates["lora"])
    assert entry["num_input_tokens_seen"] == 2 * 2 * 32


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_trains_on_the_cpu(
    quantization: str, tokenizer: Path, work: Path, tmp_path: Path
) -> None:
    """bitsandbytes runs both on the CPU; with an adapter below, which is merged first."""
    from chinese_llama.model.resize import extend_model

    tiny.write_base(tmp_path / "base", tiny.base_tokenizer(), hidden_size=64, intermediate_size=128)
    extend_model(tmp_path / "base", tokenizer, tmp_path / "extended")
    quick = ("--max_steps", "3", "--learning_rate", "1e-2")
    plus = pretrain(tmp_path / "extended", work / "zh.jsonl", tmp_path / "plus", *quick)
    more = pretrain(
        *(tmp_path / "extended", work / "zh.jsonl", tmp_path / "more", *quick),
        *("--adapters", f"plus={plus}", "--quantization", quantization),
    )
    found = tensors(more)
    assert all(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name)
    assert losses(more)[0] < losses(plus)[0]
    with pytest.raises(UserError, match="use_dora does not go with"):
        pretrain(
            *(tmp_path / "extended", work / "zh.jsonl", tmp_path / "b"),
            *("--use_dora", "--quantization", "int8"),
        )


def reference_adapter(directory: Path, base: Path, tokenizer: Path) -> Path:
    """An adapter as Chinese-LLaMA's were published: LoRA, and both vocabulary matrices whole, at the size
    of the grown vocabulary, on a base that was not grown."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(rows_of(tokenizer), mean_resizing=False)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, directory / name)
    return directory


def rows_of(tokenizer: Path) -> int:
    from chinese_llama.vocab.readers import open_readers

    return len(open_readers(tokenizer)[0].pieces)


def test_a_published_adapter_goes_on_and_all_of_it_trains(
    base: Path, tokenizer: Path, work: Path, tmp_path: Path
) -> None:
    old = reference_adapter(tmp_path / "old", base, tokenizer)
    made = pretrain(
        *(base, work / "zh.jsonl", tmp_path / "new", "--init_adapter", str(old)),
        *("--max_steps", "3", "--learning_rate", "1e-2"),
    )
    before, after = tensors(old), tensors(made)
    assert before.keys() == after.keys()
    assert len([name for name in after if "lora_" in name]) == 8
    for name in after:
        assert before[name].shape == after[name].shape
        assert not torch.equal(before[name], after[name]), f"{name} did not train"
    manifest = read_manifest(made)
    assert manifest is not None and manifest.inputs["adapter"]["path"] == str(old)
    assert manifest.vocab_size == rows_of(tokenizer)
    assert manifest.settings["embeddings"] == "full" and manifest.settings["lora_alpha"] == 8


def test_an_adapter_that_cannot_go_on_is_refused(
    base: Path, tokenizer: Path, work: Path, tmp_path: Path
) -> None:
    old = reference_adapter(tmp_path / "old", base, tokenizer)
    found = load_file(old / "adapter_model.safetensors")
    wrong = {name: tensor[..., :-1].contiguous() for name, tensor in found.items()}
    save_file(wrong, old / "adapter_model.safetensors")
    with pytest.raises((DoesNotFit, BadFile), match=r"old|not fit|columns"):
        pretrain(base, work / "zh.jsonl", tmp_path / "new", "--init_adapter", str(old))
    missing = {name: t for name, t in found.items() if not ("q_proj" in name and "lora_B" in name)}
    save_file(missing, old / "adapter_model.safetensors")
    with pytest.raises(BadFile, match=r"one half|no weights"):
        pretrain(base, work / "zh.jsonl", tmp_path / "new", "--init_adapter", str(old))
    assert not (tmp_path / "new").exists()


def test_nothing_is_saved_of_what_did_not_move(extended: Path, work: Path, tmp_path: Path) -> None:
    quick = ("--max_steps", "3", "--weight_decay", "0")
    with pytest.raises(UserError, match="Nothing in lora_A, lora_B, embed_tokens, lm_head moved in 3 steps"):
        pretrain(extended, work / "zh.jsonl", tmp_path / "a", *quick, "--learning_rate", "0")
    with pytest.raises(UserError, match="Nothing in embed_tokens, lm_head moved"):
        pretrain(extended, work / "zh.jsonl", tmp_path / "b", *quick, "--embedding_learning_rate", "0")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
