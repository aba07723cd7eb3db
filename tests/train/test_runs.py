"""Runs that can be believed: stopped, resumed, spread out, measured, refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chinese_llama.artifacts import read_manifest
from chinese_llama.errors import BadFile, DoesNotFit, UserError
from chinese_llama.quickstart.pipeline import recipe
from chinese_llama.resources import shipped
from chinese_llama.train import session
from chinese_llama.train.callbacks import read_log
from tests import tiny
from tests.train.running import losses, pretrain, start, tensors, wait_for, words


@pytest.fixture
def mixture(work: Path, tmp_path: Path) -> Path:
    """A configuration with everything in play: two weighted sources, shuffling, accumulation, rows first."""
    for name, texts in (("zh", tiny.CHINESE), ("en", tiny.ENGLISH)):
        tiny.write_texts(tmp_path / f"{name}.jsonl", [f"{text} {n}" for n, text in enumerate(texts)])
    data = [
        {"path": f"{tmp_path}/{name}.jsonl", "weight": share} for name, share in (("zh", 0.7), ("en", 0.3))
    ]
    config = {
        "data": data,
        "block_size": 32,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "learning_rate": 5e-3,
        "embedding_learning_rate": 1e-2,
        "rows_only_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 16,
        "logging_steps": 1,
        "save_steps": 4,
        "eval_split": 0.2,
        "eval_steps": 4,
    }
    (tmp_path / "mixture.yaml").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path / "mixture.yaml"


@pytest.mark.parametrize("killed_after", [4, 8])
def test_a_killed_run_equals_one_that_was_not(
    killed_after: int, mixture: Path, extended: Path, tmp_path: Path
) -> None:
    """In the rows-only phase and after it, the weights and the log are those of the whole run."""
    common = ["--config", str(mixture), "--model_name_or_path", str(extended)]
    recipe("pt_lora").main([*common, "--output_dir", str(tmp_path / "whole")])
    process = start([*common, "--output_dir", str(tmp_path / "broken")])
    wait_for(tmp_path / "broken.run", f"checkpoint-{killed_after}", process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "broken").exists()
    recipe("pt_lora").main([*common, "--output_dir", str(tmp_path / "broken")])
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    measured = [
        [entry["eval"] for entry in read_log(tmp_path / name / "log.jsonl") if "eval" in entry]
        for name in ("whole", "broken")
    ]
    assert measured[0] == measured[1] and len(measured[0]) == 5


def test_lora_waits_while_only_rows_train(mixture: Path, extended: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe("pt_lora").main(
        ["--config", str(mixture), "--model_name_or_path", str(extended), "--output_dir", str(out)]
    )
    rates = [e["learning_rates"] for e in read_log(out / "log.jsonl") if "learning_rates" in e]
    assert [rate["lora"] for rate in rates[:6]] == [0.0] * 6 and rates[7]["lora"] == 5e-3
    assert max(rate["rows"] for rate in rates) == 1e-2
    with pytest.raises(UserError, match="leaves LoRA none of the 4 steps"):
        recipe("pt_lora").main(
            [
                *("--config", str(mixture), "--model_name_or_path", str(extended)),
                *("--output_dir", str(tmp_path / "b"), "--max_steps", "4"),
            ]
        )


def test_equal_configurations_give_equal_trajectories(extended: Path, work: Path, tmp_path: Path) -> None:
    """8 blocks at once, 8 times one, and two processes of two times two."""
    common = ["--max_steps", "4", "--lora_dropout", "0", "--logging_steps", "1", "--learning_rate", "5e-3"]

    def shape(name: str, batch: int, accumulated: int, processes: int = 1) -> Path:
        out = tmp_path / name
        more = [
            "--per_device_train_batch_size",
            str(batch),
            "--gradient_accumulation_steps",
            str(accumulated),
        ]
        if processes == 1:
            return pretrain(extended, work / "zh.jsonl", out, *common, *more)
        arguments = [*words(extended, work / "zh.jsonl", out), "--block_size", "32", "--lora_r", "4"]
        process = start([*arguments, *common, *more], processes)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        return out

    at_once, one_by_one, two = shape("a", 8, 1), shape("b", 1, 8), shape("c", 2, 2, 2)
    manifest = read_manifest(two)
    assert manifest is not None and manifest.metrics["tokens_per_step"] == 8 * 32
    for other in (one_by_one, two):
        assert losses(other) == pytest.approx(losses(at_once), rel=1e-4)
        for name, tensor in tensors(at_once).items():
            assert torch.allclose(tensor, tensors(other)[name], atol=2e-4), name


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
    save = session.save

    def saving(trainer: Any, *rest: Any) -> None:
        trainer.model.eval()
        with torch.no_grad():
            kept.append(trainer.model(ids).logits)
        save(trainer, *rest)

    monkeypatch.setattr(session, "save", saving)
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
        extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "2", "--loraplus_lr_ratio", "16"
    )
    rates = next(e["learning_rates"] for e in read_log(out / "log.jsonl") if "learning_rates" in e)
    assert rates["lora_B"] == pytest.approx(16 * rates["lora"])


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


def test_nan_stops_with_the_step_the_documents_and_the_cause(
    extended: Path, work: Path, tmp_path: Path
) -> None:
    """A learning rate that makes the loss overflow."""
    with pytest.raises(UserError) as caught:
        pretrain(
            *(extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "40", "--learning_rate", "1e30"),
            *("--max_grad_norm", "0", "--warmup_steps", "0"),
        )
    told = str(caught.value)
    assert re.search(
        r"The (loss|gradient) is (nan|inf) at step \d+\. Its batch held the documents zh \d+", told
    )
    assert "Likely cause" in told and "learning_rate" in told
    assert not (tmp_path / "a").exists()


def test_a_base_with_nan_is_named(extended: Path, work: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(extended, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the base itself: .*layers\.1\.mlp\.up_proj.*not finite"):
        pretrain(broken, work / "zh.jsonl", tmp_path / "a", "--max_steps", "3")


def test_measures_are_logged_drawn_and_told(extended: Path, work: Path, tmp_path: Path) -> None:
    out = pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "6", "--eval_steps", "3"),
        *("--eval_text", f"zh={work / 'zh.jsonl'}", f"en={work / 'en.jsonl'}", "--learning_rate", "1e-2"),
    )
    measured = [entry for entry in read_log(out / "log.jsonl") if "eval" in entry]
    assert [entry["step"] for entry in measured] == [0, 3, 6]
    zh = [entry["eval"]["zh"]["bits_per_character"] for entry in measured]
    assert zh[2] < zh[1] < zh[0]
    page = (out / "run.md").read_text(encoding="utf-8")
    assert f"{zh[2]:.3f}" in page and "| lora_A |" in page
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{zh[2]:.3f}" in (out / "README.md").read_text(encoding="utf-8")
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.metrics["measured"]["eval/zh/bits_per_character"] == zh[2]
    entry = next(entry for entry in read_log(out / "log.jsonl") if "loss" in entry)
    assert {"grad_norm", "tokens_per_second", "characters_per_second", "learning_rates"} <= set(entry)
    assert entry["characters_per_second"] > entry["tokens_per_second"] > 0
    assert "memory_gib" in entry or "gpu_memory_gib" in entry


def test_tensorboard_gets_the_figures(extended: Path, work: Path, tmp_path: Path) -> None:
    """Beside the output, where they outlive the run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "a", "--max_steps", "3", "--logging_steps", "1"),
        *("--report_to", "tensorboard", "--eval_text", f"en={work / 'en.jsonl'}"),
    )
    events = EventAccumulator(str(tmp_path / "a.tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert any(name.endswith("loss") for name in names)
    assert any("en/bits_per_byte" in name for name in names)


def test_a_tracker_that_is_not_installed_is_one_sentence(
    extended: Path, work: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="comet"):
        pretrain(extended, work / "zh.jsonl", tmp_path / "a", "--report_to", "comet_ml")


def test_measuring_changes_nothing(extended: Path, work: Path, tmp_path: Path) -> None:
    common = ("--max_steps", "4", "--lora_dropout", "0.1")
    plain = pretrain(extended, work / "zh.jsonl", tmp_path / "a", *common)
    measured = pretrain(
        *(extended, work / "zh.jsonl", tmp_path / "b", *common),
        *("--eval_steps", "1", "--eval_text", f"en={work / 'en.jsonl'}"),
    )
    assert all(torch.equal(tensor, tensors(measured)[name]) for name, tensor in tensors(plain).items())


def test_forgetting_warns_or_stops(
    extended: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate so high that the English gets worse."""
    arguments = (
        *("--max_steps", "8", "--learning_rate", "0.3", "--eval_steps", "2", "--warmup_steps", "0"),
        *("--eval_text", f"en={work / 'en.jsonl'}", "--max_regression", "en=0.01"),
    )
    pretrain(extended, work / "zh.jsonl", tmp_path / "warned", *arguments)
    assert "Warning: en rose from" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"Stopped: en rose from .* over the limit of 1\.0%"):
        pretrain(extended, work / "zh.jsonl", tmp_path / "a", *arguments, "--on_regression", "stop")
    assert not (tmp_path / "a").exists() and list((tmp_path / "a.run").glob("checkpoint-*"))
    pretrain(extended, work / "zh.jsonl", tmp_path / "a", *arguments)
    assert losses(tmp_path / "a") == losses(tmp_path / "warned")
    with pytest.raises(UserError, match="no text is named 'fr'"):
        pretrain(extended, work / "zh.jsonl", tmp_path / "b", *arguments[:-1], "fr=0.1")


def test_a_dry_run_tells_and_runs_a_step(
    extended: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(extended, work / "zh.jsonl", tmp_path / "a", "--dry-run", "--num_train_epochs", "3")
    told = capsys.readouterr().out
    for wanted in ("lora_A", "embed_tokens", "zh ", "100.0%", "frozen weights", "optimizer", "One step ran"):
        assert wanted in told
    steps = int(re.search(r"The run: ([\d,]+) steps of 2 x 32", told)[1].replace(",", ""))  # type: ignore[index]
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.run").exists()
    pretrain(extended, work / "zh.jsonl", tmp_path / "a", "--num_train_epochs", "3")
    manifest = read_manifest(tmp_path / "a")
    assert manifest is not None and manifest.metrics["steps"] == steps


def test_a_truncated_checkpoint_costs_only_its_steps(extended: Path, work: Path, tmp_path: Path) -> None:
    common = ["--max_steps", "12", "--save_steps", "4"]
    whole = pretrain(extended, work / "zh.jsonl", tmp_path / "whole", *common)
    out = tmp_path / "out"
    process = start(
        [
            *words(extended, work / "zh.jsonl", out),
            *("--block_size", "32", "--per_device_train_batch_size", "2"),
            *("--logging_steps", "2", "--lora_r", "4", *common),
        ]
    )
    wait_for(tmp_path / "out.run", "checkpoint-8", process)
    process.kill()
    process.communicate()
    for file in (tmp_path / "out.run").glob("checkpoint-*/adapter_model.safetensors"):
        if file.parent.name != "checkpoint-4":
            file.write_bytes(file.read_bytes()[:1000])
    pretrain(extended, work / "zh.jsonl", out, *common)
    assert all(torch.equal(tensor, tensors(out)[name]) for name, tensor in tensors(whole).items())


def test_sigterm_saves_and_stops(extended: Path, work: Path, tmp_path: Path) -> None:
    arguments = [*words(extended, work / "zh.jsonl", tmp_path / "out"), "--block_size", "32"]
    process = start([*arguments, "--max_steps", "20000", "--save_steps", "5", "--lora_r", "4"])
    wait_for(tmp_path / "out.run", "checkpoint-5", process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "The same command goes on" in err and "Traceback" not in err


def test_a_full_disk_is_one_sentence_and_loses_nothing(extended: Path, work: Path, tmp_path: Path) -> None:
    """A limit on the size of files, set after the first checkpoint, stands in for a disk that is full."""
    limited = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from chinese_llama.train import trainer\n"
        "seal = trainer.seal\n"
        "def sealed(directory):\n"
        "    seal(directory)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "trainer.seal = sealed\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = [*words(extended, work / "zh.jsonl", tmp_path / "out"), "--block_size", "32", "--lora_r", "4"]
    command = [sys.executable, "-c", limited, str(shipped("recipes") / "pt_lora.py"), *arguments]
    done = subprocess.run(
        [*command, "--max_steps", "6", "--save_steps", "2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "The disk is full: step 4 could not be saved" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in (tmp_path / "out.run").glob("*checkpoint-*")] == ["checkpoint-2"]
