"""The recipes, end to end on pico models: real training, saving, stopping and going on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chinese_llama.adapt.launch import recipe
from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import DoesNotFit, OutputExists, UserError
from chinese_llama.merging.plan import Step, load
from chinese_llama.merging.stream import merge
from chinese_llama.train.log import read_log
from tests.train.running import QUICK, pretrain, start, wait_for, words


@pytest.fixture(scope="module")
def plus(extended: Path, work: Path) -> Path:
    return pretrain(
        extended, work / "zh.jsonl", work / "plus", "--max_steps", "12", "--learning_rate", "1e-2"
    )


@pytest.fixture(scope="module")
def alpaca(extended: Path, work: Path, plus: Path) -> Path:
    recipe("sft_lora").main(
        [
            *("--model_name_or_path", str(extended), "--data", str(work / "ins.jsonl")),
            *("--adapters", f"plus={plus}", "--output_dir", str(work / "alpaca"), "--max_steps", "6"),
            *("--max_seq_length", "128", "--logging_steps", "2", "--lora_r", "4", "--learning_rate", "1e-2"),
        ]
    )
    return work / "alpaca"


def test_the_adapter_is_whole_and_says_what_it_was_made_from(plus: Path, extended: Path) -> None:
    manifest = read_manifest(plus)
    assert manifest is not None and manifest.kind == "adapter"
    assert manifest.inputs["base"]["path"] == str(extended)
    assert set(manifest.inputs) == {"base", "tokenizer", "data:0"}
    assert manifest.metrics["steps"] == 12 and manifest.settings["learning_rate"] == 1e-2
    assert {"adapter_model.safetensors", "tokenizer.model", "tokenizer.json", "README.md"} <= {
        file.name for file in plus.iterdir()
    }
    assert not plus.with_name("plus.run").exists()


def test_the_loss_falls(plus: Path) -> None:
    losses = [entry["loss"] for entry in read_log(plus / "log.jsonl") if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2


def test_every_trainable_group_moves(plus: Path) -> None:
    tensors = load_file(plus / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert sum("trainable_tokens_delta" in name for name in tensors) == 2


def test_old_rows_keep_their_bits_and_new_rows_move(
    plus: Path, extended: Path, base: Path, tmp_path: Path
) -> None:
    merge(extended, [Step([load("plus", plus)])], tmp_path / "merged")
    before, after = (load_file(path / "model.safetensors") for path in (extended, tmp_path / "merged"))
    old = load_file(base / "model.safetensors")["lm_head.weight"].shape[0]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name][:old], after[name][:old])
        assert not torch.equal(before[name][old:], after[name][old:])


def test_peft_loads_the_adapter_and_agrees_with_merge(
    plus: Path, alpaca: Path, extended: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(extended, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(plus)).merge_and_unload()
    model = PeftModel.from_pretrained(model, str(alpaca)).eval()
    merge(extended, [Step([load("plus", plus)]), Step([load("alpaca", alpaca)])], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(0, 120)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, merged(ids).logits, atol=1e-4)


def test_tuning_names_its_parents_and_saves_its_template(alpaca: Path, plus: Path) -> None:
    manifest = read_manifest(alpaca)
    parent = read_manifest(plus)
    assert manifest is not None and parent is not None
    assert manifest.inputs["parent:0"]["sha256"] == parent.sha256
    assert "### Instruction" in (alpaca / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("embeddings", ["full", "frozen"])
def test_other_embeddings_train_and_merge(
    embeddings: str, extended: Path, work: Path, tmp_path: Path
) -> None:
    made = pretrain(
        extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "2", "--embeddings", embeddings
    )
    names = load_file(made / "adapter_model.safetensors")
    assert any("embed_tokens" in name for name in names) == (embeddings == "full")
    merge(extended, [Step([load("a", made)])], tmp_path / "merged")


def test_ctrl_c_saves_and_says_how_to_go_on(extended: Path, work: Path, tmp_path: Path) -> None:
    arguments = [*words(extended, work / "zh.jsonl", tmp_path / "out"), *QUICK]
    arguments += ["--max_steps", "20000", "--save_steps", "5"]
    process = start(arguments)
    wait_for(tmp_path / "out.run", "checkpoint-5", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "The same command goes on" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run").is_dir()
    with pytest.raises(UserError, match="unfinished run with other"):
        recipe("pt_lora").main([*arguments, "--learning_rate", "0.5"])


def test_an_output_is_not_overwritten(plus: Path, extended: Path, work: Path) -> None:
    with pytest.raises(OutputExists, match="exists"):
        pretrain(extended, work / "zh.jsonl", plus)


def test_errors_name_what_does_not_fit(
    extended: Path, base: Path, tokenizer: Path, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(DoesNotFit, match="longer than the model's limit of 128"):
        pretrain(extended, work / "zh.jsonl", out, "--block_size", "256")
    with pytest.raises(DoesNotFit, match="extend-model"):
        pretrain(base, work / "zh.jsonl", out, "--tokenizer_name_or_path", str(tokenizer))
    with pytest.raises(DoesNotFit, match="no 'w_pack'"):
        pretrain(extended, work / "zh.jsonl", out, "--lora_target_modules", "w_pack")
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        pretrain(extended, work / "zh.jsonl", out, "--learning_rat", "1e-4")
    with pytest.raises(UserError, match="no manifest says which rows are new"):
        pretrain(base, work / "en.jsonl", out)
    assert list(tmp_path.iterdir()) == []


def test_sources_are_mixed_by_weight(extended: Path, work: Path, tmp_path: Path) -> None:
    data = [{"path": str(work / "zh.jsonl"), "weight": 0.5}, {"path": str(work / "en.jsonl"), "weight": 0.5}]
    config = tmp_path / "mix.yaml"
    config.write_text(json.dumps({"data": data, "max_steps": 2}), encoding="utf-8")
    arguments = [
        "--config",
        str(config),
        "--model_name_or_path",
        str(extended),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    recipe("pt_lora").main([*arguments, *QUICK])
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest.settings["weights"] == [0.5, 0.5]


def test_a_step_without_a_target_teaches_nothing_and_training_goes_on(
    extended: Path, work: Path, tmp_path: Path
) -> None:
    """A block of single tokens, as the last one of a corpus can be."""
    made = pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "a", "--block_size", "2", "--max_steps", "12"),
        *("--per_device_train_batch_size", "1", "--logging_steps", "1"),
    )
    losses = [entry["loss"] for entry in read_log(made / "log.jsonl") if "loss" in entry]
    assert len(losses) == 12 and losses.count(0) == 1


def test_a_log_that_a_kill_cut_is_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"ste')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("embeddings", ["new-rows", "full"])
def test_a_tied_base_stays_tied(embeddings: str, tokenizer: Path, work: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from chinese_llama.model.resize import extend_model
    from tests import tiny

    tiny.write_base(tmp_path / "base", tiny.base_tokenizer(), tied=True)
    extend_model(tmp_path / "base", tokenizer, tmp_path / "extended")
    made = pretrain(
        *(tmp_path / "extended", work / "zh.jsonl", tmp_path / "plus"),
        *("--max_steps", "4", "--learning_rate", "1e-2", "--embeddings", embeddings),
    )
    merge(tmp_path / "extended", [Step([load("plus", made)])], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "extended", dtype=torch.float32)
    before = model.model.embed_tokens.weight.detach().clone()
    model = PeftModel.from_pretrained(model, str(made)).eval()
    ids = torch.arange(0, len(before))[None, :120]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, merged(ids).logits, atol=1e-4)
    assert not torch.equal(before, merged.model.embed_tokens.weight)


def test_a_compiled_model_gives_the_same_adapter(extended: Path, work: Path, tmp_path: Path) -> None:
    """Traced, but not made into kernels: those take a minute."""
    found = []
    for more in ([], ["--torch_compile", "true", "--torch_compile_backend", "eager"]):
        place = tmp_path / str(len(more))
        pretrain(extended, work / "zh.jsonl", place, "--max_steps", "4", "--lora_dropout", "0", *more)
        found.append(load_file(place / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-5)
