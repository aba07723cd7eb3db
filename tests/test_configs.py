"""Shipped configurations: every key is taken and changes something, and the run fits on the card that is named."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.adapt.launch import recipe as module
from chinese_llama.config import load_yaml
from chinese_llama.resources import shipped
from chinese_llama.train.estimate import Estimate, estimate, settings_of
from chinese_llama.train.fields import DEFAULTS, PretrainingFields, Recipe, TuningFields, resolve
from tests import tiny

CONFIGS = sorted((shipped("recipes") / "configs").glob("*.yaml"))
LAUNCH_FOLDER = shipped("recipes") / "launch"
LAUNCH = sorted(LAUNCH_FOLDER.glob("*.yaml"))
SIZED = {path.stem: path for path in CONFIGS if re.search(r"_(\d+x)?\d+gb$", path.stem)}
PRESETS = ("pt_llama", "pt_reference", "sft_reference")  # their point is to say everything
FIELDS = {"pt": PretrainingFields, "sft": TuningFields}
MARGIN = 0.1  # of a card's memory that stays free
BASE_ROWS, ROWS = 32_000, 49_920  # LLaMA's vocabulary, and with the pieces that extend-vocab brings along
SHAPES = {  # hidden size, size inside the MLP, layers, heads, heads of keys and values
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "33b": (6656, 17920, 60, 52, 52),
    "70b": (8192, 28672, 80, 64, 8),
}


def resolved(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe[Any]:
    """The recipe that a configuration is for, resolved with it and three places."""
    monkeypatch.chdir(folder)  # no workspace around
    (folder / "d.jsonl").write_text("{}", encoding="utf-8")
    kind = path.stem.partition("_")[0]
    given = ["--model_name_or_path", "m", "--data", "d.jsonl", "--output_dir", "o"]
    defaults = module(f"{kind}_lora").DEFAULTS
    return resolve(f"{kind}_lora", FIELDS[kind], defaults, ["--config", str(path), *given])


def estimated(recipe: Recipe[Any], size: str, text: str, monkeypatch: pytest.MonkeyPatch) -> Estimate:
    """The estimate for a model of `size`, launched as the first lines of the configuration say."""
    hidden, inner, layers, heads, narrow = SHAPES[size]
    config = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": narrow,
        "vocab_size": ROWS,
        "tie_word_embeddings": False,
    }
    if launch := re.search(r"--config_file recipes/(launch/\w+\.yaml)", text):
        launched = load_yaml(shipped("recipes") / launch[1])
        monkeypatch.setenv("WORLD_SIZE", str(launched["num_processes"]))
        monkeypatch.setenv("ACCELERATE_USE_FSDP", str("fsdp_config" in launched).lower())
    return estimate(config, settings_of(recipe.fields, recipe.training, ROWS - BASE_ROWS))


def header(path: Path) -> str:
    """The comment that a file starts with, as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))


def test_sizes_and_presets_are_there() -> None:
    assert {"pt_7b_16gb", "pt_7b_24gb", "pt_7b_80gb", "sft_7b_16gb", "sft_7b_80gb"} <= set(SIZED)
    assert {name.split("_")[1] for name in SIZED} == set(SHAPES)
    assert set(PRESETS) < {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_taken(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    recipe = resolved(path, tmp_path, monkeypatch)
    arguments = TrainingArguments(**recipe.training, use_cpu=True, output_dir=str(tmp_path))
    for name, value in load_yaml(path).items():
        assert getattr(recipe.fields if hasattr(recipe.fields, name) else arguments, name) == value, name


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem not in PRESETS], ids=lambda path: path.stem
)
def test_no_key_repeats_a_default(path: Path) -> None:
    from transformers import TrainingArguments

    kind = path.stem.partition("_")[0]
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for cls in (TrainingArguments, FIELDS[kind])
        for field in dataclasses.fields(cls)
    }
    defaults |= DEFAULTS | module(f"{kind}_lora").DEFAULTS
    assert [name for name, value in load_yaml(path).items() if value == defaults[name]] == []


@pytest.mark.parametrize("name", SIZED)
def test_the_run_fits_as_the_header_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = header(SIZED[name])
    recipe = resolved(SIZED[name], tmp_path, monkeypatch)
    found = estimated(recipe, name.split("_")[1], text, monkeypatch)
    claimed = re.search(
        r"Estimated: ([\d.]+) GiB \((.*?)\), by chinese_llama/train/estimate.py from vocabulary 49,920", text
    )
    assert claimed, "the header gives no estimate"
    assert float(claimed[1]) == pytest.approx(found.total / 2**30, rel=0.05)
    parts = dict(re.fullmatch(r"(.*) ([\d.]+)", part).groups() for part in claimed[2].split(", "))  # type: ignore[union-attr]
    assert {part: float(size) for part, size in parts.items()} == pytest.approx(
        {part: size / 2**30 for part, size in found.parts.items()}, rel=0.05, abs=0.06
    )
    card = int(re.search(r"(\d+)gb$", name)[1]) * 10**9  # type: ignore[index]
    assert found.total < (1 - MARGIN) * card


@pytest.mark.parametrize("name", SIZED)
def test_a_step_has_as_many_tokens_on_every_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SIZED[name].read_text(encoding="utf-8")
    recipe = resolved(SIZED[name], tmp_path, monkeypatch)
    gpus = int(match[1]) if (match := re.search(r"_(\d+)x\d+gb$", name)) else 1
    batch = recipe.training["per_device_train_batch_size"] * recipe.training.get(
        "gradient_accumulation_steps", 1
    )
    tokens = gpus * batch * recipe.fields.length
    assert tokens == {"pt": 65_536, "sft": 16_384}[name.partition("_")[0]]
    assert f"# {tokens:,} tokens a step" in text


def test_the_llama_preset_ends_at_a_tenth_of_its_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import TrainingArguments, get_scheduler

    recipe = resolved(shipped("recipes") / "configs" / "pt_llama.yaml", tmp_path, monkeypatch)
    arguments = TrainingArguments(**recipe.training, use_cpu=True, output_dir=str(tmp_path))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    warm, steps = arguments.get_warmup_steps(10_000), 10_000
    scheduler = get_scheduler(
        arguments.lr_scheduler_type, optimizer, warm, steps, arguments.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert max(rates) == rates[1999] == pytest.approx(3e-4)
    assert rates[-1] == pytest.approx(3e-5)


def launch_arguments(path: Path) -> Any:
    """What `accelerate launch` makes of a launch file before it starts anything."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = shlex.split(path.read_text(encoding="utf-8").splitlines()[0].partition("accelerate launch ")[2])
    words[words.index("--config_file") + 1] = str(path)
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_accelerate_takes_every_launch_file(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.num_machines > 0
    assert config.num_processes > 0
    assert config.num_processes % config.num_machines == 0
    assert f"accelerate launch --config_file recipes/launch/{path.name} " in header(path)
    arguments = launch_arguments(path)
    assert arguments.training_script == "recipes/pt_lora.py"
    assert arguments.num_processes == config.num_processes
    assert arguments.mixed_precision == "no"
    for key in [*config.fsdp_config, *config.deepspeed_config]:  # these it takes unread
        assert key in vars(arguments), key


def test_fsdp_wraps_the_layers_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env
    from transformers import AutoModelForCausalLM

    arguments = launch_arguments(LAUNCH_FOLDER / "fsdp2.yaml")
    assert arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.cpu_ram_efficient_loading
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    model = AutoModelForCausalLM.from_pretrained(tiny.write_llama(tmp_path / "m", 64))
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.model.layers[0])}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_divides_what_the_file_says(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    arguments = launch_arguments(LAUNCH_FOLDER / f"zero{stage}.yaml")
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = ""  # what launch_command sets on the way
    for name, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        monkeypatch.setenv(name, value)
    zero = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
    assert zero["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)


def start(path: Path, script: Path, *more: str) -> subprocess.Popen[str]:
    """Start `script` with the command in the first line of a launch file, and `more` words."""
    words = shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    variables = dict(word.split("=") for word in words if re.fullmatch(r"[A-Z_]+=\w+", word))
    words = [word for word in words if word.partition("=")[0] not in variables]
    assert words[:2] == ["accelerate", "launch"]
    assert words.pop() == "recipes/pt_lora.py"
    words[words.index("--config_file") + 1] = str(path)
    command = [sys.executable, "-m", "accelerate.commands.launch", *words[2:], *more, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Prints the number of processes, and which of them this is."""
    lines = [
        "from accelerate import Accelerator",
        "accelerator = Accelerator()",
        "told = accelerator.num_processes, accelerator.process_index, accelerator.device.type",
        "print('%d %d %s\\n' % told, end='', flush=True)  # in one piece: others print too",
        "accelerator.end_training()",
    ]
    (tmp_path / "script.py").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "script.py"


def test_one_process_on_the_cpu(script: Path) -> None:
    assert start(LAUNCH_FOLDER / "cpu.yaml", script).communicate(timeout=120)[0] == "1 0 cpu\n"


def test_two_processes_on_the_cpu(script: Path) -> None:
    told = start(LAUNCH_FOLDER / "cpu_2.yaml", script, "--main_process_port", free_port()).communicate(
        timeout=120
    )
    assert sorted(told[0].splitlines()) == ["2 0 cpu", "2 1 cpu"]


@pytest.mark.slow
def test_two_machines_find_each_other(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both on this machine and on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    here = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--num_processes", "2"]
    machines = [
        start(LAUNCH_FOLDER / "multi_node.yaml", script, *here, "--machine_rank", rank) for rank in ("0", "1")
    ]
    assert [machine.communicate(timeout=120)[0] for machine in machines] == ["2 0 cpu\n", "2 1 cpu\n"]
